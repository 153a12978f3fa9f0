"""Descriptors of maps: hand cases, slow NumPy twins, gradients, degenerate maps and chance levels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from triqdef_jax import perceptual

ROUNDING = 2e-6  # Sums of at most a few hundred float32 numbers near 1, in another order than the twin's.


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def noise(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def single_pixel(size):
    spike = np.zeros((size, size), np.float32)
    spike[size // 2, size // 2] = 1.0
    return spike


def slow_slopes(image, weights):
    """Slopes by loops: each pixel's 3 x 3 neighbourhood, clamped to the image, times weights (columns) and their twin."""
    height, width = image.shape
    dx, dy = np.zeros((2, height, width))
    for y in range(height):
        for x in range(width):
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    value = float(image[np.clip(y + i, 0, height - 1), np.clip(x + j, 0, width - 1)])
                    dx[y, x] += j * weights[i + 1] * value
                    dy[y, x] += i * weights[j + 1] * value
    return dx, dy


def split_of_vector(dx, dy, num_bins):
    """Shares of the two bins around a slope, by solving g = a e_k + b e_(k+1)."""
    centre = np.arctan2(dy, dx) % np.pi / np.pi * num_bins - 0.5
    k = int(np.floor(centre))
    angles = (np.array([k, k + 1]) + 0.5) * np.pi / num_bins
    sign = -1 if np.arctan2(dy, dx) < 0 else 1
    a, b = np.linalg.solve(np.stack([np.cos(angles), np.sin(angles)]), sign * np.array([dx, dy]))
    return (k % num_bins, a), ((k + 1) % num_bins, b)


def split_of_angle(dx, dy, num_bins):
    """Shares of the two bins around a slope in proportion to the angle, as Dalal and Triggs vote."""
    centre = np.arctan2(dy, dx) % np.pi / np.pi * num_bins - 0.5
    k, share = int(np.floor(centre)), centre - np.floor(centre)
    return (k % num_bins, (1 - share) * np.hypot(dx, dy)), ((k + 1) % num_bins, share * np.hypot(dx, dy))


def slow_hog(image, split, num_bins, cell_px, block_cells):
    dx, dy = slow_slopes(image, (0.0, 0.5, 0.0))
    rows, columns = image.shape[0] // cell_px, image.shape[1] // cell_px
    cells = np.zeros((rows, columns, num_bins))
    for y in range(rows * cell_px):
        for x in range(columns * cell_px):
            for k, vote in split(dx[y, x], dy[y, x], num_bins):
                cells[y // cell_px, x // cell_px, k] += vote
    blocks = np.zeros((block_cells * block_cells * num_bins, rows - block_cells + 1, columns - block_cells + 1))
    for y in range(blocks.shape[1]):
        for x in range(blocks.shape[2]):
            block = cells[y : y + block_cells, x : x + block_cells].ravel()
            blocks[:, y, x] = block / np.sqrt(block @ block + 1e-6)
    return blocks.ravel()


def similarity(maps):
    """The whole chain from stacked maps [K, B, H, W] to one number."""
    maps = perceptual.normalize_peak(maps)
    edges = perceptual.soft_edges(perceptual.sobel_magnitude(maps))
    hogs = perceptual.soft_hog(maps, num_bins=3, cell_px=2)
    return jnp.sum(perceptual.pair_similarity(edges, hogs, alpha=0.5, beta=1.0))


def test_channel_map_reduces_absolute_values_and_divides_by_the_maximum():
    features = jnp.array([[[[1.0, -3.0], [0.0, 1.0]], [[-2.0, 2.0], [4.0, 4.0]]]])
    mean, largest, each = (perceptual.channel_map(features, reduction=name) for name in ("mean", "max", "per_channel"))
    # Powers of two: every quotient is exact.
    np.testing.assert_array_equal(mean, [[[0.5, 0.125], [0.5, 1.0]]])
    np.testing.assert_array_equal(largest, [[[0.75, 0.25], [0.5, 1.0]]])
    np.testing.assert_array_equal(each, [[[[0.25, 0.0], [0.5, 1.0]], [[0.75, 0.25], [0.5, 1.0]]]])
    assert perceptual.channel_map(features.astype(jnp.bfloat16)).dtype == jnp.float32


def test_channel_map_passes_the_sign_over_the_constant_maximum_as_gradient():
    features = jnp.array([[[1.0, -3.0], [0.0, 1.0]]])
    gradient = jax.grad(lambda values: jnp.sum(perceptual.channel_map(values)))(features)
    np.testing.assert_array_equal(gradient, [[[0.25, -0.25], [0.0, 0.25]]])  # 1 / (2 channels x peak 2), exact


def test_scale_of_a_map_changes_no_descriptor_even_near_the_end_of_float32():
    features = noise(1, 4, 4, 2) + 0.5
    tiny = features * np.float32(2.0**-80)  # Its squares underflow; a power of two scales without rounding.
    np.testing.assert_array_equal(perceptual.channel_map(tiny), perceptual.channel_map(features))
    np.testing.assert_array_equal(
        perceptual.cosine(tiny[..., 0], tiny[..., 1]), perceptual.cosine(features[..., 0], features[..., 1])
    )


def test_nan_is_not_taken_for_a_flat_map():
    assert np.isnan(perceptual.channel_map(np.full((4, 4, 1), np.nan, np.float32))).all()


def test_sobel_of_a_step_is_four_beside_the_step_and_zero_elsewhere():
    step = np.tile(np.array([0.0, 0.0, 1.0, 1.0], np.float32), (3, 1))
    np.testing.assert_array_equal(perceptual.sobel_magnitude(step), np.tile([0.0, 4.0, 4.0, 0.0], (3, 1)))


def test_sobel_agrees_with_loops_and_with_a_convolution():
    maps = noise(2, 5, 6)
    magnitude = perceptual.sobel_magnitude(maps)
    slow = [np.hypot(*slow_slopes(image, (1.0, 2.0, 1.0))) for image in maps]
    np.testing.assert_allclose(magnitude, slow, atol=ROUNDING)
    kernel = np.outer([1.0, 2.0, 1.0], [-1.0, 0.0, 1.0])
    padded = jnp.pad(maps, ((0, 0), (1, 1), (1, 1)), mode="edge")[:, None]
    slopes = jax.lax.conv(padded, jnp.asarray(np.stack([kernel, kernel.T])[:, None], jnp.float32), (1, 1), "VALID")
    np.testing.assert_allclose(magnitude, jnp.hypot(slopes[:, 0], slopes[:, 1]), atol=ROUNDING)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_percentile_finds_the_order_statistic_bit_for_bit(x64, dtype):
    maps = np.random.default_rng(1).random((4, 3, 7)).astype(dtype)
    maps[1] = np.floor(maps[1] * 4) / 4  # ties
    maps[2] *= maps[2] > 0.8  # mostly zero
    maps[3] *= 1e-30
    for q, rank in ((0.0, 0), (50.0, 10), (75.0, 15), (100.0, 20)):  # 21 values: these ranks are whole numbers
        found = perceptual.percentile(maps, q)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, np.sort(maps.reshape(4, -1))[:, rank])


def test_percentile_interpolates_like_numpy():
    maps = noise(3, 5, 8)
    maps[1] = np.floor(maps[1] * 4) / 4
    for q in (10.0, 85.0, 99.9):
        # The weight, near 1, carries the rounding of a position near 39: a few 1e-6 of the gap between neighbours.
        np.testing.assert_allclose(perceptual.percentile(maps, q), np.percentile(maps, q, axis=(1, 2)), atol=ROUNDING)


def test_soft_edges_are_the_sigmoid_about_the_percentile_of_the_scaled_map():
    strengths = 3.0 * noise(2, 6, 6).astype(np.float64)
    scaled = strengths / strengths.max((1, 2), keepdims=True)
    tau = np.percentile(scaled, 85.0, axis=(1, 2), keepdims=True)
    expected = 1 / (1 + np.exp(-100.0 * (scaled - tau)))
    # The sharpness 100 turns float32 rounding of the scaled map, 1e-7, into up to 100 / 4 as much.
    np.testing.assert_allclose(perceptual.soft_edges(strengths.astype(np.float32)), expected, atol=1e-5)


def test_soft_edges_hold_maximum_and_threshold_constant_in_the_gradient(x64):
    strengths = np.random.default_rng(2).random((6, 6)) + 0.5
    masks, pullback = jax.vjp(perceptual.soft_edges, strengths)
    (gradient,) = pullback(jnp.ones_like(masks))
    # Closed form in float64, so only the order of a handful of operations differs.
    np.testing.assert_allclose(gradient, 100.0 * masks * (1 - masks) / strengths.max(), rtol=1e-10, atol=1e-12)


def test_soft_dice_and_hard_iou_of_hand_made_masks():
    two, one = np.array([[1.0, 1.0], [0.0, 0.0]], np.float32), np.array([[1.0, 0.0], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(perceptual.soft_dice(two, one), 2 / 3, atol=ROUNDING)
    np.testing.assert_allclose(perceptual.soft_dice(two, two), 1.0, atol=ROUNDING)
    np.testing.assert_allclose(perceptual.soft_dice(0.5 * two, one), 0.5, atol=ROUNDING)
    assert perceptual.hard_edge_iou(two, one, percentile=25.0) == 0.5
    assert perceptual.soft_dice(0.0 * two, 0.0 * one) == 0.0


def test_a_constant_map_has_no_hard_edges():
    constant = np.full((7, 9), 0.3, np.float32)  # 0.3 rounds when it is split by interpolation weights
    assert perceptual.hard_edge_iou(constant, constant) == 0.0
    assert perceptual.hard_edge_iou(single_pixel(8), single_pixel(8)) == 1.0


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        (10.0, [1, 0, 0, 0, 0, 0, 0, 0, 0]),  # the centre of bin 0
        (190.0, [1, 0, 0, 0, 0, 0, 0, 0, 0]),  # the same without sign
        (40.0, [0, 0.5**0.5, 0.5**0.5, 0, 0, 0, 0, 0, 0]),  # half way between bins 1 and 2
        (180.0, [0.5**0.5, 0, 0, 0, 0, 0, 0, 0, 0.5**0.5]),  # half way around the end
    ],
)
def test_hog_of_a_ramp_votes_for_the_bins_beside_its_direction(degrees, expected):
    y, x = np.mgrid[:6, :6]
    ramp = (np.cos(np.deg2rad(degrees)) * x + np.sin(np.deg2rad(degrees)) * y).astype(np.float32)
    vectors = perceptual.soft_hog(ramp, cell_px=2, block_cells=1).reshape(9, 3, 3)
    np.testing.assert_allclose(vectors[:, 1, 1], expected, atol=ROUNDING)


@pytest.mark.parametrize(("shape", "num_bins", "cell_px", "block_cells"), [((9, 11), 9, 2, 2), ((8, 8), 4, 4, 1)])
def test_hog_agrees_with_loops_and_stays_near_votes_by_angle(shape, num_bins, cell_px, block_cells):
    settings = {"num_bins": num_bins, "cell_px": cell_px, "block_cells": block_cells}
    image = noise(*shape, seed=3)
    vector = perceptual.soft_hog(image, **settings)
    np.testing.assert_allclose(vector, slow_hog(image, split_of_vector, **settings), atol=ROUNDING)
    if num_bins == 9:
        # Votes differ by at most 0.8 % of a slope, and normalisation takes away what they have in common.
        np.testing.assert_allclose(vector, slow_hog(image, split_of_angle, **settings), atol=0.01)
