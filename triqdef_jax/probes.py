"""What one bit-width does with given images: features, input gradient, Grad-CAM; and the patched images that are looked at.

Images are uint8 `[B, H, W, 3]` here, features float32 `[B, h, w, C]` by name, always in evaluation mode and with float32 arithmetic. One
compiled program serves all bit-widths and networks of equal shape.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from triqdef_jax import inference, loop, perceptual, quantize, train_step
from triqdef_jax.objectives.penalties import INPUT_GRADIENT


class OneBit(NamedTuple):
    """One bit-width of one network: the module, its variables and its number formats."""

    bits: int
    module: nn.Module
    variables: dict
    spec: quantize.BitSpec

    @property
    def logits_fn(self) -> jax.tree_util.Partial:
        """images float32 `[B, H, W, 3]` in [0, 1] -> logits, arrays as arguments of any jit."""
        return jax.tree_util.Partial(_logits(self.module), self.variables, self.spec)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Return the predicted classes int32 `[B]` of images uint8 `[B, H, W, 3]`."""
        return np.asarray(_predictions(self.logits_fn, images))


class Probe(NamedTuple):
    """Logits `[B, K]`; maps by name, `[B, h, w, C]`: the features, and the gradient of each image's cross-entropy."""

    logits: jax.Array
    maps: dict[str, jax.Array]


class Cam(NamedTuple):
    """Grad-CAM of a batch: heat float32 `[B, h, w]` in [0, 1] at the layer's size, explained classes int32 `[B]`."""

    heat: jax.Array
    classes: jax.Array


def one_bit(trained, bits: int) -> OneBit:
    """Return one trained bit-width of a `runs.Trained`."""
    return OneBit(bits, trained.network.module, trained.variables(bits), trained.spec(bits))


def first_test_images(data, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (images uint8 `[N, H, W, 3]`, labels int32 `[N]`) of the first `num` test images (0: all)."""
    images, labels, found = [], [], 0
    for batch in data.eval_batches("test", 256):
        is_real = batch["mask"] > 0
        images.append(batch["images"][is_real])
        labels.append(batch["labels"][is_real])
        found += len(labels[-1])
        if num and found >= num:
            break
    return np.concatenate(images)[: num or None], np.concatenate(labels)[: num or None]


def probe(network: OneBit, images: np.ndarray, labels: np.ndarray) -> Probe:
    """Run one forward and one backward pass; the gradient of an image does not depend on the rest of the batch."""
    return _probe(network.module)(network.variables, network.spec, images, labels)


@functools.cache
def _probe(module):
    def run(variables, spec, images, labels):
        def loss(images):
            logits, features = module.apply(variables, images, spec, "eval")
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum(), (logits, features)

        gradient, (logits, features) = jax.grad(loss, has_aux=True)(loop.unit_range(images))
        return Probe(logits, {**features, INPUT_GRADIENT: gradient})

    return train_step.jit(run)


@functools.cache
def _logits(module):
    return lambda variables, spec, images: module.apply(variables, images, spec, "eval")[0]


@jax.jit
def _predictions(logits_fn, images):
    return logits_fn(loop.unit_range(images)).argmax(axis=-1).astype(jnp.int32)


def grad_cam(network: OneBit, images: np.ndarray, *, layer: str) -> Cam:
    """Return where a layer's features speak for the predicted class, ``relu(sum_k a_k A_k)``, ``a_k = mean_ij dy / dA_k,ij``.

    Args:
      images: uint8 `[B, H, W, 3]`. layer: a name among the network's features, usually the last stage.

    Returns:
      `Cam`, each map divided by its own maximum; all zero where nothing speaks for the class.

    Raises:
      ValueError: the network has no such layer.

    Gradient: of the logit before the softmax, to the layer's quantized output, straight through the quantizers behind it.

    Reference: Selvaraju et al., Grad-CAM, ICCV 2017, equations 1 and 2.
    """
    return _grad_cam(network.module, layer)(network.variables, network.spec, images)


@functools.cache
def _grad_cam(module, layer):
    def run(variables, spec, images):
        apply = lambda images: module.apply(variables, images, spec, "eval")
        images = loop.unit_range(images)

        def score(change):
            logits, features = apply_with_change(apply, images, layer, change)
            classes = logits.argmax(axis=-1).astype(jnp.int32)
            return jnp.take_along_axis(logits, classes[:, None], axis=-1).sum(), (features[layer], classes)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _feature_shape(apply, images, layer))
        gradient, (features, classes) = jax.grad(score, has_aux=True)(zeros)
        return Cam(cam_heat(features, gradient), classes)

    return train_step.jit(run)


def cam_heat(features: jax.Array, gradient: jax.Array) -> jax.Array:
    """Return Grad-CAM's map, float32 `[B, h, w]` with a peak of 1, of features and the score's gradient, both `[B, h, w, C]`."""
    weights = gradient.mean(axis=(1, 2), keepdims=True)
    return perceptual.normalize_peak(nn.relu((weights * features).sum(axis=-1)))


def apply_with_change(apply: Callable, images: jax.Array, layer: str, change: jax.Array) -> tuple[jax.Array, dict]:
    """Return (logits, features) of a flax network with `change` added to one layer's output before anything reads it.

    The submodule that computes the layer is found as the one whose output is the feature map itself, so no network has to offer a tap.

    Args:
      apply: images -> (logits, features by name). change: float32 of the layer's shape; zeros leave the network as it is.

    Raises:
      ValueError: no submodule's output is that feature map, for example because the network pools it afterwards.
    """
    path = _path_of(apply, images, layer)

    def add(next_function, args, kwargs, context):
        output = next_function(*args, **kwargs)
        if context.module.path != path or context.method_name != "__call__":
            return output
        return jax.tree.map(lambda leaf: leaf + change if leaf.shape == change.shape else leaf, output)

    with nn.intercept_methods(add):
        return apply(images)


def _path_of(apply, images, layer) -> tuple[str, ...]:
    """Return the path of the outermost submodule whose output holds the layer's feature map, by one abstract trace."""
    outputs = []

    def record(next_function, args, kwargs, context):
        output = next_function(*args, **kwargs)
        outputs.append((context.module.path, context.method_name, output))  # inner modules return first
        return output

    def trace(images):
        with nn.intercept_methods(record):
            wanted = _layer(apply(images)[1], layer)
        found.extend(
            path
            for path, method, output in outputs
            if path and method == "__call__" and any(leaf is wanted for leaf in jax.tree.leaves(output))
        )

    found: list[tuple[str, ...]] = []
    jax.eval_shape(trace, images)
    if not found:
        raise ValueError(f"layer: no submodule's output is the feature map {layer!r}; choose a stage of the network")
    return found[-1]


def _feature_shape(apply, images, layer) -> Any:
    return _layer(jax.eval_shape(apply, images)[1], layer)


def _layer(features, layer):
    if layer not in features:
        raise ValueError(f"layer: expected one of {', '.join(features)}, got {layer!r}")
    return features[layer]


def patched(pool, images: np.ndarray, config: ConfigDict) -> np.ndarray:
    """Paste patch n mod P of a pool of P into image n, at the place where evaluation pastes it into that image.

    Args:
      pool: with `values` `[P, S, S, 3]`, `masks` and `size_px`. images: uint8 `[N, H, W, 3]`, the first test images. config: seed, jitter.

    Returns:
      uint8 `[N, H, W, 3]`, on the stored pixel grid.

    Raises:
      ValueError: the pool is empty, as the held-out quarter of less than four patches is.
    """
    num_patches, num_images = len(pool.values), len(images)
    if not num_patches:
        raise ValueError("pool: expected at least one patch, got none; a pool of 4 patches or more has held-out ones")
    out = np.empty_like(images)
    for index in range(min(num_patches, num_images)):
        rows = np.resize(np.arange(index, num_images, num_patches), -(-num_images // num_patches))  # one shape for all
        out[rows] = inference.make_paste(pool._asdict(), index, config)(images[rows], rows)
    return out
