"""Patches made during training: one per image, expectation over place, jitter and bit-width, a few sign steps, nothing measured.

The patch itself is warped, so what is learned holds for any place. There is no host synchronisation and no best iterate: training
throws the patches away. `logits_fn(key, images)` may draw a bit-width from its key.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from triqdef_jax import patches
from triqdef_jax.attacks import loop
from triqdef_jax.attacks.losses import cross_entropy


class Jitter(NamedTuple):
    """How a patch may lie in an image: largest rotation in degrees, range of scales, sides in pixels of patch and image."""

    rotation_deg: float
    scale_range: tuple[float, float]
    size_px: int
    image_size_px: int

    def sample(self, key: jax.Array, num: int) -> patches.Placement:
        return patches.sample_placements(
            key,
            num,
            image_size_px=self.image_size_px,
            size_px=self.size_px,
            rotation_deg=self.rotation_deg,
            scale_range=self.scale_range,
        )


def make_step(jitter: Jitter) -> Callable:
    """Return `step(index, values, key, logits_fn, images, labels, masks, step_size)`: one ascent step on the patches' pixels.

    P <- clip(P + step_size sign(grad_P CE(f_b(A(x, P, place)), y)), 0, 1) with a fresh place, jitter and bit b per step.
    """

    def step(index, values, key, logits_fn, images, labels, masks, step_size):
        place_key, network_key = jax.random.split(jax.random.fold_in(key, index))
        placements = jitter.sample(place_key, images.shape[0])

        def objective(values):
            patched = patches.apply_patches(images, values, masks, placements)
            return cross_entropy(logits_fn(network_key, patched), labels).sum()

        return jnp.clip(values + step_size * jnp.sign(jax.grad(objective)(values)), 0.0, 1.0)

    return step


def ascend(key, logits_fn, images, labels, *, step: Callable, masks, num_steps: int, step_size: float) -> jax.Array:
    """Return patches float32 `[B, S, S, C]` after `num_steps` of `step` from uniform noise.

    Args:
      key: PRNG key. logits_fn: `jax.tree_util.Partial`, (key, images) -> logits. images: float32 `[B, H, W, C]` in [0, 1]. labels: int32 `[B]`.
      step: from `make_step`, one object for the whole run. masks: float32 `[B, S, S]`. step_size: change of a pixel per step.
    """
    start_key, run_key = jax.random.split(key)
    values = jax.random.uniform(start_key, (*masks.shape, images.shape[-1]))
    args = (run_key, logits_fn, images, labels, masks, jnp.float32(step_size))
    return loop.run_loop(step, values, args, 0, num_steps)
