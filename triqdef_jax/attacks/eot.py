"""Expectation over transformation: networks that average over random views or are drawn anew at every call.

Each function takes networks and returns a network: ``(key, images) -> logits``, which attacks take with
``random_logits=True``, or, once `fixed`, ``images -> logits``. All of them are ``jax.tree_util.Partial``, so that what
they hold is an argument of compiled programs. Images are float32 [B, H, W, C] in [0, 1].

The views here are of the whole image, patch included: what a camera does after the attacker is done. Where a patch lies
and how it is turned in the image is the universal attack's own business (`PatchSettings`).

Reference: Athalye, Engstrom, Ilyas, Kwok, Synthesizing Robust Adversarial Examples, 2018.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jax.tree_util import Partial

from triqdef_jax.attacks.loop import as_partial
from triqdef_jax.attacks.settings import check_positive


class Views(NamedTuple):
    """How far views differ from the image; the defaults are the image itself.

    Attributes:
      shift_px: shifts are uniform in +- this many pixels, in each direction.
      rotation_deg: angles about the centre are uniform in +- this many degrees.
      scale_range: scales about the centre are uniform between the two.
      brightness: what is added to all pixels is uniform in +- this much; the sum is clipped to [0, 1].
    """

    shift_px: float = 0.0
    rotation_deg: float = 0.0
    scale_range: tuple[float, float] = (1.0, 1.0)
    brightness: float = 0.0


def expectation(
    logits_fn: Callable,
    *,
    num_samples: int,
    shift_px: float = 0.0,
    rotation_deg: float = 0.0,
    scale_range: tuple[float, float] = (1.0, 1.0),
    brightness: float = 0.0,
    random_logits: bool = False,
) -> Partial:
    """Average a network's log-probabilities over random views, ``mean_s log softmax f(view_s(x))``.

    All views of all images go through the network in one batch. A network that is random itself (`random_logits`) is
    drawn once per view instead, in one forward each: the program grows with `num_samples`.

    Args:
      logits_fn: ``images -> logits [B, K]``, or ``(key, images) -> logits`` with `random_logits`.
      num_samples: views per image and call, drawn independently for every image.
      shift_px, rotation_deg, scale_range, brightness: how far views differ, as in `Views`.
      random_logits: see `logits_fn`.

    Returns:
      Partial, ``(key, images) -> log-probabilities`` float32 [B, K]; an average of them need not sum to one.

    Raises:
      ValueError: for no sample, a negative range or a scale that is not positive.

    Gradient: exact for the views drawn; none where brightness leaves [0, 1].
    """
    check_positive("num_samples", num_samples)
    views = Views(shift_px, rotation_deg, tuple(scale_range), brightness)
    _check(views)
    return Partial(_averaged(num_samples, views, random_logits), as_partial(logits_fn))


def draw_bit(logits_fns: Sequence[Callable]) -> Partial:
    """Make one network out of several that answers as one of them, drawn uniformly by the key of the call.

    Bit-widths of one network, Partials of the same function, are compiled once and draw their arrays; what they share is
    not copied. Any other list is compiled branch by branch.

    Args:
      logits_fns: networks ``images -> logits [B, K]`` with one K.

    Returns:
      Partial, ``(key, images) -> logits``.

    Raises:
      ValueError: for an empty list, or, when called, for networks whose logits differ in shape.
    """
    partials = [as_partial(logits_fn) for logits_fn in logits_fns]
    if not partials:
        raise ValueError("logits_fns: expected at least one network, got none")
    leaves, trees = zip(*(jax.tree.flatten((fn.args, fn.keywords)) for fn in partials), strict=True)
    if _are_alike([fn.func for fn in partials], leaves, trees):
        is_drawn = tuple(any(leaf is not first for leaf in column) for first, *column in zip(*leaves, strict=True))
        columns = zip(is_drawn, zip(*leaves, strict=True), strict=True)
        held = [jnp.stack([jnp.asarray(x) for x in column]) if drawn else column[0] for drawn, column in columns]
        return Partial(_indexed(partials[0].func, trees[0], is_drawn, len(partials)), held)
    return Partial(_branched, partials)


def fixed(random_logits_fn: Callable, key: jax.Array) -> Partial:
    """Make a random network deterministic by one key for all calls, as query attacks need it.

    Args:
      random_logits_fn: ``(key, images) -> logits``.
      key: PRNG key.

    Returns:
      Partial, ``images -> logits``.
    """
    return Partial(_with_key, as_partial(random_logits_fn), key)


def view(key: jax.Array, images: jax.Array, views: Views) -> jax.Array:
    """Draw one view of every image: turned and scaled about its centre, shifted, brightened.

    Pixels are bilinear; what lies beyond the border repeats the border.

    Args:
      key: PRNG key.
      images: float32 [B, H, W, C] in [0, 1].
      views: `Views`.

    Returns:
      float32 [B, H, W, C] in [0, 1].
    """
    draws = jax.random.uniform(key, (5, images.shape[0]))
    low, high = views.scale_range
    if views.shift_px or views.rotation_deg or (low, high) != (1.0, 1.0):
        spread = 2.0 * draws[:3] - 1.0
        shift, angle = views.shift_px * spread[:2], jnp.deg2rad(views.rotation_deg * spread[2])
        images = jax.vmap(_warp)(images, shift[0], shift[1], angle, low + (high - low) * draws[3])
    if views.brightness:
        added = views.brightness * (2.0 * draws[4] - 1.0)
        images = jnp.clip(images + added[:, None, None, None], 0.0, 1.0)
    return images


def _warp(image, down, right, angle, scale):
    """Return one image [H, W, C] turned by `angle` (radians, counter-clockwise), scaled about its centre, and shifted."""
    center = [(side - 1) / 2 for side in image.shape[:2]]
    rows = jnp.arange(image.shape[0], dtype=jnp.float32)[:, None] - center[0] - down
    cols = jnp.arange(image.shape[1], dtype=jnp.float32)[None, :] - center[1] - right
    cos, sin = jnp.cos(angle) / scale, jnp.sin(angle) / scale
    places = [rows * cos + cols * sin + center[0], cols * cos - rows * sin + center[1]]
    sample = functools.partial(map_coordinates, coordinates=places, order=1, mode="nearest")
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)


@functools.cache
def _averaged(num_samples, views, random_logits):
    """Build the function behind `expectation`, the same object for the same arguments."""

    def average(logits_fn, key, images):
        view_key, network_key = jax.random.split(key)
        repeated = jnp.repeat(images[None], num_samples, axis=0).reshape(-1, *images.shape[1:])
        viewed = view(view_key, repeated, views)
        if not random_logits:
            log_probs = jax.nn.log_softmax(logits_fn(viewed).astype(jnp.float32))
            return log_probs.reshape(num_samples, images.shape[0], -1).mean(axis=0)
        keys = jax.random.split(network_key, num_samples)
        pairs = zip(keys, jnp.split(viewed, num_samples), strict=True)
        return sum(jax.nn.log_softmax(logits_fn(k, v).astype(jnp.float32)) for k, v in pairs) / num_samples

    return average


@functools.cache
def _indexed(func, tree, is_drawn, num_networks):
    """Build (leaves, key, images) -> logits of one function whose drawn leaves are stacked along a first axis."""

    def call(leaves, key, images):
        drawn = jax.random.randint(key, (), 0, num_networks)
        leaves = [leaf[drawn] if is_one else leaf for leaf, is_one in zip(leaves, is_drawn, strict=True)]
        args, keywords = jax.tree.unflatten(tree, leaves)
        return func(*args, images, **keywords)

    return call


def _branched(logits_fns, key, images):
    shapes = {jax.eval_shape(fn, images).shape for fn in logits_fns}
    if len(shapes) > 1:
        raise ValueError(f"logits_fns: expected networks with logits of one shape, got {sorted(shapes)}")
    drawn = jax.random.randint(key, (), 0, len(logits_fns))
    return jax.lax.switch(drawn, logits_fns, images)


def _with_key(random_logits_fn, key, images):
    return random_logits_fn(key, images)


def _are_alike(functions, leaves, trees):
    """Tell whether networks are one function of arrays that agree in structure, shapes and types."""
    signatures = {tuple((np.shape(x), jnp.result_type(x)) for x in row) for row in leaves}
    return len(set(map(id, functions))) == 1 and len(set(trees)) == 1 and len(signatures) == 1


def _check(views):
    for name in ("shift_px", "rotation_deg", "brightness"):
        if getattr(views, name) < 0.0:
            raise ValueError(f"{name}: expected 0 or more, got {getattr(views, name)}")
    if not 0.0 < views.scale_range[0] <= views.scale_range[1]:
        raise ValueError(f"scale_range: expected 0 < low <= high, got {views.scale_range}")
