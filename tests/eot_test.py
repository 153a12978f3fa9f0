"""Tests of networks that average over random views or are drawn by a key, on linear networks and hand-made images."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.tree_util import Partial
from scipy import ndimage
from scipy.special import log_softmax

from triqdef_jax import attacks
from triqdef_jax.attacks import eot, patch_pgd
from triqdef_jax.attacks.eot import Views

IMAGES = np.random.default_rng(0).uniform(size=(3, 7, 7, 2)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(4, 98, 3)).astype(np.float32)
NUM_TRACES = {"shared": 0}


def _linear(weights, images):
    return images.reshape(images.shape[0], -1) @ weights


def _shared(weights, bias, images):
    NUM_TRACES["shared"] += 1
    return _linear(weights, images) + bias


def test_a_view_without_jitter_is_the_image_itself():
    np.testing.assert_array_equal(eot.view(jax.random.key(0), jnp.array(IMAGES), Views()), IMAGES)


def test_views_are_the_affine_warps_of_scipy():
    views = Views(shift_px=2.0, rotation_deg=30.0, scale_range=(0.8, 1.3))
    seen = jax.jit(eot.view, static_argnums=2)(jax.random.key(4), jnp.array(IMAGES), views)
    draws = np.asarray(jax.random.uniform(jax.random.key(4), (5, 3)), float)
    for index, (down, right, turn, size, _) in enumerate(draws.T):
        angle, scale = np.deg2rad(30.0 * (2 * turn - 1)), 0.8 + 0.5 * size
        matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
        offset = 3.0 - matrix @ (3.0 + 2.0 * (2 * np.array([down, right]) - 1))  # the centre of 7 pixels is 3
        for channel in range(2):
            expected = ndimage.affine_transform(
                IMAGES[index, ..., channel].astype(float), matrix, offset, order=1, mode="nearest"
            )
            # Places are float32 numbers up to 10, so bilinear weights are good to 1e-6; pixels differ by up to 1.
            np.testing.assert_allclose(seen[index, ..., channel], expected, atol=1e-5)


def test_brightness_adds_one_number_per_image_and_stays_in_range():
    seen = np.asarray(eot.view(jax.random.key(1), jnp.array(IMAGES), Views(brightness=0.4)))
    assert seen.min() >= 0 and seen.max() <= 1
    for image, view in zip(IMAGES, seen, strict=True):
        added = (view - image)[(view > 0) & (view < 1)]
        assert np.ptp(added) < 1e-6 < abs(added.mean()) <= 0.4  # one float32 sum


def test_an_expectation_is_the_mean_of_log_probabilities_and_has_its_gradient():
    network = eot.expectation(Partial(_linear, WEIGHTS[0]), num_samples=4, brightness=0.1)
    key, images = jax.random.key(2), jnp.array(0.2 + 0.6 * IMAGES)  # never clipped
    view_key, _ = jax.random.split(key)
    views = eot.view(view_key, jnp.tile(images, (4, 1, 1, 1)), Views(brightness=0.1))
    log_probs = log_softmax(np.asarray(views, float).reshape(12, -1) @ WEIGHTS[0], axis=1).reshape(4, 3, 3)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: network(key, x)[0, 1]))(images)
    np.testing.assert_allclose(value, log_probs.mean(axis=0)[0, 1], rtol=1e-4)  # float32 sums of 98 products
    slope = WEIGHTS[0][:, 1] - (np.exp(log_probs[:, 0]) @ WEIGHTS[0].T).mean(axis=0)
    np.testing.assert_allclose(np.asarray(gradient)[0].ravel(), slope, atol=1e-4)
    assert not np.any(gradient[1:])


def test_every_network_is_drawn_and_bits_of_one_network_are_traced_once():
    bias = jnp.zeros(3)
    bits = [Partial(_shared, jnp.array(weights), bias) for weights in WEIGHTS]
    drawn = eot.draw_bit(bits)
    answer, images = jax.jit(lambda network, key: network(key, jnp.array(IMAGES))), IMAGES.reshape(3, -1)
    seen = {int(np.abs(images @ WEIGHTS - answer(drawn, jax.random.key(k))).max((1, 2)).argmin()) for k in range(24)}
    assert seen == {0, 1, 2, 3}
    assert NUM_TRACES["shared"] == 1
    stacked = [leaf.shape for leaf in jax.tree.leaves(drawn)]
    assert stacked == [(4, 98, 3), (3,)]  # what all bits share is not copied


def test_networks_of_different_kinds_are_drawn_too():
    networks = [Partial(_linear, jnp.array(WEIGHTS[0])), lambda images: jnp.zeros((images.shape[0], 3))]
    answer = jax.jit(lambda key: eot.draw_bit(networks)(key, jnp.array(IMAGES)))
    kinds = {bool(np.any(answer(jax.random.key(k)))) for k in range(12)}
    assert kinds == {True, False}


def test_an_expectation_over_drawn_bits_is_fixed_by_a_key_and_attacked():
    drawn = eot.draw_bit([Partial(_linear, jnp.array(weights)) for weights in WEIGHTS])
    average = eot.expectation(drawn, num_samples=3, random_logits=True)
    labels, settings = np.zeros(3, np.int32), attacks.PgdSettings(size_px=4, num_steps=5, random_logits=True)
    _, info = patch_pgd.attack(jax.random.key(0), average, IMAGES, labels, settings)
    fixed = jax.jit(eot.fixed(average, jax.random.fold_in(jax.random.key(0), patch_pgd._LOOK_STREAM)))
    log_probs = log_softmax(np.asarray(fixed(jnp.asarray(info["images"])), float), axis=1)
    # The draw by which the attack measured, asked again from outside: float32 sums of 98 products, compiled otherwise.
    np.testing.assert_allclose(info["loss"], log_probs[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: eot.expectation(_linear, num_samples=0), "num_samples: expected a positive number"),
        (lambda: eot.expectation(_linear, num_samples=1, shift_px=-1.0), "shift_px: expected 0 or more, got -1.0"),
        (lambda: eot.expectation(_linear, num_samples=1, scale_range=(0.0, 1.0)), "scale_range: expected 0 < low"),
        (lambda: eot.draw_bit([]), "logits_fns: expected at least one network, got none"),
        (
            lambda: eot.draw_bit([lambda x: x[:, 0, 0], lambda x: x[:, 0, :, 0]])(jax.random.key(0), jnp.array(IMAGES)),
            "logits_fns: expected networks with logits of one shape, got [(3, 2), (3, 7)]",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)
