"""Image-specific untargeted patches by projected gradient descent, as patch adversarial training makes them.

The patch is never warped here, so the attack works on the patched images themselves: a state holds images and the mask
of the pixels that may change. `attack` runs to the end from the host; `start`, `step` and `settle` are its pieces for a
step that lives inside another program; `unrolled` is the whole of it for a few steps inside one jit.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from triqdef_jax.attacks import loop
from triqdef_jax.attacks.losses import cross_entropy
from triqdef_jax.attacks.settings import Patch, check_positive
from triqdef_jax.patches import Placement

LOCATIONS = ("random", "fixed")


@dataclass(frozen=True, kw_only=True)
class PgdSettings:
    """Settings of the image-specific attack; the defaults are those Rao et al. train with.

    Attributes:
      size_px: side of the square patch in pixels.
      num_steps: gradient steps.
      step_size: pixel value per step, in units of the range [0, 1].
      location: 'random' (drawn per image) or 'fixed' (at `corner_px`).
      corner_px: upper left corner (row, col) of a fixed patch.
      exclude_center_px: side of the central box that random patches do not overlap, 0 for none. Rao et al. take 10 of
        32 px.
      num_restarts: independent starts and places per image in `attack`; the one with the highest loss is kept.
    """

    size_px: int
    num_steps: int = 25
    step_size: float = 0.1
    location: str = "random"
    corner_px: tuple[int, int] = (3, 3)
    exclude_center_px: int = 0
    num_restarts: int = 1

    def __post_init__(self):
        for name in ("size_px", "num_steps", "step_size", "num_restarts"):
            check_positive(name, getattr(self, name))
        if self.location not in LOCATIONS:
            raise ValueError(f"location: expected one of {LOCATIONS}, got {self.location!r}")
        if self.exclude_center_px < 0:
            raise ValueError(f"exclude_center_px: expected 0 or more, got {self.exclude_center_px}")


class PgdState(NamedTuple):
    """The attack between two steps.

    Attributes:
      images: float32 [B, H, W, C] in [0, 1], the current iterate.
      best_images: like `images`, the iterate with the highest loss of those measured.
      best_loss: float32 [B], its cross-entropy; -inf before the first step.
      mask: float32 [B, H, W, 1] in {0, 1}, pixels of the patch.
      corner: int32 [B, 2], upper left corner of the patch.
    """

    images: jax.Array
    best_images: jax.Array
    best_loss: jax.Array
    mask: jax.Array
    corner: jax.Array


def start(key: jax.Array, images: jax.Array, settings: PgdSettings) -> PgdState:
    """Choose a place per image and fill it with uniform noise.

    Args:
      key: PRNG key.
      images: float32 [B, H, W, C] in [0, 1].
      settings: `PgdSettings`.

    Returns:
      `PgdState`.

    Raises:
      ValueError: for images of another rank or type, or when no place is left for the patch.
    """
    if images.ndim != 4 or images.dtype != jnp.float32:
        raise ValueError(f"images: expected float32 [B, H, W, C] in [0, 1], got {images.dtype} {images.shape}")
    corner_key, noise_key = jax.random.split(key)
    corners = jnp.asarray(valid_corners(images.shape[1:3], settings))
    corner = corners[jax.random.randint(corner_key, images.shape[:1], 0, corners.shape[0])]
    mask = _mask(corner, images.shape[1:3], settings.size_px)
    images = jnp.where(mask > 0, jax.random.uniform(noise_key, images.shape), images)
    # A copy: the same buffer twice in one state could not be donated.
    return PgdState(images, jnp.copy(images), jnp.full(images.shape[:1], -jnp.inf), mask, corner)


def step(state: PgdState, logits_fn: Callable, labels: jax.Array, step_size: float | jax.Array) -> PgdState:
    """Measure the iterate, keep it where it is the best so far, and move on.

    ``P <- clip(P + step_size * sign(grad_P CE(f(x), y)), 0, 1)``

    Args:
      state: `PgdState`.
      logits_fn: ``images [B, H, W, C] -> logits [B, K]``, in inference mode: logits depend on their own image alone.
      labels: int32 [B].
      step_size: pixel value per step.

    Returns:
      `PgdState`.

    Gradient: the sign has none; states are meant as data, not to be differentiated through.
    """

    def objective(images):
        loss = cross_entropy(logits_fn(images), labels)
        return loss.sum(), loss  # the sum's gradient is each image's own

    gradient, loss = jax.grad(objective, has_aux=True)(state.images)
    state = _keep_best(state, loss)
    return state._replace(images=jnp.clip(state.images + step_size * jnp.sign(gradient) * state.mask, 0.0, 1.0))


def settle(state: PgdState, logits_fn: Callable, labels: jax.Array) -> PgdState:
    """Measure the last iterate too; afterwards `best_images` and `best_loss` cover all of them. One forward pass."""
    return _keep_best(state, cross_entropy(logits_fn(state.images), labels))


def unrolled(
    key: jax.Array, logits_fn: Callable, images: jax.Array, labels: jax.Array, settings: PgdSettings
) -> PgdState:
    """Run the attack inside the caller's jit as a Python loop; restarts are not made.

    The program grows with `num_steps`: use it up to about five, and drive `step` from the host beyond. Equal to
    `attack` with one restart up to rounding, given the same key.

    Args, Raises: as `attack`.

    Returns:
      `PgdState`, settled.
    """
    state = start(key, images, settings)
    for _ in range(settings.num_steps):
        state = step(state, logits_fn, labels, settings.step_size)
    return settle(state, logits_fn, labels)


def attack(
    key: jax.Array, logits_fn: Callable, images: jax.Array, labels: jax.Array, settings: PgdSettings
) -> tuple[Patch, dict]:
    """Find for each image the patch that raises its cross-entropy most.

    Args:
      key: PRNG key; with more than one restart, restart r runs with fold_in(key, r).
      logits_fn: as in `step`; give ``jax.tree_util.Partial(fn, params)`` to have the step compiled once for all params.
      images: float32 [B, H, W, C] in [0, 1].
      labels: int32 [B].
      settings: `PgdSettings`.

    Returns:
      `Patch` with one patch per image (P = B, S = size_px, target -1; not rounded to the uint8 grid), and a dict:
      `images` [B, H, W, C] with the patch on, `loss` [B], `placements` ([B] each), `clean_predictions`, `predictions`,
      `success` (wrong with the patch), all [B], and `seed`, the key's words.

    Raises:
      ValueError: for arrays of wrong shape or type, or when no place is left for the patch.

    Reference: Rao, Stutz, Schiele, Adversarial Training against Location-Optimized Adversarial Patches, 2020, without
    its search over places (AT-Rand; 'fixed' is AT-Fixed). They evaluate with 100 steps of 0.05 and 30 restarts. The
    iterate kept is the one with the highest cross-entropy.
    """
    logits_fn = loop.as_partial(logits_fn)
    if labels.shape != images.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels: expected int32 {images.shape[:1]}, got {labels.dtype} {labels.shape}")
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    best = None
    for restart in range(settings.num_restarts):
        run_key = key if settings.num_restarts == 1 else jax.random.fold_in(key, restart)
        state = ascend(run_key, logits_fn, images, labels, settings)
        best = state if best is None else _better(best, state)
    return _report(key, best, logits_fn, images, labels, settings)


def ascend(
    key: jax.Array, logits_fn: Callable, images: jax.Array, labels: jax.Array, settings: PgdSettings
) -> PgdState:
    """Run one restart of `attack` and return its settled state without waiting for the device, as training needs it.

    Args: as `attack`, `logits_fn` a ``jax.tree_util.Partial``. Returns: `PgdState`; `best_images` carry the patches.
    """
    state = _jit_start(key, images, settings)
    args = (logits_fn, labels, jnp.float32(settings.step_size))
    state = loop.run_loop(_loop_step, state, args, 0, settings.num_steps)
    return _jit_settle(state, logits_fn, labels)


@functools.lru_cache(maxsize=32)
def valid_corners(image_shape: tuple[int, int], settings: PgdSettings) -> np.ndarray:
    """List the upper left corners a patch may have.

    Args:
      image_shape: (H, W) in pixels.
      settings: `PgdSettings`; a fixed location is a list of one.

    Returns:
      int32 [L, 2], L > 0.

    Raises:
      ValueError: when the list is empty.
    """
    size, box = settings.size_px, settings.exclude_center_px
    shape = np.array(image_shape)
    if settings.location == "fixed":
        corners = np.array([settings.corner_px])
        corners = corners[((corners >= 0) & (corners + size <= shape)).all(axis=1)]
    else:
        corners = np.stack(np.meshgrid(*(np.arange(side - size + 1) for side in shape), indexing="ij"), -1)
        corners = corners.reshape(-1, 2)
        low = (shape - box) // 2
        overlaps = ((corners < low + box) & (corners + size > low)).all(axis=1)
        corners = corners[~overlaps] if box else corners
    if not len(corners):
        raise ValueError(f"settings: a {size} px patch has no place on {image_shape} px images with {settings}")
    return corners.astype(np.int32)


def _mask(corner, image_shape, size_px):
    """Return float32 [B, H, W, 1], 1 inside the square at each corner."""
    axes = []
    for axis, side in enumerate(image_shape):
        offset = jnp.arange(side)[None, :] - corner[:, axis, None]
        axes.append((offset >= 0) & (offset < size_px))
    return (axes[0][:, :, None] & axes[1][:, None, :])[..., None].astype(jnp.float32)


def _keep_best(state, loss):
    """Keep the current iterate where its loss exceeds the best; a nan never does."""
    is_better = loss > state.best_loss
    images = jnp.where(is_better[:, None, None, None], state.images, state.best_images)
    return state._replace(best_images=images, best_loss=jnp.where(is_better, loss, state.best_loss))


def _better(first, second):
    """Return, image by image, the state with the higher best loss."""
    is_better = second.best_loss > first.best_loss

    def choose(a, b):
        return jnp.where(is_better.reshape(-1, *[1] * (a.ndim - 1)), b, a)

    return jax.tree.map(choose, first, second)


def _loop_step(index, state, logits_fn, labels, step_size):
    del index
    return step(state, logits_fn, labels, step_size)


_jit_start = jax.jit(start, static_argnums=2)
_jit_settle = jax.jit(settle)


@jax.jit
def _predict(logits_fn, images):
    return logits_fn(images).argmax(axis=-1)


def _report(key, state, logits_fn, images, labels, settings):
    """Cut the patches out of the images and write down what happened."""
    size, batch = settings.size_px, images.shape[0]

    def cut(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), (size, size, image.shape[-1]))

    values = jax.vmap(cut)(state.best_images, state.corner)
    patch = Patch(values, jnp.ones((batch, size, size)), jnp.full(batch, size), jnp.full(batch, -1))
    center = state.corner + (size - 1) / 2
    predictions = np.asarray(_predict(logits_fn, state.best_images))
    info = dict(
        images=state.best_images,
        loss=np.asarray(state.best_loss),
        placements=Placement(center[:, 0], center[:, 1], jnp.zeros(batch), jnp.ones(batch)),
        clean_predictions=np.asarray(_predict(logits_fn, images)),
        predictions=predictions,
        success=predictions != np.asarray(labels),
        seed=np.asarray(jax.random.key_data(key)),
    )
    return patch, info
