"""Quantized layers in flax.linen: activation quantizer, convolution, norm, classifier. One call computes one bit-width.

Variables live in four collections. `params`: weights and biases, shared by all bit-widths. `affine`: gain and bias of norms. `scales`:
learned quantizer scales. `stats`: running statistics. The last three hold one bit-width's slice here; `multibit.py` stacks them.
A tensor between layers is a `Coded`: real float32 values together with the scale of their integer codes, so that every layer
knows the grid its accumulator lives on.

Modes: 'train' normalises by the batch and reports its moments in the collection `moments`; 'eval' uses running statistics;
'calibrate' sets scales and statistics from the images at hand, layer by layer in forward order.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from triqdef_jax import quantize
from triqdef_jax.models.convolution import conv2d, depthwise_conv2d

MODES = ("train", "eval", "calibrate")
NORM_EPSILON = 1e-5
IMAGENET_STEM_STRIDE = 4  # Of `conv_stem`: a stride-2 convolution, then a stride-2 maximum pool.
MAX_INTEGER_BIAS = (
    2.0**22
)  # Keeps accumulator + bias exact in float32 (DEPLOY: |acc| + |bias| < 2**24) when a norm gain is near 0.


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """What every layer of one network shares.

    Attributes:
      scale: 'learned' (trained step sizes) or 'observed' (weights: channel maximum; activations: running maximum).
      dtype: type of the operands of convolutions over channels and of the classifier, 'float32' or 'bfloat16'; everything else is float32.
      estimator: derivative of the rounding of weights and activations, a key of `quantize.ESTIMATORS`; training uses 'clipped'. The
        input's own rounding stays 'clipped': all pixel values lie inside its range, on its grid.
      norm_group: norms take the statistics of so many consecutive images in training; 0 means of the whole batch.
    """

    scale: str = "learned"
    dtype: str = "float32"
    estimator: str = "clipped"
    norm_group: int = 0


class Coded(NamedTuple):
    """Values float32 `[B, ...]` and the scale that turns them into integer codes: a scalar, or `[D]` where channels differ.

    Channels differ in an accumulator, whose step goes with the weights' scale, and in tensors joined by `concatenate`.
    """

    values: jax.Array
    scale: jax.Array


def check_mode(mode: str) -> None:
    """Raise ValueError for a mode that no layer has; the message lists the known ones."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")


def code_images(images: jax.Array, spec: quantize.BitSpec) -> Coded:
    """Normalise images float32 `[B, H, W, C]` in [0, 1] to (255 x - 128) / 64 and round them to the pixel grid below 32 bits.

    Gradient: straight through for all 256 pixel values, black and white included.
    """
    scale = jnp.float32(quantize.INPUT_SCALE)
    values = (255.0 * images - 128.0) * scale
    return Coded(quantize.fake_quant_unless(spec.is_float, values, scale, quantize.input_range()), scale)


def concatenate(tensors: Sequence[Coded]) -> Coded:
    """Join tensors `[B, h, w, C_i]` along channels; every channel keeps its codes and its scale, so nothing is quantized anew."""
    scales = [jnp.broadcast_to(tensor.scale, tensor.values.shape[-1:]) for tensor in tensors]
    return Coded(jnp.concatenate([tensor.values for tensor in tensors], axis=-1), jnp.concatenate(scales))


class QuantAct(nn.Module):
    """Activation quantizer with one scale per tensor; `kind` names its range in `BitSpec`."""

    options: LayerOptions
    kind: str

    @nn.compact
    def __call__(self, values: jax.Array, spec: quantize.BitSpec, mode: str) -> Coded:
        code_range = getattr(spec, self.kind)
        if self.options.scale == "learned":
            scale = self._learned(values, code_range.upper, mode)
        else:
            scale = self._observed(values, code_range.upper, mode)
        estimator = self.options.estimator
        quantized = quantize.fake_quant_unless(spec.is_float, values, scale, code_range, estimator=estimator)
        return Coded(quantized, jnp.maximum(scale, quantize.MIN_SCALE))

    def _learned(self, values, upper, mode):
        variable = self.variable("scales", "scale", lambda: jnp.float32(1.0))
        if mode == "calibrate":
            variable.value = quantize.learned_scale_start(values, upper)
        return variable.value

    def _observed(self, values, upper, mode):
        variable = self.variable("stats", "largest", lambda: jnp.float32(1.0))
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(values)))
        if mode == "calibrate":
            variable.value = largest
        elif mode == "train":
            _report(self, "largest", largest)
        return quantize.observed_scale(variable.value, upper)


class QuantConv(nn.Module):
    """Convolution without bias, weights signed with one scale per output channel; returns the accumulator.

    `is_edge` selects the range of the first convolution; `is_depthwise` gives every channel its own filter (`num_filters` is then their
    number). The scale returned with the accumulator, `[D]`, is the step of the deployed integer accumulator: input scale x weight scale /
    container factor.
    """

    options: LayerOptions
    num_filters: int
    size: int = 3
    stride: int = 1
    is_edge: bool = False
    is_depthwise: bool = False

    @nn.compact
    def __call__(self, inputs: Coded, spec: quantize.BitSpec, mode: str) -> Coded:
        num_read = 1 if self.is_depthwise else inputs.values.shape[-1]
        shape = (self.size, self.size, num_read, self.num_filters)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        code_range, container = _weight_range(spec, self.is_edge)
        quantized, scale = quantize_weights(self, kernel, spec, code_range, mode, axes=(0, 1, 2))
        if self.is_depthwise:
            values = depthwise_conv2d(inputs.values, quantized, stride=self.stride)
        else:
            values = conv2d(inputs.values, quantized, stride=self.stride, dtype=jnp.dtype(self.options.dtype))
        return Coded(values, inputs.scale * scale.reshape(-1) / container)


class QuantDense(nn.Module):
    """Classifier `[B, C] -> [B, K]`: edge weights with one scale for all, so that integer logits of one image compare."""

    options: LayerOptions
    num_classes: int

    @nn.compact
    def __call__(self, inputs: Coded, spec: quantize.BitSpec, mode: str) -> jax.Array:
        shape = (inputs.values.shape[-1], self.num_classes)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        quantized, scale = quantize_weights(self, kernel, spec, spec.edge_weight, mode, axes=(0, 1))
        dtype = jnp.dtype(self.options.dtype)
        sums = jnp.promote_types(dtype, jnp.float32)
        logits = jnp.dot(inputs.values.astype(dtype), quantized.astype(dtype), preferred_element_type=sums)
        return logits + on_accumulator_grid(bias, inputs.scale * scale.reshape(()) / spec.edge_container, spec)


class BitNorm(nn.Module):
    """Batch normalisation behind an accumulator: y = gain x + bias, the bias rounded to the accumulator's grid on request.

    Statistics in training are those of the whole batch (all devices), or of `group` consecutive images, and gradients flow through them. Groups
    that lie on one device need nothing from the others, whatever their number.

    Attributes:
      group: 0 for the whole batch, else a divisor of it.
    """

    group: int = 0

    @nn.compact
    def __call__(self, inputs: Coded, spec: quantize.BitSpec, mode: str) -> jax.Array:
        features = inputs.values.shape[-1]
        gamma = self.variable("affine", "gamma", lambda: jnp.ones(features, jnp.float32))
        beta = self.variable("affine", "beta", lambda: jnp.zeros(features, jnp.float32))
        mean, variance = self._statistics(inputs.values, mode)  # [D], or of each image's group [B, 1, 1, D]
        gain = gamma.value * jax.lax.rsqrt(variance + NORM_EPSILON)
        bias = beta.value - mean * gain
        return inputs.values * gain + on_accumulator_grid(bias, inputs.scale * jnp.abs(gain), spec)

    def _statistics(self, values, mode):
        features = values.shape[-1]
        running_mean = self.variable("stats", "mean", lambda: jnp.zeros(features, jnp.float32))
        running_var = self.variable("stats", "var", lambda: jnp.ones(features, jnp.float32))
        if mode == "eval":
            return running_mean.value, running_var.value
        if mode == "calibrate":
            running_mean.value, running_var.value = batch_moments(values)
            return running_mean.value, running_var.value
        if self.group in (0, len(values)):
            mean, variance = whole_mean, whole_variance = batch_moments(values)
        else:
            mean, variance = group_moments(values, self.group)
            whole_mean = jnp.mean(mean, axis=(0, 1, 2))
            whole_variance = jnp.mean(variance + jnp.square(mean - whole_mean), axis=(0, 1, 2))
        _report(self, "mean", jax.lax.stop_gradient(whole_mean))
        _report(self, "var", jax.lax.stop_gradient(whole_variance))
        return mean, variance


class ConvNorm(nn.Module):
    """Convolution and norm: real values before any activation function."""

    options: LayerOptions
    num_filters: int
    size: int = 3
    stride: int = 1
    is_edge: bool = False
    is_depthwise: bool = False

    @nn.compact
    def __call__(self, inputs: Coded, spec: quantize.BitSpec, mode: str) -> jax.Array:
        conv = QuantConv(
            self.options, self.num_filters, self.size, self.stride, self.is_edge, self.is_depthwise, name="conv"
        )
        return BitNorm(self.options.norm_group, name="norm")(conv(inputs, spec, mode), spec, mode)


def as_accumulator(stored: Coded) -> Coded:
    """Return stored codes as the accumulator that a norm in front of a convolution stands behind: same values, a finer scale.

    An integer runtime computes such a norm as a 1 x 1 depthwise convolution whose weight codes are the norm gain's sign times 64, the
    container of a 2-bit one. Its accumulator is 64 times the code, so `BitNorm` rounds its bias to 1/64 of the code's own step times the
    gain; on the step itself a bias would be off by up to half an 8-bit code. Multiplier, bias and requantization then are those of any
    other convolution, one channel at a time, whatever scales the channels have.
    """
    return Coded(stored.values, stored.scale / quantize.container_factor(quantize.MIN_BITS))


def conv_stem(
    options: LayerOptions, width: int, images: Coded, spec: quantize.BitSpec, mode: str, *, is_imagenet: bool
) -> Coded:
    """Begin an unsigned stream, inside the caller's `nn.compact`: convolution, norm, ReLU; of ImageNet 7x7 with stride 2 and a maximum pool."""
    size, stride = (7, 2) if is_imagenet else (3, 1)
    values = ConvNorm(options, width, size, stride, is_edge=True, name="stem")(images, spec, mode)
    stream = QuantAct(options, "stream", name="stem_stream")(nn.relu(values), spec, mode)
    if not is_imagenet:
        return stream
    pooled = nn.max_pool(stream.values, (3, 3), (2, 2), ((1, 1), (1, 1)))  # commutes with quantization
    return Coded(pooled, stream.scale)


def read_stream(stream: Coded, read: Coded, spec: quantize.BitSpec) -> Coded:
    """Return what convolutions read: the stream itself where it has the network's bits (or at 32 bits), else its quantized copy."""
    return jax.tree.map(lambda own, copy: jnp.where(spec.reads_stream, own, copy), stream, read)


@jax.custom_vjp
def batch_moments(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (mean, variance), each float32 `[D]`, of values float32 `[B, h, w, D]` over all but the last axis.

    Gradient: exact, any number of times in reverse mode. Its rule keeps the values alone and leaves out the variance's path through the
    mean, which is zero because deviations sum to zero; JAX's own rule keeps two more arrays of their size and sums them over again.
    """
    mean = jnp.mean(values, axis=(0, 1, 2))
    return mean, jnp.mean(jnp.square(values - mean), axis=(0, 1, 2))


def _batch_moments_fwd(values):
    moments = batch_moments(values)  # the function itself, whose mean carries the gradient of the second derivative
    return moments, (values, moments[0])


def _batch_moments_bwd(residuals, cotangents):
    values, mean = residuals
    to_mean, to_variance = cotangents
    share = values.shape[-1] / values.size
    return ((values - mean) * (2 * share * to_variance) + share * to_mean,)


batch_moments.defvjp(_batch_moments_fwd, _batch_moments_bwd)


def group_moments(values: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    """Return (mean, variance) of the `group` consecutive images around each image, float32 `[B, 1, 1, D]`, of values `[B, h, w, D]`.

    Raises:
      ValueError: the images are no multiple of the group.
    """
    if len(values) % group:
        raise ValueError(f"model.norm_group={group} must divide the {len(values)} images of a batch")
    moments = jax.vmap(batch_moments)(values.reshape(-1, group, *values.shape[1:]))
    return tuple(jnp.repeat(moment, group, axis=0)[:, None, None] for moment in moments)


def quantize_weights(module, kernel, spec, code_range, mode, *, axes):
    """Return (fake-quantized kernel, scale); the scale keeps the dimensions of the kernel, with size 1 along `axes`."""
    if module.options.scale == "observed":
        scale = quantize.observed_scale(jnp.max(jnp.abs(kernel), axis=axes, keepdims=True), code_range.upper)
    else:
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(kernel.shape))
        variable = module.variable("scales", "weight_scale", lambda: jnp.ones(shape, jnp.float32))
        if mode == "calibrate":
            variable.value = quantize.learned_scale_start(kernel, code_range.upper, axes=axes)
        scale = variable.value
    estimator = module.options.estimator
    quantized = quantize.fake_quant_unless(spec.is_float, kernel, scale, code_range, estimator=estimator)
    return quantized, jnp.maximum(scale, quantize.MIN_SCALE)


def on_accumulator_grid(bias: jax.Array, step: jax.Array, spec: quantize.BitSpec) -> jax.Array:
    """Round a bias `[D]` to multiples of the accumulator's step `[D]` where `spec.round_bias`; straight-through gradient.

    The step is kept large enough for an integer bias of at most `MAX_INTEGER_BIAS` (a norm gain of 0 has no grid of its own).
    """
    step = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(step, jnp.abs(bias) / MAX_INTEGER_BIAS), 1e-30))
    return jnp.where(spec.round_bias, quantize.round_to_grid(bias, step), bias)


def _weight_range(spec, is_edge):
    return (spec.edge_weight, spec.edge_container) if is_edge else (spec.weight, spec.container)


def _report(module, name, value):
    """Put a batch moment into the collection `moments`, where the caller asked for it."""
    if module.is_mutable_collection("moments"):
        module.put_variable("moments", name, value)
