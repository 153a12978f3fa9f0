"""Quantized DenseNet-121: ImageNet (224 px) and CIFAR shape (32 px, a 3x3 stem without pooling).

Number formats (`quantize.BitSpec` has the ranges): whatever a block concatenates is stored once with 8 bits and its own scale: the stem's
output after its ReLU as the unsigned 'stream', what a layer or a transition adds, which no ReLU follows, as a signed 'branch'. Nothing that is
stored is ever quantized again to fit its neighbours. A layer reads norm and ReLU of all that is stored, quantized to the network's own bits
for that layer alone; the norm is per channel, so each stored tensor goes through its own part of it (`layers.as_accumulator`), all parts
come out with one scale, and concatenating those codes is a copy. The last norm is read in the classifier's format.
Reference: Huang et al., Densely Connected Convolutional Networks, CVPR 2017 (DenseNet-BC, growth 32, compression 1/2). Deviations: the CIFAR
shape keeps the four blocks, and the stem's norm and ReLU, which the paper's three-block CIFAR networks do not have; a transition averages
before its 1x1 convolution, the same function at a quarter of the products; feature maps are the stored codes, which no ReLU follows.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from triqdef_jax import quantize
from triqdef_jax.models.layers import (
    IMAGENET_STEM_STRIDE,
    BitNorm,
    Coded,
    ConvNorm,
    LayerOptions,
    QuantAct,
    QuantConv,
    QuantDense,
    as_accumulator,
    check_mode,
    code_images,
    concatenate,
    conv_stem,
)

BOTTLENECK = 4  # Filters of a layer's 1x1 convolution over those that it adds.


@dataclasses.dataclass(frozen=True)
class DenseNetPlan:
    """Shape of one network: layers per block, filters of the stem (a layer adds half as many), kind of stem."""

    stage_layers: tuple[int, ...]
    width: int = 64
    is_imagenet: bool = False

    @property
    def growth(self) -> int:
        """Channels that a layer adds."""
        return max(1, self.width // 2)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the feature maps, the stem first."""
        return ("stem", *(f"stage{stage + 1}" for stage in range(len(self.stage_layers))))

    def map_side_px(self, name: str, image_size_px: int) -> int:
        """Return the side of the named feature map for square images."""
        side = -(-image_size_px // (IMAGENET_STEM_STRIDE if self.is_imagenet else 1))
        return side // 2 ** max(0, self.stages.index(name) - 1)


PLANS: Mapping[str, DenseNetPlan] = {
    "densenet121": DenseNetPlan((6, 12, 24, 16), is_imagenet=True),
    "densenet121_cifar": DenseNetPlan((6, 12, 24, 16)),
}


class NormRead(nn.Module):
    """Norm, ReLU and quantizer in front of a convolution or of the classifier's mean: codes of one scale from channels of many."""

    options: LayerOptions
    kind: str

    @nn.compact
    def __call__(self, stored: Coded, spec: quantize.BitSpec, mode: str) -> Coded:
        values = BitNorm(self.options.norm_group, name="norm")(as_accumulator(stored), spec, mode)
        return QuantAct(self.options, self.kind, name="act")(nn.relu(values), spec, mode)


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 convolution, norm, ReLU, 3x3 convolution: returns the `growth` channels that the layer adds, stored."""

    options: LayerOptions
    growth: int

    @nn.compact
    def __call__(self, stored: Coded, spec: quantize.BitSpec, mode: str) -> Coded:
        hidden = NormRead(self.options, "act", name="read")(stored, spec, mode)
        values = ConvNorm(self.options, BOTTLENECK * self.growth, 1, name="conv1")(hidden, spec, mode)
        hidden = QuantAct(self.options, "act", name="act1")(nn.relu(values), spec, mode)
        added = QuantConv(self.options, self.growth, name="conv2")(hidden, spec, mode)
        return QuantAct(self.options, "branch", name="branch")(added.values, spec, mode)


class Transition(nn.Module):
    """Norm, ReLU, mean over 2 x 2 positions, 1x1 convolution to half the channels: the first tensor stored for the next block."""

    options: LayerOptions

    @nn.compact
    def __call__(self, stored: Coded, spec: quantize.BitSpec, mode: str) -> Coded:
        hidden = mean_pool(NormRead(self.options, "act", name="read")(stored, spec, mode))
        num_filters = stored.values.shape[-1] // 2
        values = QuantConv(self.options, num_filters, 1, name="conv")(hidden, spec, mode).values
        return QuantAct(self.options, "branch", name="branch")(values, spec, mode)


class DenseNet(nn.Module):
    """Densely connected network over images float32 `[B, H, W, 3]` in [0, 1].

    Returns (logits float32 `[B, K]`, features: dict from 'stem', 'stage1', ... to all that is stored `[B, h, w, C]` after that block).

    Raises:
      ValueError: images too small for the last transition.
    """

    plan: DenseNetPlan
    num_classes: int
    options: LayerOptions

    @nn.compact
    def __call__(self, images: jax.Array, spec: quantize.BitSpec, mode: str) -> tuple[jax.Array, dict[str, jax.Array]]:
        check_mode(mode)
        stored = conv_stem(
            self.options, self.plan.width, code_images(images, spec), spec, mode, is_imagenet=self.plan.is_imagenet
        )
        features = {"stem": stored.values}
        for stage, num_layers in enumerate(self.plan.stage_layers, start=1):
            if stage > 1:
                stored = Transition(self.options, name=f"transition{stage - 1}")(stored, spec, mode)
            for index in range(1, num_layers + 1):
                layer = DenseLayer(self.options, self.plan.growth, name=f"stage{stage}_layer{index}")
                stored = concatenate([stored, layer(stored, spec, mode)])
            features[f"stage{stage}"] = stored.values
        read = NormRead(self.options, "edge_act", name="last")(stored, spec, mode)
        pooled = QuantAct(self.options, "edge_act", name="pool")(jnp.mean(read.values, axis=(1, 2)), spec, mode)
        return QuantDense(self.options, self.num_classes, name="classifier")(pooled, spec, mode), features


def mean_pool(coded: Coded) -> Coded:
    """Halve the sides by the mean over 2 x 2 positions; an odd last row or column is left out, as published.

    Nothing is rounded: the mean's codes are sums of four, its scale a quarter. With the 1x1 convolution that reads it, it is one 2x2
    convolution of stride 2 whose four taps have the same weight codes.

    Raises:
      ValueError: a map without two positions on a side.
    """
    if min(coded.values.shape[1:3]) < 2:
        raise ValueError(
            f"a transition halves maps of at least 2 x 2 px, got {coded.values.shape[1:3]}; show larger images or use fewer blocks"
        )
    return Coded(nn.avg_pool(coded.values, (2, 2), (2, 2)), coded.scale / 4)
