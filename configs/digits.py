"""Digits, the embedded default: 1,797 real handwritten digits at 16 x 16, ResNet-8, five bit-widths.

    python -m triqdef_jax.train --config=configs/digits.py
    python -m triqdef_jax.evaluate --workdirs=runs/digits

Variants, same network and budget: `qat` (clean multi-bit training), `patch_ce` (pool patches, no penalties), `pbat`
(image-specific patches, no penalties).
"""

from triqdef_jax import config as config_lib

VARIANTS = {
    "qat": {"loss.method": "qat"},
    "patch_ce": {"loss.method": "patch_ce"},
    "pbat": {"loss.method": "pbat"},
}


def get_config(variant=""):
    config = config_lib.default()
    config.update_from_flattened_dict(config_lib.join_variants("configs/digits.py", VARIANTS, variant))
    return config
