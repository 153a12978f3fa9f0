"""The network that ships: one bit-width, integers only. Lowering of a trained network, and the carrier forward that defines its result."""

from triqdef_jax.deploy.carrier import integer_forward
from triqdef_jax.deploy.operations import IntegerModel
from triqdef_jax.deploy.resnet import lower_resnet
from triqdef_jax.models.resnet import ResNet

__all__ = ["IntegerModel", "integer_forward", "lower"]

LOWERINGS = {ResNet: lower_resnet}


def lower(module, variables: dict, spec, image_size_px: int) -> IntegerModel:
    """Lower one bit-width of a trained network to integers.

    Args:
      module: flax module of `models.make_model`. variables: its variables at one bit-width, `MultiBitNetwork.slice`.
      spec: the bit-width's `BitSpec`. image_size_px: side of the input images.

    Raises:
      ValueError: for 32 bits, or for a network without a lowering.
    """
    if bool(spec.is_float):
        raise ValueError("bits must be 2..8 to be deployed in integers, got 32")
    if type(module) not in LOWERINGS:
        raise ValueError(
            f"no integer lowering for {type(module).__name__}; known: {', '.join(c.__name__ for c in LOWERINGS)}"
        )
    return LOWERINGS[type(module)](module, variables, spec, image_size_px)
