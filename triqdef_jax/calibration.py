"""Entering a bit-width: scales and running statistics from held-out images, norm affine from a wider bit-width.

A newly active bit-width gets no weights copied: its quantizers and statistics are observed layer by layer in forward order. Its norm gain and
bias start as those of the nearest wider active bit-width (a deviation from the paper; `affine='reset'` starts them at 1 and 0).
"""

import functools

import jax
import jax.numpy as jnp

from triqdef_jax import quantize
from triqdef_jax.models import multibit
from triqdef_jax.models.multibit import MultiBitNetwork, Weights


def calibrate_new_bits(
    network: MultiBitNetwork, weights: Weights, stats, new_bits, active_bits, images, *, affine="copy"
):
    """Return (weights, stats) with every new bit-width ready to train.

    Args:
      new_bits: bit-widths that become active, widest first. active_bits: all active ones, the new ones included.
      images: float32 `[N, H, W, 3]` in [0, 1], held out from training. affine: 'copy' or 'reset'.

    Returns:
      New arrays; a function of the arguments alone, so a resumed run repeats it exactly.
    """
    ready = [bits for bits in active_bits if bits not in new_bits]
    for bits in new_bits:
        wider = [b for b in ready if b > bits]
        if affine == "copy" and wider and network.norm == "per_bit":
            source = multibit.take(weights.affine, network.slot(min(wider)).affine)
            weights = weights._replace(affine=multibit.put(weights.affine, network.slot(bits).affine, source))
        variables = calibrated(network, network.slice(weights, stats, network.slot(bits)), network.spec(bits), images)
        slot = network.slot(bits)
        weights = weights._replace(scales=multibit.put(weights.scales, slot.scales, variables["scales"]))
        stats = multibit.put(stats, slot.stats, variables["stats"])
        ready.append(bits)
    return weights, stats


def calibrate_bit(network: MultiBitNetwork, weights: Weights, stats, bits: int, images) -> dict:
    """Return one bit-width's variables, for a bit-width that was never trained (3 or 6, say); nothing is stored.

    Affine parameters are those of the nearest wider trained bit-width, or of the widest where none is wider.
    """
    wider = [b for b in network.bits if b > bits] or [max(network.bits)]
    variables = network.slice(weights, stats, network.slot(min(wider)))
    return calibrated(network, variables, network.spec(bits), images)


@functools.partial(jax.jit, static_argnums=0)
def calibrated(network: MultiBitNetwork, variables: dict, spec: quantize.BitSpec, images: jax.Array) -> dict:
    """Return the variables of one bit-width with scales and statistics set from the images, in one forward pass."""
    return network.calibrate(variables, spec, jnp.asarray(images, jnp.float32))
