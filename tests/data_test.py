"""Batches are a pure function of (seed, step) on any topology; splits are fixed; evaluation counts each image once."""

import re

import cv2
import jax
import numpy as np
import pytest
from data_example import assert_equal, first, imagenet, numbered, settings
from prepare_data_test import write_cifar

from triqdef_jax import data, prepare_data
from triqdef_jax.data import images, memory, splits


@pytest.fixture(scope="module")
def digits():
    return data.load(settings(heldout_images=147))


# Digits


def test_digits_parts_are_disjoint_complete_and_stratified(digits):
    parts = (digits.train, digits.heldout, digits.test)
    assert [len(part.labels) for part in parts] == [1200, 147, 450]
    assert sorted(np.concatenate([part.ids for part in parts])) == list(range(1797))
    total = np.bincount(np.concatenate([part.labels for part in parts]))
    for part in parts:
        share = total * len(part.labels) / 1797
        assert abs(np.bincount(part.labels) - share).max() < 2, "two nested choices, each off by less than one"
    # Made by the first version of `load`: results of different versions must be about the same images.
    assert [part.ids[:6].tolist() for part in parts] == [
        [713, 182, 303, 895, 933, 1266],
        [1081, 438, 1015, 1360, 412, 1002],
        [1707, 927, 262, 156, 513, 1567],
    ]


def test_digits_are_scikit_learns_enlarged_bilinearly(digits):
    from sklearn import datasets

    raw = datasets.load_digits()
    np.testing.assert_array_equal(digits.test.labels, raw.target[digits.test.ids])
    assert digits.test.images.shape == (450, 16, 16, 3)
    assert digits.test.images.dtype == np.uint8 and digits.test.labels.dtype == np.int32
    assert (digits.test.images == digits.test.images[..., :1]).all(), "grey: all channels equal"
    small = np.rint(raw.images[digits.test.ids] * (255 / 16))
    at = np.clip((np.arange(16) + 0.5) / 2 - 0.5, 0, 7)  # pixel centres of the large image in the small one
    low, high, weight = np.floor(at).astype(int), np.ceil(at).astype(int), at % 1
    rows = small[:, low] * (1 - weight)[:, None] + small[:, high] * weight[:, None]
    slow = rows[:, :, low] * (1 - weight) + rows[:, :, high] * weight
    error = abs(digits.test.images[..., 0] - slow).max()
    assert error <= 0.5 + 1 / 256, "rounding to integers, and OpenCV's weights of eight bits"


def test_a_size_or_a_number_of_images_changes_nothing_else(digits):
    small = data.load(settings(heldout_images=147, image_size_px=8, train_images=100))
    assert small.num_train == 100 and small.image_size_px == small.train.images.shape[1] == 8
    np.testing.assert_array_equal(small.train.ids, digits.train.ids[:100])
    np.testing.assert_array_equal(small.heldout.ids, digits.heldout.ids)
    assert small.train.images.min() == 0 and small.train.images.max() == 255


def test_stratified_choices_are_spread_over_each_class():
    labels = np.repeat([2, 0, 1], [60, 30, 10])
    chosen = splits.stratified_mask(labels, 20)
    assert np.bincount(labels[chosen]).tolist() == [6, 2, 12]
    gaps = np.diff(np.flatnonzero(chosen & (labels == 2)))
    assert set(gaps.tolist()) == {5}
    assert not splits.stratified_mask(labels, 0).any()
    assert splits.stratified_mask(labels, 100).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "mnist"}, "data.name must be one of digits, cifar10, imagenet; got 'mnist'"),
        (
            {"heldout_images": 1347},
            "data.heldout_images must be below 1347, the images of the training split, got 1347",
        ),
        ({"heldout_images": 47, "train_images": 1301}, "data.train_images must be at most 1300, got 1301; 0 takes all"),
        ({"image_size_px": -1}, "data.image_size_px must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        data.load(settings(**changes))


# Batches of sets in memory


def test_a_resumed_run_meets_the_batches_of_an_uninterrupted_one(digits):
    whole = first(digits.train_batches(seed=3, batch_size=500, start_step=0), 6)  # epochs of two steps
    assert_equal(whole[3:], first(digits.train_batches(seed=3, batch_size=500, start_step=3), 3))
    other = first(digits.train_batches(seed=4, batch_size=500, start_step=0), 1)
    assert (whole[0]["labels"] != other[0]["labels"]).any()
    assert whole[0]["images"].shape == (500, 16, 16, 3) and whole[0]["images"].dtype == np.uint8
    assert whole[0]["labels"].dtype == np.int32


def test_every_epoch_is_another_permutation_and_images_keep_their_labels():
    batches = first(numbered(11).train_batches(seed=0, batch_size=3, start_step=0), 6)
    epochs = np.concatenate([batch["labels"] for batch in batches]).reshape(2, 9)
    assert all(len(set(epoch)) == 9 for epoch in epochs.tolist()), "nine of eleven, none twice; two are dropped"
    assert (epochs[0] != epochs[1]).any()
    for batch in batches:
        np.testing.assert_array_equal(batch["images"].max((1, 2, 3)), batch["labels"] + 1)


def test_augmentation_is_drawn_anew_at_every_step_and_for_every_image():
    part = splits.Split(
        np.tile(np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3), (8, 1, 1, 1)), np.zeros(8, np.int32), np.arange(8)
    )
    same = memory.ImageData("same", 1, 4, part, part, part, "crop_flip")
    one, two = (batch["images"] for batch in first(same.train_batches(seed=0, batch_size=8, start_step=0), 2))
    assert (one != two).any()
    assert len(np.unique(one, axis=0)) > 1


@pytest.mark.parametrize(("augment", "pad_px", "flips"), [("shift", 1, (1,)), ("crop_flip", 4, (1, -1))])
def test_augmented_images_are_exactly_the_windows_of_the_padded_image(augment, pad_px, flips):
    image = np.arange(1, 4 * 4 * 3 + 1, dtype=np.uint8).reshape(4, 4, 3)
    padded = np.pad(image, ((pad_px, pad_px), (pad_px, pad_px), (0, 0)))
    offsets = range(2 * pad_px + 1)
    windows = [padded[y : y + 4, x : x + 4][:, ::flip] for y in offsets for x in offsets for flip in flips]
    num = 40 * len(windows)
    result = np.asarray(memory.AUGMENTATIONS[augment](jax.random.key(0), np.tile(image, (num, 1, 1, 1))))
    counts = {window.tobytes(): 0 for window in windows}
    for row in result:
        counts[row.tobytes()] += 1  # KeyError: no window
    assert min(counts.values()) > 0, "40 draws per window miss a given one with probability e**-40"


def test_batching_mistakes_are_refused_at_the_call_and_not_at_the_first_batch(imagenet_dir):
    for source, num in ((numbered(5), 5), (imagenet(imagenet_dir), 26)):
        with pytest.raises(ValueError, match=rf"batch_size must lie in 1..{num} .*, got {num + 1}; lower it"):
            source.train_batches(seed=0, batch_size=num + 1, start_step=0)
        with pytest.raises(ValueError, match="start_step must be at least 0, got -1"):
            source.train_batches(seed=0, batch_size=1, start_step=-1)
        with pytest.raises(ValueError, match="split must be one of train, heldout, test; got 'val'"):
            source.eval_batches("val", 1)
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            source.eval_batches("test", 0)


def test_evaluation_counts_every_image_once_in_batches_of_one_size():
    batches = list(numbered(10).eval_batches("test", 4))
    assert [batch["images"].shape for batch in batches] == [(4, 4, 4, 3)] * 3
    assert np.concatenate([batch["ids"] for batch in batches]).tolist() == [*range(10), -1, -1]
    assert np.concatenate([batch["mask"] for batch in batches]).tolist() == [1.0] * 10 + [0.0] * 2
    assert batches[2]["labels"].tolist() == [8, 9, 0, 0] and not batches[2]["images"][2:].any()
    assert [batch["mask"].dtype for batch in batches] == [np.float32] * 3
    assert list(data.load(settings()).eval_batches("heldout", 4)) == []


# CIFAR-10


def test_cifar10_has_the_pixels_labels_and_order_of_the_archive(tmp_path):
    archive, pixels, labels = write_cifar(tmp_path, num_train=40, num_test=10)
    prepare_data.prepare("cifar10", tmp_path, {"archive": archive}, skip_checksum=True)
    cifar = data.load(settings("cifar10", dir=str(tmp_path), heldout_images=10))
    assert np.bincount(cifar.heldout.labels).tolist() == [1] * 10
    assert sorted([*cifar.train.ids, *cifar.heldout.ids]) == list(range(40))
    assert (np.diff(cifar.train.ids) > 0).all()
    for part, start in ((cifar.train, 0), (cifar.heldout, 0), (cifar.test, 40)):
        np.testing.assert_array_equal(part.images, pixels[start + part.ids])
        np.testing.assert_array_equal(part.labels, labels[start + part.ids])
    assert cifar.augment == "crop_flip" and cifar.image_size_px == 32 and cifar.num_train == 30


# Single images


def test_decoding_gives_rgb_and_ignores_the_orientation_tag():
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = (255, 0, 0)  # red on the left
    png = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
    np.testing.assert_array_equal(images.decode(png), pixels)
    jpeg = cv2.imencode(".jpg", pixels[..., ::-1])[1].tobytes()
    tag = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # TIFF header, one entry: turn by 90 deg
    segment = b"\xff\xe1" + (len(tag) + 8).to_bytes(2, "big") + b"Exif\0\0" + tag
    turned = jpeg[:2] + segment + jpeg[2:]
    assert cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR).shape == (16, 8, 3), "the tag is not read"
    np.testing.assert_array_equal(images.decode(turned), images.decode(jpeg))


def test_the_centre_crop_is_the_middle_of_the_resized_image():
    picture = np.random.default_rng(0).integers(0, 256, (256, 320, 3), np.uint8)
    np.testing.assert_array_equal(images.centre_crop(picture, 224), picture[16:240, 48:272])
    np.testing.assert_array_equal(
        images.centre_crop(picture.transpose(1, 0, 2), 224), picture.transpose(1, 0, 2)[48:272, 16:240]
    )
    blocks = picture.repeat(2, 0).repeat(2, 1)  # halving averages equal pixels
    np.testing.assert_array_equal(images.centre_crop(blocks, 224), picture[16:240, 48:272])


def test_random_crops_lie_inside_with_the_stated_areas_and_aspects():
    rng = np.random.default_rng(0)
    windows = np.array([images._draw_window(rng, 300, 400) for _ in range(2000)])
    top, left, rows, cols = windows.T
    assert top.min() == 0 and left.min() == 0 and (top + rows).max() == 300 and (left + cols).max() == 400
    area, aspect = rows * cols / (300 * 400), cols / rows
    assert 0.075 < area.min() < 0.09 and area.max() > 0.9, "8 to 100 %, sides rounded to whole pixels"
    assert 0.74 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.35, "3/4 to 4/3, sides rounded to whole pixels"
    assert images._draw_window(rng, 10, 1000) == (0, 495, 10, 10), "nothing fits: the centre square"


def test_random_crops_are_mirrored_half_of_the_time():
    ramp = np.broadcast_to(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], (60, 60, 3))
    rng = np.random.default_rng(0)
    crops = [images.random_resized_crop(rng, ramp, 16) for _ in range(400)]
    assert {crop.shape for crop in crops} == {(16, 16, 3)}
    mirrored = np.mean([crop[0, 0, 0] > crop[0, -1, 0] for crop in crops])
    assert abs(mirrored - 0.5) < 0.1, "four standard deviations of 400 fair draws"
