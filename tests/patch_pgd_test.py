"""Tests of the image-specific attack's arithmetic, on a linear network; what it finds on real images is in attacks_test."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.tree_util import Partial
from scipy.special import log_softmax, softmax

from triqdef_jax import attacks
from triqdef_jax.attacks import loop, patch_pgd

_step, _start = jax.jit(patch_pgd.step), jax.jit(patch_pgd.start, static_argnums=2)


def _linear(params, images):
    return images.reshape(images.shape[0], -1) @ params


@pytest.fixture(scope="module")
def linear_problem():
    rng = np.random.default_rng(9)
    images = rng.uniform(size=(7, 8, 8, 1)).astype(np.float32)
    weights = rng.normal(size=(64, 4)).astype(np.float32)
    return jnp.array(images), jnp.array(rng.integers(0, 4, 7), jnp.int32), Partial(_linear, jnp.array(weights))


def test_patch_pgd_steps_match_numpy(linear_problem):
    images, labels, net = linear_problem
    weights, settings = np.asarray(net.args[0], float), attacks.PgdSettings(size_px=3, num_steps=3, step_size=0.3)
    state = _start(jax.random.key(0), images, settings)
    current, mask = np.asarray(state.images, float), np.asarray(state.mask)
    best = np.full(7, -np.inf)
    for _ in range(3):
        state = _step(state, net, labels, 0.3)
        logits = current.reshape(7, -1) @ weights
        best = np.maximum(best, -log_softmax(logits, axis=1)[np.arange(7), labels])
        gradient = (softmax(logits, axis=1) - np.eye(4)[labels]) @ weights.T
        current = np.clip(current + 0.3 * np.sign(gradient).reshape(current.shape) * mask, 0, 1)
        # Signs are exact away from zero gradients; only the float32 sums of three steps differ.
        np.testing.assert_allclose(state.images, current, atol=1e-6)
        np.testing.assert_allclose(state.best_loss, best, rtol=1e-4)


def test_patch_pgd_equals_its_unrolled_form_and_its_rolled_form(linear_problem, monkeypatch):
    images, labels, net = linear_problem
    settings = attacks.PgdSettings(size_px=3, num_steps=3)
    _, info = patch_pgd.attack(jax.random.key(1), net, images, labels, settings)
    state = jax.jit(patch_pgd.unrolled, static_argnums=4)(jax.random.key(1), net, images, labels, settings)
    monkeypatch.setattr(loop, "is_rolled", lambda: True)
    _, rolled = patch_pgd.attack(jax.random.key(1), net, images, labels, settings)
    for other in (state.best_images, rolled["images"]):
        np.testing.assert_allclose(other, info["images"], atol=1e-6)  # sums in another order
    np.testing.assert_allclose(state.best_loss, info["loss"], rtol=1e-5)


def test_best_loss_never_falls_however_large_the_step(linear_problem):
    images, labels, net = linear_problem
    state = _start(jax.random.key(3), images, attacks.PgdSettings(size_px=3, num_steps=3, step_size=0.3))
    for _ in range(4):
        before = state.best_loss
        state = _step(state, net, labels, -1.0)  # descends: every iterate after the first is worse
        assert np.all(state.best_loss >= before)
    assert np.any(np.asarray(state.best_images) != np.asarray(state.images))


def test_random_patches_leave_the_central_box_alone():
    settings = attacks.PgdSettings(size_px=8, exclude_center_px=10)
    corners = patch_pgd.valid_corners((32, 32), settings)
    used = np.zeros((32, 32), int)
    for row, col in corners:
        used[row : row + 8, col : col + 8] += 1
    assert not used[11:21, 11:21].any()  # rows and columns 11 to 20, as Rao et al. have it
    assert (np.delete(np.delete(used, slice(11, 21), 0), slice(11, 21), 1) > 0).all()
    assert len(corners) == 25**2 - 17**2  # 17 of 25 corners per axis overlap the box
    fixed = dataclasses.replace(settings, location="fixed")
    assert patch_pgd.valid_corners((32, 32), fixed).tolist() == [[3, 3]]
