"""Pair penalties: against a slow twin over pairs, the literal sum, padding, gaps, hinge, and degenerate maps."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triqdef_jax import perceptual
from triqdef_jax.objectives import penalties
from triqdef_jax.objectives.penalties import INPUT_GRADIENT, PenaltySettings, Similarity

ROUNDING = 1e-5  # Sums of a few hundred float32 numbers of order 1, in another order than the twin's.
BITS = np.array([32, 5, 2], np.int32)


def make_maps(names=("stage1", INPUT_GRADIENT), *, num_bits=3, size=8, seed=0):
    """Smooth-ish random maps with a peak of 1, different for each bit-width and image."""
    rng = np.random.default_rng(seed)
    stacks = {name: rng.random((num_bits, 2, size, size), np.float32) for name in names}
    return {name: stack / stack.max(axis=(-2, -1), keepdims=True) for name, stack in stacks.items()}


@functools.partial(jax.jit, static_argnums=2)
def penalty_and_gradient(maps, bits, settings):
    return jax.value_and_grad(lambda maps: penalties.pair_penalty(maps, bits, settings)[0])(maps)


@jax.jit
def descriptors(one_map):
    """(soft edges, peak-normalised Sobel magnitude, orientation histogram) of maps `[B, h, w]`."""
    slopes = perceptual.sobel_magnitude(one_map)
    return perceptual.soft_edges(slopes), perceptual.normalize_peak(slopes), perceptual.soft_hog(one_map, cell_px=2)


@jax.jit
def overlaps(mask_a, mask_b, hog_a, hog_b):
    return jnp.mean(perceptual.soft_dice(mask_a, mask_b)), jnp.mean(perceptual.cosine(hog_a, hog_b))


def slow_similarity(map_a, map_b, *, alpha, beta, use_soft_edges=True):
    """The bracket of the paper's formula for two maps `[B, h, w]`, mean over images."""
    (*masks_a, hog_a), (*masks_b, hog_b) = descriptors(map_a), descriptors(map_b)
    which = 0 if use_soft_edges else 1
    dice, cosine = overlaps(masks_a[which], masks_b[which], hog_a, hog_b)
    return alpha * float(dice) + beta * float(cosine)


similarity = jax.jit(penalties.similarity, static_argnums=(1, 2))


def hand_similarity():
    """Values and chance levels of three bit-widths (32, 5, 2) that tell the pairs apart."""
    value = np.zeros((3, 3), np.float32)
    value[0, 1], value[0, 2], value[1, 2] = 0.5, 0.25, 1.0
    return Similarity(jnp.array(value + value.T + np.eye(3)), jnp.full((3, 3), 0.375))


def test_the_penalty_is_the_mean_over_pairs_layers_and_images_of_the_slow_twin():
    maps = make_maps(("stage1", "stage2", INPUT_GRADIENT))
    settings = PenaltySettings(alpha=0.5, beta=1.0, lambda_fdp=0.8, lambda_gpdp=0.5)
    value, _ = penalty_and_gradient(maps, BITS, settings)
    means = {
        name: np.mean([slow_similarity(a, b, alpha=0.5, beta=1.0) for a, b in itertools.combinations(stack, 2)])
        for name, stack in maps.items()
    }
    expected = 0.8 * (means["stage1"] + means["stage2"]) / 2 + 0.5 * means[INPUT_GRADIENT]
    np.testing.assert_allclose(value, expected, rtol=ROUNDING)


def test_the_literal_formula_sums_over_ordered_pairs_and_layers_without_a_threshold_in_gpdp():
    maps = make_maps(("stage1", "stage2", INPUT_GRADIENT), seed=1)
    settings = PenaltySettings(
        alpha=0.7, beta=0.3, lambda_fdp=2.0, lambda_gpdp=3.0, reduction="sum", gpdp_soft_edges=False
    )
    value, _ = jax.jit(penalties.pair_penalty, static_argnums=2)(maps, BITS, settings)
    expected = 0.0
    for name, stack in maps.items():
        is_gradient = name == INPUT_GRADIENT
        for i, j in itertools.permutations(range(3), 2):
            similar = slow_similarity(stack[i], stack[j], alpha=0.7, beta=0.3, use_soft_edges=not is_gradient)
            expected += (3.0 if is_gradient else 2.0) * similar
    np.testing.assert_allclose(value, expected, rtol=ROUNDING)


def test_padding_changes_neither_value_nor_gradient_and_gets_none_itself():
    maps = make_maps()
    settings = PenaltySettings()
    padded = {name: np.concatenate([stack[:2], np.zeros_like(stack[:1])]) for name, stack in maps.items()}
    value, gradient = penalty_and_gradient(padded, np.array([32, 5, 0], np.int32), settings)
    expected, expected_gradient = penalty_and_gradient({k: v[:2] for k, v in maps.items()}, BITS[:2], settings)
    np.testing.assert_allclose(value, expected, rtol=ROUNDING)
    for name in maps:
        scale = np.abs(expected_gradient[name]).max()
        assert scale > 0
        # Two programs order their float32 sums differently.
        np.testing.assert_allclose(gradient[name][:2], expected_gradient[name], atol=ROUNDING * scale)
        np.testing.assert_array_equal(gradient[name][2], 0.0)


def test_flat_and_empty_maps_have_a_finite_gradient():
    for level in (0.0, 1.0):
        maps = {name: np.full_like(stack, level) for name, stack in make_maps().items()}
        value, gradient = penalty_and_gradient(maps, BITS, PenaltySettings())
        assert np.isfinite(value)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_equal_maps_of_two_bits_are_as_alike_as_a_map_with_itself_and_more_than_unrelated_ones():
    stack = make_maps()["stage1"]
    stack[1] = stack[0]
    both = similarity(stack, "stage1", PenaltySettings())
    np.testing.assert_allclose(both.value[0, 1], both.value[0, 0], rtol=ROUNDING)
    # The cosine of equal vectors is 1, so what is left is the overlap of a soft mask with itself, below its maximum 1.
    assert 1.0 + 0.5 * 0.5 < both.value[0, 1] <= 1.0 + 0.5
    assert both.value[0, 1] > both.value[0, 2] and both.value[0, 1] > both.chance[0, 1]


def test_maps_per_channel_count_like_more_images():
    channels = np.stack([make_maps()["stage1"], make_maps()["stage1"][::-1]], axis=2)  # [K, B, C, h, w]
    together = similarity(channels, "stage1", PenaltySettings())
    apart = [similarity(channels[:, :, c], "stage1", PenaltySettings()) for c in range(2)]
    for name in ("value", "chance"):
        expected = np.mean([getattr(one, name) for one in apart], axis=0)
        np.testing.assert_allclose(getattr(together, name), expected, rtol=ROUNDING)


def test_the_chance_level_is_the_similarity_between_different_images():
    stack = make_maps()["stage1"]
    similar = similarity(stack, "stage1", PenaltySettings())
    expected = slow_similarity(stack[0], stack[1][::-1], alpha=0.5, beta=1.0)  # two images: each meets the other
    np.testing.assert_allclose(similar.chance[0, 1], expected, rtol=ROUNDING)


def test_the_chance_level_carries_no_gradient_and_the_similarity_does():
    sums = lambda stack: [jnp.sum(x) for x in penalties.similarity(stack, "stage1", PenaltySettings())]
    of_value, of_chance = jax.jit(jax.jacrev(sums))(make_maps()["stage1"])
    assert np.abs(of_value).max() > 0
    np.testing.assert_array_equal(of_chance, 0.0)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, (0.5 + 0.25 + 1.0) / 3),
        ({"reduction": "sum"}, 2 * (0.5 + 0.25 + 1.0)),
        ({"min_bit_gap": 4}, (0.5 + 0.25) / 2),  # 5 and 2 bits are 3 apart
        ({"min_bit_gap": 30}, 0.25),
        ({"min_bit_gap": 31}, 0.0),  # no pair is left: no division by zero
        ({"hinge": "chance"}, (0.125 + 0.0 + 0.625) / 3),  # what exceeds 0.375
        ({"hinge": "chance", "reduction": "sum"}, 2 * (0.125 + 0.625)),
    ],
)
def test_pairs_are_reduced_as_the_hand_does(changes, expected):
    # Sums of powers of two are exact; the division by 3 rounds once.
    assert float(penalties.reduce_pairs(hand_similarity(), BITS, PenaltySettings(**changes))) == pytest.approx(
        expected, 1e-7
    )


def test_pairs_count_once_without_the_diagonal_and_without_padding():
    mask = penalties.pair_mask(np.array([8, 4, 0, 2], np.int32))
    np.testing.assert_array_equal(np.argwhere(mask), [[0, 1], [0, 3], [1, 3]])
