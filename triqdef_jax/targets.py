"""What is attacked: one trained run as its own bit-widths, as bit-widths it never trained, and re-quantized afterwards as a vendor would.

A target is named '4' (a bit-width, trained or calibrated for the purpose), 'ptq:minmax:4' or 'ptq:mse:4' (`ptq.py`). It predicts from raw uint8
images through the fake-quant graph or, deployed, through integers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from triqdef_jax import deploy, loop, ptq, quantize
from triqdef_jax.runs import Trained


class Target(NamedTuple):
    """One row of the evaluation.

    Attributes:
      name: as above. is_trained: a bit-width that the run trained. bits: its bit-width.
      logits_fn: images float32 `[B, H, W, 3]` in [0, 1] -> logits `[B, K]`, differentiable, a `jax.tree_util.Partial`.
      query: images uint8 `[B, H, W, 3]` -> logits `[B, K]` of the forward that is measured, for counting and for query attacks.
    """

    name: str
    is_trained: bool
    bits: int
    logits_fn: Callable
    query: Callable

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Return int32 `[B]` of uint8 images `[B, H, W, 3]`."""
        return np.asarray(_argmax(self.query(images)))


def parse(name: str) -> tuple[str, int]:
    """Return (observer, bits) of a target's name, observer '' for a bit-width.

    Raises:
      ValueError: no such target.
    """
    observer = ""
    if name.startswith("ptq:"):
        observer, _, name = name.removeprefix("ptq:").partition(":")
        if observer not in ptq.OBSERVERS:
            raise ValueError(
                f"target: expected ptq:OBSERVER:BITS with one of {', '.join(ptq.OBSERVERS)}, got {observer!r}"
            )
    if not name.isdigit():
        raise ValueError(f"target: expected a bit-width like 4, or ptq:minmax:4, got {name!r}")
    return observer, quantize.check_bits(int(name))


def make(trained: Trained, data, name: str, *, deployed: bool = False) -> Target:
    """Build one target of a trained run.

    Args:
      data: held-out images of it calibrate bit-widths that were not trained. deployed: measure the integer forward below 32 bits.

    Raises:
      ValueError: no such target, or a network without an integer lowering.
    """
    observer, bits = parse(name)
    images = loop.unit_range(jnp.asarray(data.heldout.images[: trained.config.data.calibration_images]))
    if observer:
        variables = ptq.requantize(trained, bits, observer, images)
    else:
        variables = trained.variables(bits, None if bits in trained.network.bits else images)
    module, spec = trained.network.module, trained.spec(bits)
    logits_fn = jax.tree_util.Partial(_logits_of(module), variables, spec)
    if deployed and bits != quantize.FLOAT_BITS:
        model = deploy.lower(module, variables, spec, data.image_size_px)
        query = functools.partial(deploy.integer_forward, model)
    else:
        query = functools.partial(_from_pixels(module), variables, spec)
    return Target(name, not observer and bits in trained.network.bits, bits, logits_fn, query)


@functools.cache
def _logits_of(module) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """One function object per network, so that jitted attacks compile once for all its bit-widths."""
    return lambda variables, spec, images: module.apply(variables, images, spec, "eval")[0]


@functools.cache
def _from_pixels(module):
    logits_of = _logits_of(module)
    return jax.jit(lambda variables, spec, images: logits_of(variables, spec, images.astype(jnp.float32) / 255.0))


@jax.jit
def _argmax(logits):
    return logits.argmax(axis=-1).astype(jnp.int32)
