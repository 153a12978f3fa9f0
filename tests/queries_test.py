"""Tests of what query attacks share: batches, scores against the losses of gradient attacks, pasting, the report."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from triqdef_jax import patches
from triqdef_jax.attacks import losses, queries


def _logits(seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(6, 4))).astype(np.float32), rng.integers(0, 4, 6)


def test_networks_get_batches_of_one_size_and_their_rows_come_back_in_order():
    shapes = []

    def fn(batch, start):
        shapes.append((batch.shape, start))
        return batch.sum(axis=1)

    images = np.arange(14.0).reshape(7, 2)
    np.testing.assert_array_equal(queries.in_batches(fn, images, 3), images.sum(axis=1))
    assert shapes == [((3, 2), 0), ((3, 2), 3), ((3, 2), 6)]


def test_margin_is_that_of_the_losses():
    logits, labels = _logits()
    reference = losses.margin(jnp.array(logits), jnp.array(labels), jnp.full(6, -1))
    np.testing.assert_array_equal(queries.margin(logits, labels), reference)


@pytest.mark.parametrize("target", [-1, 2])
def test_log_success_is_the_logarithm_of_the_goals_probability(target):
    logits, labels = _logits()
    probs = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(axis=1, keepdims=True)
    expected = np.log(probs[:, 2] if target >= 0 else 1.0 - probs[np.arange(6), labels])
    # The reference subtracts from 1 and loses digits where the label is certain; probabilities here are above 1e-4.
    np.testing.assert_allclose(queries.log_success(logits, labels, target), expected, rtol=1e-9)


def test_log_success_of_a_certain_label_is_exact_and_bounded():
    logits = np.array([[50.0, 0.0, -np.inf], [1e6, 0.0, 0.0]], np.float32)
    # 1 - p(label) is e^-50 / (1 + e^-50), far below what float64 keeps of 1 - p.
    np.testing.assert_allclose(queries.log_success(logits, np.array([0, 0]), -1), [-50.0, queries.LOWEST_LOG])


def test_fooled_means_the_target_or_else_not_the_label():
    predictions, labels = np.array([0, 1, 2]), np.array([0, 2, 2])
    assert queries.is_fooled(predictions, labels, -1).tolist() == [False, True, False]
    assert queries.is_fooled(predictions, labels, 2).tolist() == [False, False, True]


def test_a_random_network_meets_a_fresh_key_in_every_call():
    draws = []

    def logits_fn(key, images):
        draws.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        return np.zeros((len(images), 2))

    ask = queries.make_ask(jax.random.key(0), logits_fn, batch_images=2, random_logits=True)
    ask(np.zeros((4, 2, 2, 1), np.float32), 1)
    ask(np.zeros((4, 2, 2, 1), np.float32), 2)
    assert len(draws) == 4 and len(set(draws)) == 4


def test_reported_patches_pasted_at_their_placements_give_the_reported_images():
    rng = np.random.default_rng(1)
    images = rng.uniform(size=(3, 8, 8, 2)).astype(np.float32)
    masks = np.zeros((3, 8, 8), bool)
    masks[0, 2:5, 3:8] = True  # 3 x 5
    masks[1, 7, 0] = True
    masks[2, 0:2, 0:2] = masks[2, 4, 4] = True  # two pieces
    patched = np.where(masks[..., None], np.float32(0.2), images)
    patch, info = queries.report(
        jax.random.key(3),
        patched,
        masks,
        np.array([0, 1, 1]),
        target=-1,
        canvas_px=5,
        clean_predictions=np.array([0, 0, 1]),
        predictions=np.array([1, 1, 1]),
        loss=np.zeros(3),
        queries=np.ones(3, np.int32),
    )
    again = patches.apply_patches(
        jnp.array(images), patch.values, patch.masks, jax.tree.map(jnp.array, info["placements"])
    )
    np.testing.assert_array_equal(again, info["images"])
    assert patch.size_px.tolist() == [5, 1, 5] and patch.target.tolist() == [-1, -1, -1]
    assert info["success"].tolist() == [True, False, False]


@pytest.mark.parametrize(
    "result, message",
    [
        (np.zeros((3, 2)), "one row of results for each of 4 images"),
        (np.zeros(4), r"logits \[N, K\]"),
        (np.full((4, 2), np.nan), "without nan"),
    ],
)
def test_networks_that_return_something_else_are_refused(result, message):
    ask = queries.make_ask(jax.random.key(0), lambda images: result, batch_images=4, random_logits=False)
    with pytest.raises(ValueError, match=message):
        ask(np.zeros((4, 2, 2, 1), np.float32), 0)
