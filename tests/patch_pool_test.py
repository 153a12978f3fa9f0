"""Pools on disk: what determines them, what a round trip keeps, which damage is refused."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from jax import numpy as jnp
from jax.tree_util import Partial

from triqdef_jax import patch_pool
from triqdef_jax.patch_pool import PoolRequest

REQUEST = PoolRequest(
    source="source-a",
    num_patches=8,
    sizes_px=(2, 3),
    families=("lavan", "gap"),
    shape="square",
    num_classes=3,
    canvas_px=3,
    steps=2,
    batch_images=2,
    rotation_deg=10.0,
    scale_jitter=0.1,
    seed=1,
)


def linear(weights, images):
    return images.reshape(len(images), -1) @ weights


def linear_source():
    """A linear network on 8-px images, and images that it is judged on."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(8 * 8 * 3, 3)), jnp.float32)
    images = jnp.asarray(rng.uniform(size=(140, 8, 8, 3)), jnp.float32)
    return Partial(linear, weights), images, jnp.asarray(rng.integers(0, 3, 140))


@pytest.fixture(scope="module")
def built():
    return patch_pool.build(REQUEST, *linear_source())


@pytest.fixture
def folder(built, tmp_path):
    patch_pool.save(tmp_path / "pool", REQUEST, *built)
    return tmp_path / "pool"


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(PoolRequest)])
def test_every_field_of_a_request_changes_its_folder(field):
    value = getattr(REQUEST, field)
    other = {str: lambda v: v + "x", int: lambda v: v + 1, float: lambda v: v + 0.5, tuple: lambda v: v[:1]}[
        type(value)
    ]
    assert dataclasses.replace(REQUEST, **{field: other(value)}).folder_name != REQUEST.folder_name


def test_patches_cover_families_sizes_and_targets_evenly():
    wanted = dataclasses.replace(REQUEST, num_patches=24).patch_list()
    assert Counter(family for family, _, _ in wanted) == {"lavan": 12, "gap": 12}
    assert Counter(size for _, size, _ in wanted) == {2: 12, 3: 12}
    assert Counter(target for _, _, target in wanted) == {0: 8, 1: 8, 2: 8}
    held_out = wanted[18:]
    assert {family for family, _, _ in held_out} == {"lavan", "gap"}


def test_a_pool_holds_what_was_asked_for(built):
    pool, records = built
    wanted = REQUEST.patch_list()
    assert pool.values.shape == (8, 3, 3, 3) and pool.values.min() >= 0 and pool.values.max() <= 1
    np.testing.assert_array_equal(pool.size_px, [size for _, size, _ in wanted])
    np.testing.assert_array_equal(pool.target, [target for _, _, target in wanted])
    np.testing.assert_array_equal(pool.masks.sum(axis=(1, 2)), pool.size_px**2)
    assert [r["family"] for r in records] == [family for family, _, _ in wanted]
    assert all(np.isfinite(r["loss"]) and r["success"]["asr_correct"]["den"] >= 0 for r in records)


def test_the_same_request_gives_the_same_pool(built):
    again, _ = patch_pool.build(REQUEST, *linear_source())
    assert again.digest == built[0].digest


def test_the_last_quarter_is_held_out(built):
    train, held_out = built[0].split()
    assert (len(train.values), len(held_out.values)) == (6, 2)
    np.testing.assert_array_equal(np.concatenate([train.values, held_out.values]), built[0].values)


def test_a_round_trip_keeps_every_array_without_pickle(built, folder):
    loaded = patch_pool.load(folder, REQUEST)
    for mine, theirs in zip(loaded[:-1], built[0][:-1], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    record = json.loads((folder / patch_pool.RECORD_FILE).read_text())
    assert set(record["patches"][0]) >= {"family", "source", "size_px", "target", "loss", "success", "seed"}


def test_a_pool_is_built_once_and_then_reused(tmp_path):
    calls = []

    def source():
        calls.append(1)
        return linear_source()

    first = patch_pool.get(REQUEST, tmp_path, source)
    second = patch_pool.get(REQUEST, tmp_path, source)
    assert len(calls) == 1 and first.digest == second.digest


def flip_a_byte(folder):
    path = folder / patch_pool.ARRAYS_FILE
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def truncate(folder):
    path = folder / patch_pool.ARRAYS_FILE
    path.write_bytes(path.read_bytes()[:100])


def change_values(folder):
    """Write arrays that are well formed but not those of the record."""
    path = folder / patch_pool.ARRAYS_FILE
    with np.load(path) as arrays:
        changed = {name: arrays[name] for name in arrays} | {"values": np.zeros((8, 3, 3, 3), np.float32)}
    np.savez(path, **changed)


@pytest.mark.parametrize(
    "damage",
    [flip_a_byte, truncate, change_values, lambda f: (f / patch_pool.RECORD_FILE).unlink()],
    ids=["flipped byte", "truncated", "other values", "no record"],
)
def test_a_damaged_pool_is_refused_in_one_line_that_names_it(folder, damage):
    damage(folder)
    with pytest.raises(ValueError) as error:
        patch_pool.load(folder, REQUEST)
    text = str(error.value)
    assert str(folder) in text and "\n" not in text and "delete" in text


def test_a_pool_made_to_another_request_is_refused_with_the_field(folder):
    with pytest.raises(ValueError, match="steps is 2 there and 9 in this config"):
        patch_pool.load(folder, dataclasses.replace(REQUEST, steps=9))


def test_an_existing_pool_is_not_overwritten(built, folder):
    before = (folder / patch_pool.ARRAYS_FILE).read_bytes()
    other = built[0]._replace(values=built[0].values * 0)
    patch_pool.save(folder, REQUEST, other, built[1])
    assert (folder / patch_pool.ARRAYS_FILE).read_bytes() == before
    assert not list(folder.parent.glob(".*partial"))


def test_building_starts_from_the_seed(built):
    other, _ = patch_pool.build(dataclasses.replace(REQUEST, seed=2), *linear_source())
    assert other.digest != built[0].digest
