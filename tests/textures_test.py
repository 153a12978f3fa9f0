"""Tests of the texture dictionary: statistics by hand, clusters that were planted, textures that are real image regions."""

import jax
import numpy as np
import pytest

from triqdef_jax.attacks import textures

STRIPES, CHECKS = np.indices((16, 16))[0] % 2, np.indices((16, 16)).sum(axis=0) % 2


@pytest.fixture(scope="module")
def problem():
    """12 images: class 0 half stripes and half checks, class 1 flat of many greys; a little noise on all."""
    rng = np.random.default_rng(0)
    patterns = [STRIPES] * 4 + [CHECKS] * 2 + [np.full((16, 16), level) for level in np.linspace(0.1, 0.9, 6)]
    images = np.stack(patterns)[..., None] * 0.8 + rng.uniform(0.0, 0.02, (12, 16, 16, 1))
    return images.astype(np.float32), np.repeat([0, 1], 6).astype(np.int32)


@pytest.fixture(scope="module")
def dictionary(problem):
    return textures.make_textures(jax.random.key(0), *problem, region_px=6, num_per_class=2, texture_px=9)


def test_each_planted_texture_stands_for_its_cluster(problem, dictionary):
    assert dictionary.classes.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(dictionary.shares[:2], [4 / 6, 2 / 6], rtol=1e-6)  # stripes first: the larger cluster
    np.testing.assert_allclose([dictionary.shares[:2].sum(), dictionary.shares[2:].sum()], 1.0, rtol=1e-6)
    assert dictionary.rows[0] in range(4) and dictionary.rows[1] in (4, 5)


def test_textures_are_real_regions_continued_by_reflection_on_the_pixel_grid(problem, dictionary):
    images = problem[0]
    for values, row, (top, left) in zip(dictionary.values, dictionary.rows, dictionary.corners, strict=True):
        region = images[row, top : top + 6, left : left + 6]
        rounded = np.round(255.0 * region) / np.float32(255.0)
        np.testing.assert_allclose(values[1:7, 1:7], rounded, atol=1e-7)  # one of the three new rows lies above
        np.testing.assert_array_equal(values[0], values[2])
        np.testing.assert_array_equal(values[:, 7:], values[:, [5, 4]])
    assert dictionary.values.shape == (4, 9, 9, 1) and dictionary.values.dtype == np.float32


def test_the_same_key_gives_the_same_dictionary(problem, dictionary):
    again = textures.make_textures(jax.random.key(0), *problem, region_px=6, num_per_class=2, texture_px=9)
    for first, second in zip(dictionary, again, strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_network_of_the_attackers_own_decides_what_is_alike(problem):
    calls = []

    def features_fn(images):  # sees brightness alone, on a coarser grid
        calls.append(len(images))
        return images.reshape(-1, 4, 4, 4, 4, 1).mean(axis=(2, 4))

    images, labels = problem[0][6:], problem[1][6:]
    made = textures.make_textures(
        jax.random.key(1), images, labels, region_px=8, num_per_class=6, features_fn=features_fn, batch_images=4
    )
    assert calls == [4, 4]
    assert sorted(made.rows.tolist()) == list(range(6))  # six greys, six clusters
    assert made.values.shape == (6, 8, 8, 1)


def test_fewer_different_regions_than_clusters_give_fewer_textures():
    images = np.full((5, 4, 4, 3), 0.5, np.float32)
    made = textures.make_textures(jax.random.key(0), images, np.zeros(5, np.int32), region_px=2)
    assert made.values.shape == (1, 2, 2, 3) and made.shares.tolist() == [1.0]


def test_the_filter_bank_sees_slopes_and_bumps_and_nothing_on_flat_images():
    flat = np.full((1, 16, 16, 2), 0.4, np.float32)
    maps = textures.filter_bank(flat)
    assert maps.shape == (1, 16, 16, 11)
    np.testing.assert_allclose(maps[..., 2:], 0.0, atol=1e-12)  # differences of float64 sums of one value
    ramp = np.broadcast_to(np.linspace(0, 1, 64, dtype=np.float32)[:, None, None], (1, 64, 64, 1))
    middle = textures.filter_bank(ramp)[0, 32, 32]
    for index, sigma in enumerate(textures.FILTER_SIGMAS):
        # A symmetric blur leaves a ramp as it is; its float32 values are right to 1e-7.
        np.testing.assert_allclose(middle[1 + 3 * index : 4 + 3 * index], [sigma / 63, 0.0, 0.0], atol=1e-6)
    bump = np.zeros((1, 16, 16, 1), np.float32)
    bump[0, 8, 8] = 1.0
    assert (textures.filter_bank(bump)[0, 8, 8, [3, 6, 9]] < -0.03).all()


def test_gram_statistics_of_two_regions_by_hand():
    features = np.zeros((1, 2, 4, 2))
    features[0, :, :2] = [2.0, 0.0]
    features[0, :, 2:] = [2.0, 2.0]
    # Mean squares are 4 and 2: channels become 1 and 0 on the left, 1 and sqrt 2 on the right. Pixels are half a cell.
    made = textures.gram_statistics(
        features, np.array([0, 0]), np.array([[0, 0], [2, 4]]), region_px=2, image_shape=(4, 8)
    )
    # Upper triangle: G00, sqrt 2 G01, G11.
    np.testing.assert_allclose(made, [[1.0, 0.0, 0.0], [1.0, 2.0, 2.0]], rtol=1e-12)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(region_px=17), "region_px: expected 1 to the images' 16 px, got 17"),
        (dict(region_px=6, texture_px=5), "texture_px: expected region_px=6 or more, got 5"),
        (dict(region_px=6, num_per_class=0), "num_per_class: expected a positive number"),
        (dict(region_px=6, features_fn=lambda images: images.mean(axis=(1, 2))), "features_fn: expected features"),
    ],
)
def test_bad_input_is_refused(problem, fields, message):
    with pytest.raises(ValueError, match=message):
        textures.make_textures(jax.random.key(0), *problem, **fields)
