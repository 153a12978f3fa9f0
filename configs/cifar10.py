"""CIFAR-10, the paper's main run: ResNet-56, 200 epochs, batch 128, five bit-widths, patches of 6 px.

    python -m triqdef_jax.prepare_data --dataset=cifar10
    python -m triqdef_jax.train --config=configs/cifar10.py
    python -m triqdef_jax.evaluate --workdirs=runs/cifar10

Variants, alone or joined by commas (`:resnet20,qat`): `resnet20` (a third of the multiplications), and in place of the
full method `qat` (clean multi-bit training), `patch_ce` (pool patches, no penalties) or `pbat` (image-specific
patches, no penalties).

Cost: counted, not measured. 75,000 steps; over the curriculum the full method multiplies 7.3 times as much as plain
training of one bit-width, `patch_ce` 5.5 times, `qat` 3.7 times, `pbat` 8.8 times. For ResNet-56 (126 M multiply-adds
per image and forward) that is 2.6e16 multiply-adds: meant for an accelerator. Two source networks of 40 epochs and
their patches come on top once; all runs with the same data, network, optimiser and seed share them.

What to expect: not measured here yet. The paper reports at 32/5/4/2 bits a clean accuracy of 89.4/83.3/78.2/75.8 %
(plain QAT 89.4/85.1/80.5/78.2) and a LaVAN success of 32.4/30.2/28.4/26.2 % at 6 px.

Reference: TriQDef (Guesmi et al. 2026): SGD, rate 0.1, times 0.1 at 50 % and 75 %, momentum 0.9, decay 1e-4, lambdas 1,
0.8 and 0.5, which are the defaults. Open in the paper and decided here: everything under `patches` but the sizes, and
the held-out images.
"""

from triqdef_jax import config as config_lib

VARIANTS = {
    "resnet20": {"model.name": "resnet20"},
    "qat": {"loss.method": "qat"},
    "patch_ce": {"loss.method": "patch_ce"},
    "pbat": {"loss.method": "pbat"},
}


def get_config(variant=""):
    config = config_lib.default()

    config.data.name = "cifar10"
    config.data.heldout_images = 2000
    config.data.calibration_images = 1000

    config.model.name = "resnet56"
    config.model.width = 0  # the published 16 filters

    config.train.batch_size = 128
    config.train.epochs = 200
    config.train.log_every_steps = 100
    config.train.checkpoint_every_steps = 2000

    config.patches.sizes_px = (6,)  # 3.5 % of the image
    config.patches.unseen_sizes_px = (8, 10)  # 6.25 % and 9.8 %
    config.patches.pool_size = 64
    config.patches.steps = 500  # as published for both families
    config.patches.source_epochs = 40

    config.update_from_flattened_dict(config_lib.join_variants("configs/cifar10.py", VARIANTS, variant))
    return config
