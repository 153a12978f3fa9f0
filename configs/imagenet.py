"""ImageNet, the paper's second data set: ResNet-34 at 224 px, 120 epochs, batch 128, five bit-widths, patches of 50 px.

    python -m triqdef_jax.prepare_data --dataset=imagenet2012 --archive_train=ILSVRC2012_img_train.tar \
        --archive_val=ILSVRC2012_img_val.tar
    python -m triqdef_jax.train --config=configs/imagenet.py
    python -m triqdef_jax.evaluate --workdirs=runs/imagenet

Variants, alone or joined by commas (`:resnet50,pod`): `resnet50`; `pod`, batch 4096 over many devices, with the
learning rate scaled linearly from the paper's 0.1 at 128 to 3.2, five warm-up epochs and bfloat16 multiplications; and
in place of the full method `qat`, `patch_ce` or `pbat` (`configs/cifar10.py` tells what they are). `pod` is UNMEASURED:
nobody has trained with it yet, so neither its accuracy nor its stability is known.

Cost: counted, not measured. 1.2 million steps; over the curriculum the full method multiplies 7.3 times as much as
plain training of one bit-width: 1.2e19 multiply-adds for ResNet-34 (3.6 G per image and forward). Making the pool needs
about 16 GB for the activations of one forward over 16 patches x 128 images. Evaluation attacks the first 5,000
validation images.

What to expect: not measured here. The paper reports at 32/5/4/2 bits a clean accuracy of 85.2/78.1/75.1/72.5 % (far
above the usual top-1 of this network, so top-5 or a subset is likely) and a LaVAN success of 35.0/33.1/31.1/28.5 %
at 50 px.

Reference: TriQDef (Guesmi et al. 2026), optimiser as in `configs/cifar10.py`. Open in the paper and decided here:
everything under `patches` but the sizes, the held-out images, and the layers of FDP (stages 1 to 3 of four).
"""

from triqdef_jax import config as config_lib

VARIANTS = {
    "resnet50": {"model.name": "resnet50"},
    "pod": {
        "model.dtype": "bfloat16",
        "train.batch_size": 4096,
        "train.log_every_steps": 20,
        "train.checkpoint_every_steps": 500,
        "optim.lr": 3.2,  # 0.1 * 4096 / 128
        "optim.warmup_epochs": 5.0,
    },
    "qat": {"loss.method": "qat"},
    "patch_ce": {"loss.method": "patch_ce"},
    "pbat": {"loss.method": "pbat"},
}


def get_config(variant=""):
    config = config_lib.default()

    config.data.name = "imagenet"
    config.data.heldout_images = 5000  # decoded once into 750 MB
    config.data.calibration_images = 512  # one forward: stem activations of 1.6 GB

    config.model.name = "resnet34"
    config.model.width = 0  # the published 64 filters

    config.loss.feature_layers = ("stage1", "stage2", "stage3")

    config.train.batch_size = 128
    config.train.epochs = 120
    config.train.log_every_steps = 100
    config.train.checkpoint_every_steps = 5000

    config.patches.sizes_px = (50,)  # 5.0 % of the image
    config.patches.unseen_sizes_px = (70, 80)  # 9.8 % and 12.8 %
    config.patches.pool_size = 32
    config.patches.steps = 500  # as published for both families
    config.patches.source_epochs = 30

    config.eval.images = 5000

    config.update_from_flattened_dict(config_lib.join_variants("configs/imagenet.py", VARIANTS, variant))
    return config
