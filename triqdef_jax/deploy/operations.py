"""The integer model: a list of operations on integer tensors, from raw uint8 pixels to integer logits; arrays only, no files.

Codes are whole numbers; the zero point is 0 everywhere. Weight codes lie in int8 containers: b-bit codes times 2**(8-b), the scale divided by
the same, so that the grid of the int32 bias is that much finer. Tensors are named; every operation names what it reads and writes.
"""

import dataclasses
import functools

import jax
import numpy as np

PIXEL_OFFSET = 128  # The first tensor, 'pixels', holds pixel - 128, in [-128, 127].
INPUT = "pixels"
EXACT_SUM = 2**24  # float32 holds every whole number up to here


def _static(**kwargs):
    return dataclasses.field(metadata={"static": True}, **kwargs)


def _operation(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_operation
class Conv:
    """q_y = clip(rne(f32(sum q_x q_w + bias) * multiplier), lower, upper), zero padding (size - 1) / 2.

    Attributes:
      weights: int8 `[kh, kw, C, D]`, container codes. bias: int32 `[D]`. multiplier: float32 `[D]`, accumulator step / output scale.
      lower, upper: output codes; a ReLU is lower = 0. num_splits: groups of input channels whose float32 sums are exact.
    """

    weights: np.ndarray
    bias: np.ndarray
    multiplier: np.ndarray
    stride: int = _static()
    lower: int = _static()
    upper: int = _static()
    num_splits: int = _static()
    source: str = _static()
    output: str = _static()


@_operation
class Requantize:
    """q_y = clip(rne(q_x * multiplier), lower, upper)."""

    multiplier: np.ndarray
    lower: int = _static()
    upper: int = _static()
    source: str = _static()
    output: str = _static()


@_operation
class Add:
    """q_y = clip(rne(q_a * multiplier_a + q_b * multiplier_b), lower, upper); the ReLU behind it is lower = 0."""

    multiplier_a: np.ndarray
    multiplier_b: np.ndarray
    lower: int = _static()
    upper: int = _static()
    source: str = _static()
    source_b: str = _static()
    output: str = _static()


@_operation
class MaxPool:
    """3 x 3 maximum with stride 2 and padding 1 of non-negative codes."""

    source: str = _static()
    output: str = _static()


@_operation
class MeanPool:
    """q_y = clip(rne(sum over positions of q_x * multiplier), lower, upper); multiplier = input scale / (output scale * positions)."""

    multiplier: np.ndarray
    lower: int = _static()
    upper: int = _static()
    source: str = _static()
    output: str = _static()


@_operation
class Dense:
    """Integer logits int32 = sum q_x q_w + bias; logits = integer logits * scale.

    Attributes: weights: int8 `[C, K]`. bias: int32 `[K]`. scale: float32 scalar.
    """

    weights: np.ndarray
    bias: np.ndarray
    scale: np.ndarray
    source: str = _static()


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class IntegerModel:
    """Operations in execution order, the `Dense` classifier last. A pytree: arrays are leaves, shapes of the graph are static."""

    operations: tuple


def num_splits(weights: np.ndarray, bias: np.ndarray, largest_input: int) -> int:
    """Return into how many groups of input channels a sum must be cut so that float32 holds every partial sum exactly.

    Raises:
      ValueError: when even single channels overflow, or the whole sum leaves int32.
    """
    magnitude = np.abs(weights.astype(np.int64))
    per_channel = magnitude.sum(axis=(0, 1)) if weights.ndim == 4 else magnitude  # [C, D]
    if (per_channel.sum(axis=0) * largest_input + np.abs(bias.astype(np.int64))).max() >= 2**31:
        raise ValueError("a layer's accumulator can leave int32: its weights cannot be deployed at this bit-width")
    for splits in range(1, per_channel.shape[0] + 1):
        groups = np.array_split(per_channel, splits)
        if all((group.sum(axis=0) * largest_input).max() < EXACT_SUM for group in groups):
            return splits
    raise ValueError("one input channel alone overflows the exact range of float32; use fewer bits")
