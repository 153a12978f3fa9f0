"""Networks that compile in seconds, for tests of what surrounds a network: 'tiny' of one block; 'stem' of one convolution, a norm, a classifier."""

from triqdef_jax import models
from triqdef_jax.models.resnet import ResNet, ResNetPlan

PLANS = {"tiny": (1,), "stem": ()}


def register() -> None:
    """Make them known by these names, in this process."""
    for name, blocks in PLANS.items():
        models.MODELS[name] = _builder(blocks)


def _builder(blocks):
    return lambda name, *, num_classes, width, options: ResNet(ResNetPlan(blocks, width), num_classes, options)
