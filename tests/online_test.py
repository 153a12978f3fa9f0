"""Patches made during training: what a step does, that steps raise the cross-entropy, what the network's key draws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from triqdef_jax import patches
from triqdef_jax.attacks import online
from triqdef_jax.attacks.losses import cross_entropy

JITTER = online.Jitter(rotation_deg=20.0, scale_range=(0.9, 1.1), size_px=3, image_size_px=8)
WEIGHTS = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32) * 3  # logits of order 1
MASKS = np.broadcast_to(patches.make_mask(3, 3), (4, 3, 3))


def colour_logits(weights, key, images):
    """Logits of the mean colour: every pixel of a patch has the same gradient, wherever the patch lies."""
    del key
    return images.mean(axis=(1, 2)) @ weights


def examples():
    images = np.full((4, 8, 8, 3), 0.5, np.float32)
    return images, np.array([0, 1, 2, 3], np.int32)


STEP = online.make_step(JITTER)


def ascend(key, *, num_steps, step_size=0.1):
    logits_fn = Partial(colour_logits, WEIGHTS)
    fixed = {"step": STEP, "masks": MASKS, "step_size": step_size}
    return online.ascend(key, logits_fn, *examples(), num_steps=num_steps, **fixed)


def loss_at_new_places(values):
    images, labels = examples()
    patched = patches.apply_patches(jnp.asarray(images), values, MASKS, JITTER.sample(jax.random.key(9), 4))
    return np.asarray(cross_entropy(colour_logits(WEIGHTS, None, patched), labels))


def test_steps_raise_the_cross_entropy_of_every_image_over_the_noise_they_start_from():
    start, end = (ascend(jax.random.key(0), num_steps=n) for n in (0, 8))
    assert (loss_at_new_places(end) > loss_at_new_places(start) + 0.01).all()
    assert start.shape == end.shape == (4, 3, 3, 3)
    assert 0.0 <= end.min() and end.max() <= 1.0


def test_a_step_moves_pixels_by_the_step_size_along_the_sign_of_the_gradient():
    start, end = (np.asarray(ascend(jax.random.key(0), num_steps=n, step_size=0.01)) for n in (0, 1))
    images, labels = examples()
    logits = images.mean(axis=(1, 2)) @ WEIGHTS
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    slope = (shares - np.eye(5)[labels]) @ WEIGHTS.T  # d CE / d mean colour, nearly that of the patched images
    moves = end - start
    # A pixel that the warp never samples, or at the end of the range, stays; all others move as the hand computes.
    is_moved = np.abs(moves) > 1e-6
    assert is_moved.mean() > 0.8
    expected = 0.01 * np.sign(slope)[:, None, None, :]
    inner = is_moved & (start > 0.01) & (start < 0.99)
    np.testing.assert_allclose(
        moves[inner], np.broadcast_to(expected, moves.shape)[inner], atol=1e-6
    )  # rounding near 1


def test_the_same_key_makes_the_same_patches_and_another_key_others():
    first, again, other = (np.asarray(ascend(jax.random.key(k), num_steps=2)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_each_step_gives_a_random_network_a_new_key():
    def drawn_logits(key, images):
        # One of two opposite networks: the loss of label 0 falls or rises with every pixel.
        sign = jnp.where(jax.random.bernoulli(key), 1.0, -1.0)
        brightness = sign * images.mean(axis=(1, 2, 3))
        return jnp.stack([brightness, -brightness], axis=1)

    images, _ = examples()
    labels = np.zeros(4, np.int32)
    fixed = {"step": STEP, "masks": MASKS, "step_size": 0.001}
    logits_fn = Partial(drawn_logits)
    values = [online.ascend(jax.random.key(0), logits_fn, images, labels, num_steps=n, **fixed) for n in range(7)]
    moves = [float(np.sum(after - before)) for before, after in itertools.pairwise(values)]
    assert min(moves) < -0.05 and max(moves) > 0.05  # most of 108 pixels move by 0.001 in the same direction


def test_placements_lie_inside_the_image_and_differ_between_images():
    placements = JITTER.sample(jax.random.key(0), 16)
    reach = 3 * np.asarray(placements.scale) / 2 - 0.5
    for center in (np.asarray(placements.center_row), np.asarray(placements.center_col)):
        assert (center - reach > -1e-5).all() and (center + reach < 7 + 1e-5).all()  # float32 of numbers up to 8
        assert len(np.unique(center)) == 16
