"""Where patches land, and predictions in batches of one size."""

import collections

import numpy as np
import pytest

from triqdef_jax import config as config_lib
from triqdef_jax import inference

Named = collections.namedtuple("Named", "predict")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (50, 8, 8, 3), np.uint8)


def pasted(images, index, rows, *, seed=0, **options):
    """`images[rows]` with patch `index` of three of 4 px."""
    values = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3)).astype(np.float32) / 255
    arrays = {"values": values, "masks": np.ones((3, 4, 4), np.float32), "size_px": np.full(3, 4, np.int32)}
    config = config_lib.default()
    config.seed = seed
    return np.asarray(inference.make_paste(arrays, index, config, **options)(images[rows], rows))


def test_places_depend_on_seed_patch_and_image_only(images):
    rows = np.arange(6)
    whole = pasted(images, 1, rows)
    np.testing.assert_array_equal(whole, np.concatenate([pasted(images, 1, rows[i : i + 2]) for i in (0, 2, 4)]))
    assert (whole != images[:6]).any(axis=(1, 2, 3)).all()
    assert (whole != pasted(images, 1, rows, seed=1)).any()


def test_a_patch_changes_only_the_pixels_under_it(images):
    changed = (pasted(images, 0, np.arange(8)) != images[:8]).any(axis=-1)
    assert changed.sum(axis=(1, 2)).max() <= 36  # a 4-px square, 10 % larger and turned, touches at most 6 x 6 pixels


def test_placements_lie_where_they_say(images):
    changed = (pasted(images, 0, np.arange(50), placement="center") != images).any(axis=(0, 3))
    assert changed[3:5, 3:5].all() and not changed[0].any() and not changed[:, -1].any()
    corner = (pasted(images, 0, np.arange(50), placement="corner") != images).any(axis=(0, 3))
    assert corner[0, 0] and corner[-1, -1] and corner[0, -1] and corner[-1, 0]


def test_every_image_is_predicted_once_in_batches_of_one_size(images):
    met = []

    def predict(batch):
        met.append(len(batch))
        return np.asarray(batch).reshape(len(batch), -1).sum(axis=1) % 10

    found = inference.predict([Named(predict), Named(lambda batch: np.zeros(len(batch)))], images, 20)
    np.testing.assert_array_equal(found, [images.reshape(50, -1).sum(axis=1) % 10, np.zeros(50)])
    assert met == [17, 17, 17] and found.dtype == np.int32
