"""Digits, the embedded default: 1,797 real handwritten digits at 16 x 16, ResNet-8, five bit-widths.

    python -m triqdef_jax.train --config=configs/digits.py
    python -m triqdef_jax.evaluate --workdirs=runs/digits

Variants: `:qat` (clean multi-bit training) and `:patch_ce` (pool patches, no penalties), same network and budget.
"""

from triqdef_jax import config as config_lib

VARIANTS = ("", "qat", "patch_ce", "pbat")


def get_config(variant=""):
    if variant not in VARIANTS:
        raise ValueError(f"configs/digits.py has the variants {', '.join(VARIANTS[1:])}, got {variant!r}")
    config = config_lib.default()
    if variant:
        config.loss.method = variant
    return config
