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
    """Slopes by loops: differences over each clamped 3 x 3 neighbourhood, smoothed along the other axis by weights."""
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


def test_channel_map_passes_the_sign_over_the_constant_maximum_as_gradient_and_reaches_zeros():
    features = jnp.array([[[1.0, -3.0], [0.0, 1.0]]])
    gradient = jax.grad(lambda values: jnp.sum(perceptual.channel_map(values)))(features)
    np.testing.assert_array_equal(gradient, [[[0.25, -0.25], [0.25, 0.25]]])  # 1 / (2 channels x peak 2), exact


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


def test_one_pass_equals_eager_vmap_and_per_map_calls():
    maps = noise(2, 3, 5, 6, seed=4)

    def descriptors(values):
        edges = perceptual.soft_edges(perceptual.sobel_magnitude(values))
        return perceptual.soft_hog(values, num_bins=3, cell_px=2), edges

    together = jax.jit(descriptors)(maps)
    for other in (jax.jit(jax.vmap(descriptors))(maps), descriptors(maps)):
        # XLA fuses multiplications with additions under jit: one rounding, and 100 / 4 of it behind the sigmoid.
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), together, other)
    alone = jax.jit(descriptors)(maps[1, 2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1, 2], b, atol=1e-5), together, alone)


def test_gradients_agree_with_finite_differences_twice(x64):
    maps, others, weights = np.random.default_rng(5).random((3, 4, 5)) + 0.2

    def smooth_part(values):
        hogs = (perceptual.soft_hog(v, num_bins=3, cell_px=2, centered=True) for v in (values, others))
        dice = perceptual.soft_dice(perceptual.sobel_magnitude(values), others)
        return perceptual.cosine(*hogs) + dice + jnp.sum(weights * perceptual.sobel_magnitude(values))

    # Central differences with step 1e-5 in float64 are right to about 1e-6 of values near 10; kinks are far from here.
    check_grads(jax.jit(smooth_part), (maps,), order=2, modes=["rev"], eps=1e-5, atol=1e-4, rtol=1e-4)


def test_value_gradient_and_second_derivative_are_finite_on_degenerate_maps():
    kinds = {
        "zero": np.zeros((6, 6), np.float32),
        "constant": np.full((6, 6), 0.3, np.float32),
        "spike": single_pixel(6),
        "denormal": np.full((6, 6), 1e-39, np.float32),
        "step": np.repeat(np.float32([0, 1]), 18).reshape(6, 6),
    }
    maps = np.stack(list(kinds.values()))

    def squared_gradient(stack):
        value, first = jax.value_and_grad(similarity)(stack)
        return jnp.sum(first**2), (value, first)

    second, (value, first) = jax.jit(jax.grad(squared_gradient, has_aux=True))(np.stack([maps, np.roll(maps, 1, 0)]))
    assert np.isfinite(value) and np.isfinite(first).all() and np.isfinite(second).all()
    assert not np.any(first[0, 0]) and np.any(first[0, 2])  # none on the all-zero map, some on the spike


def test_rounding_noise_in_a_map_does_not_turn_the_gradient():
    rng = np.random.default_rng(8)
    maps = rng.integers(0, 4, (4, 8, 8)).astype(np.float32) / 3  # a 2-bit network's maps: many slopes are exactly 0
    noisy = maps + rng.choice([-6e-8, 0, 6e-8], maps.shape).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda m: jnp.sum(perceptual.soft_hog(m, cell_px=2) ** 3)))
    first, second = gradient(maps), gradient(noisy)
    assert np.linalg.norm(first) > 1
    assert np.linalg.norm(first - second) < 1e-4 * np.linalg.norm(first)


def test_cosine_of_a_zero_vector_is_zero_without_gradient():
    zero, other = jnp.zeros(3), jnp.array([1.0, 2.0, 2.0])
    cosine = jax.jit(jax.value_and_grad(perceptual.cosine))
    value, gradient = cosine(zero, other)
    assert value == 0.0 and not np.any(gradient)
    np.testing.assert_allclose(cosine(other, jnp.array([2.0, 2.0, -1.0]))[0], 4 / 9, atol=ROUNDING)


def test_pair_similarity_equals_the_pairwise_functions():
    edges, hogs = noise(3, 2, 4, 4), noise(3, 2, 7, seed=6) - 0.5
    one_pair = jax.jit(lambda a, b, c, d: 0.5 * perceptual.soft_dice(a, b) + 2.0 * perceptual.cosine(c, d))
    all_pairs = jax.jit(functools.partial(perceptual.pair_similarity, alpha=0.5, beta=2.0))
    pairs = all_pairs(edges, hogs)
    assert pairs.shape == (3, 3, 2)
    for i in range(3):
        for j in range(3):
            expected = one_pair(edges[i], edges[j], hogs[i], hogs[j])
            np.testing.assert_allclose(pairs[i, j], expected, atol=ROUNDING)
    split = all_pairs(edges[:, :, None], hogs[:, :, None])
    np.testing.assert_allclose(split[..., 0], pairs, atol=ROUNDING)  # further axes, as for one map per channel


def test_chance_level_averages_over_rotated_partners_only():
    maps = jnp.array([1.0, 10.0, 100.0])
    level = perceptual.chance_level(lambda a, b: a * b, maps, maps)
    np.testing.assert_array_equal(level, [55.0, 505.0, 550.0])  # each with the two others, never with itself
    np.testing.assert_array_equal(
        perceptual.chance_level(lambda a, b: a * b, maps, maps, num_shifts=1), [100.0, 10.0, 1000.0]
    )


def test_unrelated_noise_scores_the_known_chance_levels():
    maps = noise(24, 32, 32, seed=7)
    edges = perceptual.sobel_magnitude(maps)
    hog = jax.jit(functools.partial(perceptual.soft_hog, cell_px=perceptual.default_cell_px(32)))(maps)
    centred = hog - jnp.mean(hog, axis=-1, keepdims=True)
    cosine, iou = jax.jit(perceptual.cosine), jax.jit(perceptual.hard_edge_iou)
    levels = {
        "hog": (perceptual.chance_level(cosine, hog, hog), 0.70),
        "centred hog": (perceptual.chance_level(cosine, centred, centred), 0.0),
        "iou": (perceptual.chance_level(iou, edges, edges), 0.15 / 1.85),
    }
    for name, (level, expected) in levels.items():
        # Border pixels have smaller slopes in every map, which adds 0.01; 96 pairs leave another 0.005 of chance.
        assert abs(float(jnp.mean(level)) - expected) < 0.03, name
    np.testing.assert_allclose(cosine(centred, centred), 1.0, atol=1e-5)  # a sum of 1764 float32 products


def test_centred_hog_has_mean_zero_and_differs_by_a_constant():
    plain, centred = (perceptual.soft_hog(noise(6, 6), cell_px=2, centered=flag) for flag in (False, True))
    np.testing.assert_allclose(centred, plain - np.mean(plain), atol=ROUNDING)


def test_default_cells_follow_the_size_of_the_map():
    assert [perceptual.default_cell_px(size) for size in (4, 15, 16, 63, 64, 224)] == [2, 2, 4, 4, 8, 8]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: perceptual.channel_map(m, reduction="sum"), "reduction must be one of mean, max, per_channel, got"),
        (lambda m: perceptual.channel_map(m.astype(np.int32)), "features must be float32 .* got int32"),
        (lambda m: perceptual.sobel_magnitude(m[0, 0]), "maps must be float32 with at least 2 axes"),
        (lambda m: perceptual.sobel_magnitude(m[..., :1]), "at least 2 x 2 px"),
        (lambda m: perceptual.percentile(m, 100.5), r"q must be a percentage in \[0, 100\], got 100.5"),
        (lambda m: perceptual.soft_edges(m, percentile=-1.0), "got -1.0"),
        (lambda m: perceptual.soft_dice(m, m[..., :3]), r"a and b must agree in size, got \(6, 6\) and \(6, 3\)"),
        (lambda m: perceptual.hard_edge_iou(m, m[:, :3]), "a and b must agree"),
        (lambda m: perceptual.soft_hog(m, cell_px=4), "one block of 8 px .2 cells of 4 px. on each side, got 6 x 6"),
        (lambda m: perceptual.soft_hog(m, cell_px=2, num_bins=1), "at least 2, 1, 1, got 1, 2, 2"),
        (lambda m: perceptual.cosine(m, m[..., :2]), "a and b must agree"),
        (lambda m: perceptual.pair_similarity(m, m[:1, 0], alpha=1.0, beta=1.0), "leading axes of edges"),
        (lambda m: perceptual.chance_level(perceptual.cosine, m[:1], m[:1]), "batch of at least 2"),
        (lambda m: perceptual.chance_level(perceptual.cosine, m, m[:1]), "batches of maps_a and maps_b must agree"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as refusal:
        call(noise(2, 6, 6))
    assert "\n" not in str(refusal.value)
