"""Networks by name. A network maps (images, BitSpec, mode) to (logits, feature maps); `multibit.py` stacks bit-widths over it."""

import dataclasses

from triqdef_jax.models import resnet
from triqdef_jax.models.layers import LayerOptions


def make_resnet(name, *, num_classes, width, options):
    """Build the named residual network; `width` overrides the filters of its first stage (0 keeps the published number)."""
    plan = resnet.PLANS[name]
    return resnet.ResNet(dataclasses.replace(plan, width=width or plan.width), num_classes, options)


MODELS = {name: make_resnet for name in resnet.PLANS}


def make_model(name: str, *, num_classes: int, width: int = 0, options: LayerOptions | None = None):
    """Return the flax module of the named network.

    Raises:
      ValueError: for an unknown name; the message lists the known ones.
    """
    if name not in MODELS:
        raise ValueError(f"model.name must be one of {', '.join(sorted(MODELS))}, got {name!r}")
    return MODELS[name](name, num_classes=num_classes, width=width, options=options or LayerOptions())
