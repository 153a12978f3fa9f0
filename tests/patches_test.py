"""Tests of masks, placements and pasting."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from triqdef_jax import patches

_apply = jax.jit(patches.apply_patches)  # eager, each small operation would be compiled by itself


def _placement(row, col, angle=0.0, scale=1.0):
    return patches.Placement(*(jnp.array([value], jnp.float32) for value in (row, col, angle, scale)))


def _random(seed, *shape):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def _slow_paste(image, patch, mask, row, col, angle_deg, scale):
    """Pixel by pixel in float64: rotate back, nearest mask, mask-weighted bilinear patch."""
    used_rows, used_cols = np.nonzero(mask)
    middle = (used_rows.min() + used_rows.max()) / 2, (used_cols.min() + used_cols.max()) / 2
    angle, result = np.deg2rad(angle_deg), image.astype(float)
    for i, j in np.ndindex(image.shape[:2]):
        # Counter-clockwise by the angle maps (right, up) to (right', up'); this is its inverse.
        right, up = j - col, -(i - row)
        u = middle[0] - (-right * np.sin(angle) + up * np.cos(angle)) / scale
        v = middle[1] + (right * np.cos(angle) + up * np.sin(angle)) / scale
        near = int(np.floor(u + 0.5)), int(np.floor(v + 0.5))
        if not all(0 <= n < s for n, s in zip(near, mask.shape, strict=True)) or mask[near] == 0:
            continue
        weights = np.maximum(1 - np.abs(np.arange(mask.shape[0]) - u), 0)[:, None]
        weights = weights * np.maximum(1 - np.abs(np.arange(mask.shape[1]) - v), 0)[None, :] * mask
        result[i, j] = (weights[..., None] * patch).sum((0, 1)) / weights.sum()
    return result


def test_masks_are_what_one_draws_by_hand():
    np.testing.assert_array_equal(patches.make_mask(2, 3), [[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    circle = patches.make_mask(4, 4, "circle")
    np.testing.assert_array_equal(circle, [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]])
    assert patches.make_mask(3, 7).sum() == 9


@pytest.mark.parametrize("size, canvas", [(3, 3), (4, 4), (3, 6), (4, 7)])
def test_whole_pixel_paste_is_bit_exact(size, canvas):
    image, patch, mask = _random(0, 1, 9, 9, 3), _random(1, 1, canvas, canvas, 3), patches.make_mask(size, canvas)
    row, col = 2 + (size - 1) / 2, 5 + (size - 1) / 2
    result = _apply(jnp.array(image), jnp.array(patch), jnp.array(mask[None]), _placement(row, col))
    top = (canvas - size) // 2
    expected = image.copy()
    expected[0, 2 : 2 + size, 5 : 5 + size] = patch[0, top : top + size, top : top + size]
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("shape", ["square", "circle"])
def test_jittered_paste_matches_the_slow_twin(shape):
    rng = np.random.default_rng(3)
    num, image, patch = 8, _random(0, 8, 12, 12, 2), _random(1, 8, 6, 6, 2)
    mask = np.stack([patches.make_mask(size, 6, shape) for size in (3, 4, 5, 6, 3, 4, 5, 6)])
    row, col = rng.uniform(-1, 12, (2, num))  # some hang over the border
    angle, scale = rng.uniform(-90, 90, num), rng.uniform(0.7, 1.6, num)
    place = patches.Placement(*(jnp.array(value, jnp.float32) for value in (row, col, angle, scale)))
    result = _apply(jnp.array(image), jnp.array(patch), jnp.array(mask), place)
    expected = np.stack([_slow_paste(*args) for args in zip(image, patch, mask, row, col, angle, scale, strict=True)])
    # Coordinates of ~10 px carry float32 errors of ~1e-6 px, values change by at most 1 per px.
    np.testing.assert_allclose(result, expected, atol=2e-5)


def test_positive_angle_turns_counter_clockwise():
    image, patch = jnp.zeros((1, 5, 5, 1)), jnp.array(_random(0, 1, 3, 3, 1))
    result = _apply(image, patch, jnp.ones((1, 3, 3)), _placement(2.0, 2.0, angle=90.0))
    # cos(90 deg) is 4e-8 in float32, which moves a tap by that many pixels.
    np.testing.assert_allclose(result[0, 1:4, 1:4, 0], np.rot90(patch[0, ..., 0]), atol=1e-6)


def test_canvas_outside_the_mask_never_shows():
    key = jax.random.key(0)
    masks = jnp.tile(patches.make_mask(4, 7, "circle"), (20, 1, 1))
    place = patches.sample_placements(key, 20, image_size_px=12, size_px=4, rotation_deg=40.0, scale_range=(0.8, 1.3))
    inside = masks[..., None] > 0
    dirty = jnp.where(inside, 0.25, 1.0), jnp.where(inside, 0.25, 0.0)
    first, second = (_apply(jnp.ones((20, 12, 12, 1)), patch, masks, place) for patch in dirty)
    np.testing.assert_array_equal(first, second)
    # A constant patch stays constant up to the rounding of its renormalised weights.
    assert np.all((first == 1.0) | (np.abs(first - 0.25) < 1e-6)) and (first < 0.5).any()


def test_an_empty_mask_changes_nothing():
    image = jnp.array(_random(0, 1, 5, 5, 3))
    result = _apply(image, jnp.ones((1, 3, 3, 3)), jnp.zeros((1, 3, 3)), _placement(2.0, 2.0))
    np.testing.assert_array_equal(result, image)


def _pull(image, patch, mask, place, cotangent):
    return jax.vjp(lambda x, p: patches.apply_patches(x, p, mask, place), image, patch)[1](cotangent)


def test_gradients_split_between_image_and_patch():
    image, patch = jnp.array(_random(0, 1, 6, 6, 1)), jnp.array(_random(1, 1, 4, 4, 1))
    mask, place = jnp.array(patches.make_mask(3, 4)[None]), _placement(2.0, 3.0)
    cotangent = jnp.array(_random(2, 1, 6, 6, 1))
    to_image, to_patch = jax.jit(_pull)(image, patch, mask, place, cotangent)
    covered = np.zeros((6, 6, 1), bool)
    covered[1:4, 2:5] = True
    np.testing.assert_array_equal(to_image[0], np.where(covered, 0.0, cotangent[0]))
    np.testing.assert_array_equal(to_patch[0, :3, :3], cotangent[0, 1:4, 2:5])
    assert not to_patch[0, 3].any() and not to_patch[0, :, 3].any()


def test_jittered_patch_gradient_is_the_transpose_of_the_paste():
    patch, mask = jnp.array(_random(1, 1, 5, 5, 1)), jnp.array(patches.make_mask(4, 5, "circle")[None])
    place = _placement(4.3, 3.6, angle=17.0, scale=1.2)
    paste = lambda p: _apply(jnp.zeros((1, 8, 8, 1)), p, mask, place)
    cotangent = jnp.array(_random(2, 1, 8, 8, 1))
    _, gradient = jax.jit(_pull)(jnp.zeros((1, 8, 8, 1)), patch, mask, place, cotangent)
    # The paste is linear in the patch, so <paste(p), c> = <p, paste^T(c)> up to the rounding of 40 terms of order 1.
    np.testing.assert_allclose((paste(patch) * cotangent).sum(), (patch * gradient).sum(), rtol=1e-5)


def test_random_whole_pixel_corners_are_uniform_over_all_that_fit():
    place = patches.sample_placements(jax.random.key(1), 4000, image_size_px=6, size_px=4)
    top, left = np.asarray(place.center_row) - 1.5, np.asarray(place.center_col) - 1.5
    counts = np.zeros((3, 3))
    np.add.at(counts, (top.astype(int), left.astype(int)), 1)
    assert set(top) == set(left) == {0.0, 1.0, 2.0}
    # 4000 / 9 = 444 with a standard deviation of 20; five of them never happen by chance.
    assert np.abs(counts - 4000 / 9).max() < 100
    assert not np.any(place.angle_deg) and np.all(place.scale == 1.0)


@pytest.mark.parametrize("location", patches.LOCATIONS)
def test_jittered_patches_stay_inside_before_rotation(location):
    sizes = jnp.array([3, 4, 5, 6] * 25)
    place = patches.sample_placements(
        jax.random.key(2),
        100,
        image_size_px=9,
        size_px=sizes,
        rotation_deg=22.5,
        scale_range=(0.9, 1.1),
        location=location,
    )
    half = sizes * place.scale / 2
    for center in (place.center_row, place.center_col):
        # Pixel centres are whole numbers, so the image reaches from -0.5 to 8.5; 1e-5 is float32 rounding at 9 px.
        assert np.all(center - half >= -0.5 - 1e-5) and np.all(center + half <= 8.5 + 1e-5)
    assert np.abs(place.angle_deg).max() <= 22.5 and 0.9 <= place.scale.min() < place.scale.max() <= 1.1


def test_corners_centre_and_fixed_places_are_what_they_say():
    sample = lambda location, size, **kwargs: patches.sample_placements(
        jax.random.key(3), 50, image_size_px=8, size_px=size, location=location, **kwargs
    )
    corner = sample("corner", 3)
    found = set(zip(corner.center_row.tolist(), corner.center_col.tolist(), strict=True))
    assert found == {(1.0, 1.0), (1.0, 6.0), (6.0, 1.0), (6.0, 6.0)}
    center = sample("center", 3)
    assert set(center.center_row.tolist()) == {3.0}  # upper left corner 2: room of 5 px, halved downwards
    fixed = sample("fixed", 3)
    assert len({*zip(fixed.center_row.tolist(), fixed.center_col.tolist(), strict=True)}) == 1
    moved = sample("fixed", 3, location_key=jax.random.key(9), rotation_deg=10.0)
    again = sample("fixed", 3, location_key=jax.random.key(9), rotation_deg=20.0)
    np.testing.assert_array_equal(moved.center_row, again.center_row)


def test_traced_sizes_sample_like_known_ones():
    sample = lambda size: patches.sample_placements(jax.random.key(4), 6, image_size_px=9, size_px=size)
    for traced, known in zip(jax.jit(sample)(jnp.int32(4)), sample(4), strict=True):
        np.testing.assert_array_equal(traced, known)


def test_select_patched_takes_the_first_p_of_each_group():
    images = jnp.arange(12)
    assert patches.select_patched(images, 0.5).tolist() == [0, 2, 4, 6, 8, 10]
    assert patches.select_patched(images, 2 / 3).tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert patches.select_patched(images[:, None], 1.0).shape == (12, 1)


def test_rounding_is_half_to_even_and_clips():
    values = jnp.array([-0.2, 0.0, 0.5 / 255, 1.5 / 255, 254.4 / 255, 1.0, 1.7])
    codes = patches.round_to_uint8(values)
    assert codes.dtype == jnp.uint8 and codes.tolist() == [0, 0, 0, 2, 254, 255, 255]
    grid = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_array_equal(patches.round_to_uint8(grid / 255.0), grid)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: patches.make_mask(7, 6), "size_px: expected 1 to canvas_px=6, got 7"),
        (lambda: patches.make_mask(3, 6, "star"), "shape: expected one of"),
        (lambda: patches.sample_placements(None, 2, image_size_px=8, size_px=9), "size_px: expected"),
        (lambda: patches.sample_placements(None, 2, image_size_px=8, size_px=3, location="top"), "location: expected"),
        (lambda: patches.sample_placements(None, 2, image_size_px=8, size_px=3, scale_range=(2, 1)), "scale_range"),
        (lambda: patches.sample_placements(None, 2, image_size_px=8, size_px=3, rotation_deg=-1), "rotation_deg"),
        (lambda: patches.select_patched(np.zeros(5), 0.5), "batch divisible by 2, got 5"),
        (lambda: patches.select_patched(np.zeros(5), 0.513), "patched_frac: expected p/q"),
        (lambda: _paste_of((1, 6, 6, 3), (2, 3, 3, 3), (2, 3, 3)), "patches: expected"),
        (lambda: _paste_of((1, 6, 6, 3), (1, 3, 3, 3), (1, 4, 4)), "masks: expected"),
        (lambda: _paste_of((2, 6, 6, 3), (2, 3, 3, 3), (2, 3, 3)), "placements: expected"),
        (lambda: _paste_of((1, 6, 6, 3), (1, 3, 3, 3), (1, 3, 3), np.uint8), "divide uint8 by 255"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


def _paste_of(images, patch, mask, dtype=np.float32):
    return patches.apply_patches(np.zeros(images, dtype), np.zeros(patch), np.zeros(mask), _placement(2.0, 2.0))
