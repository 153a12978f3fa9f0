"""Tests of PatchAttack on plain NumPy networks: what its policies find, bookkeeping, what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from triqdef_jax.attacks import patchattack, queries
from triqdef_jax.attacks.patchattack import PatchAttackSettings
from triqdef_jax.attacks.textures import Textures

NUM, SIDE = 16, 12
SETTINGS = PatchAttackSettings(size_px=3, num_queries=400, num_samples=20)
PLACE, TEXTURE = (2, 6), 5  # the only ones of 100 x 8 that fool the planted network


def _textures(**fields):
    """Eight flat greys, so that a crop tells its texture; classes 1, 1, 1, 1, 1, 1, 2, 0."""
    levels = 30 * np.arange(1, 9, dtype=np.float32)[:, None, None, None] / np.float32(255.0)
    classes = np.array([1] * 6 + [2, 0], np.int32)
    nowhere = np.zeros((8, 2), np.int32)
    made = Textures(levels * np.ones((8, 4, 4, 1), np.float32), classes, np.ones(8, np.float32), nowhere[:, 0], nowhere)
    return made._replace(**fields)


def _texture_of(patch):
    return np.round(np.asarray(patch.values)[:, 0, 0, 0] * 255.0 / 30.0).astype(int) - 1


def _planted_logits(images):
    """On black images, class 1 gains as the patch nears its place and its grey, and wins there alone."""
    grid, brightness = np.arange(SIDE), images[..., 0]
    total = np.maximum(brightness.sum(axis=(1, 2)), 1e-6)
    row, col = brightness.sum(axis=2) @ grid / total, brightness.sum(axis=1) @ grid / total
    miss = np.abs(row - PLACE[0] - 1) + np.abs(col - PLACE[1] - 1) + 10.0 * np.abs(total / 9 - 30 * (TEXTURE + 1) / 255)
    return np.stack([np.zeros(len(images)), 0.5 - miss, np.full(len(images), -9.0)], axis=1)


@pytest.fixture(scope="module")
def planted():
    return _planted_logits, np.zeros((NUM, SIDE, SIDE, 1), np.float32), np.zeros(NUM, np.int32)


@pytest.fixture(scope="module")
def run(planted):
    return patchattack.attack(jax.random.key(0), *planted, SETTINGS, textures=_textures())


def test_the_planted_texture_is_found_at_its_place_far_more_often_than_by_chance(run):
    patch, info = run
    # 400 uniform draws out of 700 allowed ones (not the label's texture) would hit with p = 0.44, 16 times with 2e-6.
    assert info["success"].all()
    assert set(_texture_of(patch)) == {TEXTURE}
    np.testing.assert_array_equal(np.stack(info["placements"][:2], axis=1), np.broadcast_to([3.0, 7.0], (NUM, 2)))


def test_queries_are_the_images_sent_in_whole_batches_until_success(planted, run):
    logits_fn, images, labels = planted
    sent = []

    def counting(images):
        sent.append(len(images))
        return logits_fn(images)

    settings = PatchAttackSettings(size_px=3, num_queries=59, num_samples=20, batch_images=1)
    _, info = patchattack.attack(jax.random.key(2), counting, images[:2], labels[:2], settings, textures=_textures())
    assert set(sent) == {1} and sum(sent) == info["queries"].sum() + 2 * 2  # a clean look and a measurement each
    assert not info["success"].any() and info["queries"].tolist() == [40, 40]
    queries_asked = run[1]["queries"]
    assert (queries_asked % 20 == 0).all() and len(set(queries_asked)) > 1 and queries_asked.max() <= 400


def test_the_best_sample_of_all_is_kept_and_nothing_changes_outside_the_patch(planted):
    logits_fn, images, labels = planted
    tried = []

    def recording(images):
        tried.append(queries.log_success(logits_fn(images).astype(np.float32), np.zeros(len(images), int), -1))
        return logits_fn(images)

    settings = dataclasses.replace(SETTINGS, num_queries=60, stop_when_fooled=False, batch_images=20 * NUM)
    patch, info = patchattack.attack(jax.random.key(3), recording, images, labels, settings, textures=_textures())
    search, final = np.stack(tried[1:-1]).reshape(3, NUM, 20), tried[-1][:NUM]
    assert (search.min(axis=(0, 2)) < search.max(axis=(0, 2))).all()
    np.testing.assert_array_equal(final, search.max(axis=(0, 2)))
    np.testing.assert_allclose(-info["loss"], final, rtol=1e-6)  # the loss is float32
    assert patch.masks.shape == (NUM, 3, 3)
    for image, values, row, col in zip(info["images"], np.asarray(patch.values), *info["placements"][:2], strict=True):
        expected = np.zeros((SIDE, SIDE, 1), np.float32)
        expected[int(row) - 1 : int(row) + 2, int(col) - 1 : int(col) + 2] = values
        np.testing.assert_array_equal(image, expected)


def test_the_same_key_gives_the_same_patches(planted, run):
    patch, info = patchattack.attack(jax.random.key(0), *planted, SETTINGS, textures=_textures())
    np.testing.assert_array_equal(patch.values, run[0].values)
    np.testing.assert_array_equal(info["queries"], run[1]["queries"])
    _, other = patchattack.attack(jax.random.key(1), *planted, SETTINGS, textures=_textures())
    assert np.any(other["queries"] != info["queries"])  # all find the same patch, on other ways


def test_more_images_than_policies_are_attacked_in_chunks(planted):
    logits_fn, images, labels = planted
    settings = dataclasses.replace(SETTINGS, num_queries=20, batch_images=NUM)
    more, zeros = np.repeat(images, 2, axis=0)[:-1], np.repeat(labels, 2)[:-1]  # the last chunk is short of one
    patch, info = patchattack.attack(jax.random.key(0), logits_fn, more, zeros, settings, textures=_textures())
    assert (info["queries"] == 20).all() and (info["images"] != more).any(axis=(1, 2, 3)).all()
    assert np.any(np.asarray(patch.values)[:NUM][: NUM - 1] != np.asarray(patch.values)[NUM:])


def test_classes_of_textures_follow_the_goal(planted):
    logits_fn, images, _ = planted
    labels = np.repeat([0, 1], NUM // 2).astype(np.int32)
    few = dataclasses.replace(SETTINGS, num_queries=20, stop_when_fooled=False)
    patch, _ = patchattack.attack(jax.random.key(0), logits_fn, images, labels, few, textures=_textures())
    assert set(_texture_of(patch)[:8]) <= {0, 1, 2, 3, 4, 5, 6} and set(_texture_of(patch)[8:]) <= {6, 7}
    aimed = dataclasses.replace(few, target=2)
    patch, info = patchattack.attack(jax.random.key(0), logits_fn, images, labels, aimed, textures=_textures())
    assert set(_texture_of(patch)) == {6} and patch.target.tolist() == [2] * NUM
    np.testing.assert_array_equal(info["success"], info["predictions"] == 2)


def test_agents_add_one_square_each(planted):
    _, images, labels = planted
    # Every bright pixel helps and none is enough: two squares change more than one can.
    bright = lambda images: np.stack([np.full(len(images), 99.0), images.sum(axis=(1, 2, 3)), np.zeros(len(images))], 1)
    settings = dataclasses.replace(SETTINGS, num_queries=40, num_agents=2)
    patch, info = patchattack.attack(jax.random.key(4), bright, images, labels, settings, textures=_textures())
    changed = (info["images"] != images).sum(axis=(1, 2, 3))
    assert (changed > 9).all() and (changed <= 18).all() and info["queries"].tolist() == [40] * NUM
    assert patch.masks.shape == (NUM, SIDE, SIDE)
    np.testing.assert_array_equal(np.asarray(patch.masks).sum(axis=(1, 2)), changed)


def test_mpa_finds_one_rectangle_in_one_colour_and_makes_it_small():
    labels = np.zeros(4, np.int32)
    images = np.full((4, 8, 8, 1), 0.5, np.float32)
    # Fooled by any bright pixel in the upper left quarter.
    logits_fn = lambda images: np.stack([np.full(len(images), 0.8), images[:, :4, :4].max(axis=(1, 2, 3))], axis=1)
    settings = PatchAttackSettings(size_px=4, kind="mpa", num_queries=400, num_samples=20, stop_when_fooled=False)
    patch, info = patchattack.attack(jax.random.key(5), logits_fn, images, labels, settings)
    assert info["success"].all() and (info["queries"] == 400).all()
    areas = np.asarray(patch.masks).sum(axis=(1, 2))
    assert (areas <= 2).all()  # a uniform draw has 5 pixels on average
    for values, mask in zip(np.asarray(patch.values), np.asarray(patch.masks), strict=True):
        assert len(np.unique(values[mask > 0])) == 1 and values[mask > 0][0] > 0.8
    first = dataclasses.replace(settings, stop_when_fooled=True)
    _, info = patchattack.attack(jax.random.key(5), logits_fn, images, labels, first)
    assert info["success"].all() and info["queries"].max() < 400


def test_gradients_are_never_read(planted):
    @jax.custom_vjp
    def guarded(images):
        return images.reshape(images.shape[0], -1)[:, :3]

    def _forward(images):
        raise AssertionError("a query attack differentiated the network")

    guarded.defvjp(_forward, lambda residuals, cotangent: (cotangent,))
    with pytest.raises(AssertionError, match="differentiated"):  # the guard works
        jax.grad(lambda images: guarded(images).sum())(jnp.ones((1, SIDE, SIDE, 1)))
    _, images, labels = planted
    few = dataclasses.replace(SETTINGS, num_queries=40)
    arrays = (jnp.array(images), jnp.array(labels))
    _, info = patchattack.attack(jax.random.key(0), jax.jit(guarded), *arrays, few, textures=_textures())
    assert info["queries"].max() <= 40


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(size_px=0), "size_px: expected a positive number"),
        (dict(size_px=3, kind="hpa"), "kind: expected one of .*'tpa', 'mpa'.*, got 'hpa'"),
        (dict(size_px=3, target=-2), "target: expected a class >= 0 or -1"),
        (dict(size_px=3, num_samples=1), "num_samples: expected 2 or more"),
        (dict(size_px=3, num_queries=60, num_agents=2), "num_queries: expected num_agents x num_samples = 100 or more"),
        (dict(size_px=3, kind="mpa", num_agents=2), "num_agents: expected 1 for kind 'mpa'"),
        (dict(size_px=13), "size_px: expected a patch that fits into 12 x 12 px, got 13"),
        (dict(size_px=5), r"textures: expected \[K, T, T, 1\] with T >= size_px=5"),
        (dict(size_px=3, target=3), r"textures: expected some of target class 3, got classes \[0, 1, 2\]"),
        (dict(size_px=3, kind="mpa", target=3), "target: expected classes below the network's 3 logits"),
    ],
)
def test_bad_input_is_refused_in_one_line(planted, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        patchattack.attack(jax.random.key(0), *planted, PatchAttackSettings(**fields), textures=_textures())
    assert "\n" not in str(caught.value)


def test_a_missing_dictionary_is_refused_with_what_to_do(planted):
    with pytest.raises(ValueError, match="make one with textures"):
        patchattack.attack(jax.random.key(0), *planted, SETTINGS)
    own = _textures(classes=np.zeros(8, np.int32))
    with pytest.raises(ValueError, match="a class other than each image's"):
        patchattack.attack(jax.random.key(0), *planted, SETTINGS, textures=own)
