"""Tiles are enlarged without inventing pixels, and PNG bytes read back as what was drawn."""

import cv2
import numpy as np
import pytest

from triqdef_jax import drawing

RNG = np.random.default_rng(0)


def read(content):
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def test_png_bytes_are_a_png_of_the_same_pixels():
    image = RNG.integers(0, 256, (5, 7, 3), np.uint8)
    content = drawing.png(image)
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    np.testing.assert_array_equal(read(content), image)


def test_enlarging_repeats_pixels_by_a_whole_factor_and_centres_them():
    image = RNG.integers(0, 200, (2, 2, 3), np.uint8)
    large = drawing.enlarge(image, 7)  # factor 3, so half a pixel of margin is rounded to the upper left
    np.testing.assert_array_equal(large[:6, :6], np.kron(image, np.ones((3, 3, 1), np.uint8)))
    assert (large[6] == drawing.BACKGROUND).all() and (large[:, 6] == drawing.BACKGROUND).all()
    with pytest.raises(ValueError, match="at least the 2 px"):
        drawing.enlarge(image, 1)


@pytest.mark.parametrize(("size_px", "expected"), [(8, 96), (16, 96), (5, 100), (32, 96), (224, 224)])
def test_tiles_are_whole_multiples_of_the_image(size_px, expected):
    assert drawing.tile_px(size_px) == expected


def test_heat_gets_brighter_as_it_rises():
    colours = drawing.heat_colours(np.linspace(0, 1, 64)[None])
    lightness = cv2.cvtColor(colours, cv2.COLOR_RGB2LAB)[0, :, 0].astype(int)
    assert (np.diff(lightness) >= -2).all()  # rounding of 8-bit colours
    assert lightness[-1] - lightness[0] > 200


def test_an_overlay_shows_both_heat_and_image():
    dark, bright = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    cold, hot = np.zeros((2, 2)), np.array([[0.0, 0.0], [0.0, 1.0]])
    seen = [drawing.overlay(image, heat, 8) for image in (dark, bright) for heat in (cold, hot)]
    assert (seen[0] != seen[1]).any() and (seen[0] != seen[2]).all(axis=-1).all()
    assert seen[1][7, 7].sum() > seen[1][0, 0].sum()  # the lower right corner is hot


def test_a_sheet_holds_every_tile_under_its_label():
    tiles = [np.full((10, 10, 3), shade, np.uint8) for shade in (50, 100, 150)]
    sheet = drawing.sheet([[("a", tiles[0]), ("b", tiles[1])], [("c", tiles[2])]])
    assert sheet.shape == (2 * (10 + 16 + 6) + 6, 2 * (10 + 6) + 6, 3)
    for (i, j), tile in zip([(0, 0), (0, 1), (1, 0)], tiles, strict=True):
        top, left = 6 + 32 * i + 16, 6 + 16 * j
        np.testing.assert_array_equal(sheet[top : top + 10, left : left + 10], tile)
        assert (sheet[top - 16 : top, left : left + 10] < 200).any()  # the label's ink
    with pytest.raises(ValueError, match="tiles of one shape"):
        drawing.sheet([])
