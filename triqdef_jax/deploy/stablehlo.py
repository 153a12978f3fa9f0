"""The integer model as StableHLO: integer types alone, float32's requantization by 64-bit products and shifts; for IREE and other compilers.

A StableHLO convolution takes both operands in one type, so codes above 127 are stored less 128 in int8. Padding then holds -128, the code 0, and
128 times the sum of a filter's weights goes back into its bias.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from triqdef_jax.deploy import fixed_point
from triqdef_jax.deploy import operations as ops

FLOAT_TYPE = re.compile(r"\b(?:[a-z]*f(?:8\w*|16|32|64))\b|x(?:bf16|f8\w*|f16|f32|f64)\b")
LARGEST_INT8 = 127


def export_integers(model: ops.IntegerModel, batch: int | None = None) -> export.Exported:
    """Return the exported function from raw images uint8 `[b, H, W, 3]` to integer logits int32 `[b, K]`.

    `serialize()` of the result is what `jax.export.deserialize` reads, `mlir_module_serialized` portable StableHLO bytecode.

    Args:
      batch: b; None for any, by dynamic shapes, which compilers other than XLA may not take.

    Raises:
      ValueError: should a float type appear in the module.
    """
    side = model.image_size_px
    with jax.enable_x64(True):
        images = jax.ShapeDtypeStruct(export.symbolic_shape(f"{batch or 'b'}, {side}, {side}, 3"), jnp.uint8)
        made = export.export(jax.jit(functools.partial(integer_logits, model)), platforms=["cpu"])(images)
    found = float_types(made.mlir_module())
    if found:
        raise ValueError(f"the exported module must hold integers alone, found {', '.join(sorted(found))}")
    return made


def float_types(module: str) -> set[str]:
    """Return the float types that a module's text names."""
    return set(FLOAT_TYPE.findall(module))


def integer_logits(model: ops.IntegerModel, images: jax.Array) -> jax.Array:
    """Return integer logits int32 `[B, K]` of raw images uint8; needs 64-bit types (`jax.enable_x64`)."""
    pixels = (images.astype(jnp.int16) - ops.PIXEL_OFFSET).astype(jnp.int8)
    stored = {ops.INPUT: pixels}
    offsets = {name: ops.PIXEL_OFFSET if t.upper > LARGEST_INT8 else 0 for name, t in model.tensors.items()}
    *operations, classifier = model.operations
    for operation in operations:
        if isinstance(operation, ops.Concat | ops.MaxPool):
            stored[operation.output] = RULES[type(operation)](operation, stored, offsets)
            continue
        codes, kept = RULES[type(operation)](operation, stored, offsets), model.tensors[operation.output]
        codes = jnp.clip(codes, kept.lower, kept.upper) - offsets[operation.output]
        stored[operation.output] = codes.astype(jnp.int8)
    inputs = _codes(classifier.source, stored, offsets).reshape(images.shape[0], classifier.weights.shape[0])
    return jnp.dot(inputs, classifier.weights.astype(np.int32), preferred_element_type=jnp.int32) + classifier.bias


def _codes(name, stored, offsets):
    return stored[name].astype(jnp.int32) + jnp.int32(offsets[name])


def _conv(operation: ops.Conv, stored, offsets):
    offset = offsets[operation.source]
    if operation.is_depthwise:
        total = _depthwise(operation, stored[operation.source], offset)
    else:
        total = _convolve(operation, stored[operation.source], offset)
    # Padding is stored as -offset, so every tap of every position is short of the same.
    missing = offset * operation.weights.astype(np.int64).sum(axis=(0, 1, 2))
    return _rescale(total + (operation.bias + missing).astype(np.int32), operation.multiplier)


def _convolve(operation, images, offset):
    """Sum products. Zeros are the convolution's own padding: XLA of jaxlib 0.10.2 computes wrong sums where it folds a pad of zeros into an int8
    convolution of many channels on a map of one or two pixels."""
    padding = (operation.padding,) * 2
    if offset:
        images, padding = jnp.pad(images, ((0, 0), padding, padding, (0, 0)), constant_values=-offset), (0, 0)
    return jax.lax.conv_general_dilated(
        images,
        jnp.asarray(operation.weights),
        (operation.stride,) * 2,
        (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.int32,
    )


def _depthwise(operation, images, offset):
    """Sum shifted products; the offsets of what is joined differ by channel, but its filters are 1 x 1 and unpadded."""
    if operation.padding:
        images = jnp.pad(images, ((0, 0), *((operation.padding,) * 2,) * 2, (0, 0)), constant_values=-offset)
    (rows, columns), stride = operation.weights.shape[:2], operation.stride
    heights, widths = (
        (size - taps) // stride + 1 for size, taps in zip(images.shape[1:3], (rows, columns), strict=True)
    )
    total = 0
    for i in range(rows):
        for j in range(columns):
            stop = i + (heights - 1) * stride + 1, j + (widths - 1) * stride + 1
            window = images[:, i : stop[0] : stride, j : stop[1] : stride]
            total = total + window.astype(jnp.int32) * operation.weights[i, j, 0].astype(np.int32)
    return total


def _requantize(operation: ops.Requantize, stored, offsets):
    return _rescale(_codes(operation.source, stored, offsets), operation.multiplier)


def _mean_pool(operation: ops.MeanPool, stored, offsets):
    total = jnp.sum(_codes(operation.source, stored, offsets), axis=(1, 2), dtype=jnp.int32)
    return _rescale(total, operation.multiplier)


def _rescale(values, multiplier):
    """`fixed_point.rescale` in JAX."""
    mantissa, shift = (part.astype(np.int64) for part in fixed_point.decompose(multiplier))
    return _half_even(_round24(_round24(values.astype(jnp.int64)) * mantissa), shift)


def _round24(values):
    num_bits = 64 - jax.lax.clz(jnp.abs(values))
    extra = jnp.maximum(num_bits - fixed_point.SIGNIFICANT_BITS, 0)
    return jnp.left_shift(_half_even(values, extra), extra)


def _half_even(values, shift):
    half = jnp.right_shift(jnp.left_shift(np.int64(1), shift), np.int64(1))
    odd = jnp.right_shift(values, shift) & 1
    return jnp.where(shift == 0, values, jnp.right_shift(values + half - 1 + odd, shift))


def _add(operation: ops.Add, stored, offsets):
    total = np.int64(1 << (fixed_point.ADD_SHIFT - 1))
    for name, multiplier in (
        (operation.source, operation.multiplier_a),
        (operation.source_b, operation.multiplier_b),
    ):
        codes = _codes(name, stored, offsets).astype(jnp.int64)
        total = total + codes * np.int64(fixed_point.add_mantissa(multiplier))
    return jnp.right_shift(total, np.int64(fixed_point.ADD_SHIFT))


def _max_pool(operation: ops.MaxPool, stored, offsets):
    padding = ((0, 0), *((operation.before, operation.after),) * 2, (0, 0))
    window, strides = (1, operation.size, operation.size, 1), (1, operation.stride, operation.stride, 1)
    offsets[operation.output] = offsets[operation.source]
    smallest = np.int8(-128)
    return jax.lax.reduce_window(stored[operation.source], smallest, jax.lax.max, window, strides, padding)


def _concat(operation: ops.Concat, stored, offsets):
    parts = operation.sources
    channels = [stored[name].shape[-1] for name in parts]
    offsets[operation.output] = np.repeat([offsets[name] for name in parts], channels)
    return jnp.concatenate([stored[name] for name in parts], axis=-1)


RULES = {
    ops.Conv: _conv,
    ops.Requantize: _requantize,
    ops.Add: _add,
    ops.MaxPool: _max_pool,
    ops.MeanPool: _mean_pool,
    ops.Concat: _concat,
}
