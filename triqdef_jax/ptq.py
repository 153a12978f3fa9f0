"""A trained backbone quantized once more afterwards, as a vendor would: other observers, no training, no knowledge of the trained scales.

`requantize` starts from the full-precision network (weights and norm affine of the 32-bit slot) and sets every scale and the running statistics in
one forward pass over calibration images, so that each layer sees what the quantized layers before it make. Images are float32
`[N, H, W, 3]` in [0, 1], held out from training. The result is the variables of one bit-width, as `calibration.calibrate_bit` returns them.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from triqdef_jax import quantize
from triqdef_jax.models.layers import QuantAct, QuantConv, QuantDense

NUM_RATIOS = 100  # Clipping ratios that 'mse' tries: 0.01, 0.02, ..., 1.


def minmax_scale(values: jax.Array, code_range: quantize.Range, *, axes: tuple[int, ...] | None = None) -> jax.Array:
    """Return max|values| / upper, the scale that clips nothing.

    Args:
      values: float array. code_range: smallest and largest code. axes: dimensions that share a scale, kept with size 1 (None: all, a scalar).
    """
    return quantize.observed_scale(jnp.max(jnp.abs(values), axis=axes, keepdims=axes is not None), code_range.upper)


def mse_scale(values: jax.Array, code_range: quantize.Range, *, axes: tuple[int, ...] | None = None) -> jax.Array:
    """Return the scale r max|values| / upper, r on a grid of `NUM_RATIOS` ratios up to 1, of least mean squared quantization error.

    Arguments as of `minmax_scale`, whose error it never exceeds; of several best ratios the smallest.
    """
    largest = minmax_scale(values, code_range, axes=axes)

    def error(ratio):
        quantized = quantize.fake_quant(values, ratio * largest, *code_range)
        return jnp.mean(jnp.square(values - quantized), axis=axes, keepdims=axes is not None)

    ratios = jnp.arange(1, NUM_RATIOS + 1, dtype=jnp.float32) / NUM_RATIOS
    best = ratios[jnp.argmin(jax.lax.map(error, ratios), axis=0)]
    return jnp.maximum(best * largest, quantize.MIN_SCALE)


OBSERVERS: dict[str, Callable] = {"minmax": minmax_scale, "mse": mse_scale}


def requantize(trained, bits: int, observer: str, images: jax.Array) -> dict:
    """Return one bit-width's variables with every scale set by an observer; nothing is stored.

    Use them as `trained.network.module.apply(variables, images, trained.spec(bits), "eval")` or in `deploy.lower`.

    Running statistics are estimated anew with the quantized layers, as some toolchains do and as `calibrate_bit` does, so that the observer alone
    is what differs. Kept statistics leave 4 bits and more as they are and ruin 2: of the 450 test digits, the multi-bit `qat` run (ResNet-8)
    gets 24 % right with 'mse' at 2 bits under kept statistics and 98 % under new ones, 98.7 % and 99.3 % at 4 bits.

    Args:
      trained: `runs.Trained`; where it has not trained 32 bits, its widest bit-width is the start. bits: 2..8.
      observer: key of `OBSERVERS`. Activations get one scale per tensor, weights one per output channel, the classifier's one for all, as in
        training. images: float32 `[N, H, W, 3]` in [0, 1].

    Raises:
      ValueError: unknown observer, bits outside 2..8, or 'mse' for a network without learned scales.
    """
    check_request(trained.config.quant.scale, bits, observer)
    start = trained.variables(max(trained.network.bits))
    return _observed(trained.network.module, observer, start, trained.spec(bits), jnp.asarray(images, jnp.float32))


def check_request(scale: str, bits: int, observer: str) -> None:
    """Raise ValueError, one line, where a network of `quant.scale` = `scale` cannot be quantized so."""
    if observer not in OBSERVERS:
        raise ValueError(f"the observer must be one of {', '.join(OBSERVERS)}, got {observer!r}")
    if quantize.check_bits(bits) == quantize.FLOAT_BITS:
        raise ValueError(
            f"bits must be {quantize.MIN_BITS}..{quantize.MAX_BITS} for a re-quantized network, got {bits}; attack the 32-bit one itself"
        )
    if scale != "learned" and observer != "minmax":
        raise ValueError(
            f"observer {observer!r} needs a network of quant.scale=learned, got {scale!r}, whose weights always take the "
            f"channel maximum; use minmax"
        )


@functools.partial(jax.jit, static_argnames=("module", "observer"))
def _observed(module, observer, variables, spec, images):
    with nn.intercept_methods(functools.partial(_set_scale, OBSERVERS[observer])):
        _, new = module.apply(variables, images, spec, "calibrate", mutable=["scales", "stats"])
    return {**variables, **new}


def _set_scale(rule, call, args, kwargs, context):
    """Set a quantizer's learned scale from what it is about to quantize, then let it run with it: a flax method interceptor.

    Networks of observed scales need no help: calibration itself takes their largest magnitudes.
    """
    module = context.module
    is_quantizer = context.method_name == "__call__" and isinstance(module, QuantAct | QuantConv | QuantDense)
    if not is_quantizer or module.options.scale != "learned":
        return call(*args, **kwargs)
    inputs, spec, _ = args
    if isinstance(module, QuantAct):
        module.put_variable("scales", "scale", rule(inputs, getattr(spec, module.kind)))
    else:
        code_range, axes = _weight_format(module, spec)
        module.put_variable(
            "scales", "weight_scale", rule(module.get_variable("params", "kernel"), code_range, axes=axes)
        )
    return call(inputs, spec, "eval", **kwargs)


def _weight_format(module, spec):
    """Return (range of the codes, axes that share a scale) of a layer's kernel."""
    if isinstance(module, QuantDense):
        return spec.edge_weight, (0, 1)
    return (spec.edge_weight if module.is_edge else spec.weight), (0, 1, 2)
