"""Patch pools: what determines them, what they hold, round trip on disk, and refusals of what is not the pool asked for."""

import collections
import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from jax.tree_util import Partial

from triqdef_jax import patch_pool
from triqdef_jax.patch_pool import ARRAYS_FILE, RECORD_FILE, PatchPool, PoolRequest

REQUEST = PoolRequest(
    source="source-0",
    num_patches=8,
    sizes_px=(2, 3),
    families=("lavan", "gap"),
    shape="square",
    num_classes=5,
    canvas_px=3,
    steps=3,
    batch_images=2,
    source_images=140,
    rotation_deg=10.0,
    scale_jitter=0.1,
    seed=0,
)


def colour_logits(weights, images):
    return images.mean(axis=(1, 2)) @ weights


def source():
    """A small network and images, more than the 128 that judge the patches."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, 5)).astype(np.float32)
    images = rng.random((140, 8, 8, 3), np.float32)
    return Partial(colour_logits, weights), images, rng.integers(0, 5, 140).astype(np.int32)


@pytest.fixture(scope="module")
def built():
    return patch_pool.build(REQUEST, *source())


@pytest.fixture
def folder(built, tmp_path):
    path = tmp_path / REQUEST.folder_name
    patch_pool.save(path, REQUEST, *built)
    return path


def must_not_build():
    raise AssertionError("the pool is there already")


def assert_same(pool_a, pool_b):
    assert pool_a.digest == pool_b.digest
    for a, b in zip(pool_a[:-1], pool_b[:-1], strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def assert_refused(folder, *said, request=REQUEST):
    with pytest.raises(ValueError) as refusal:
        patch_pool.load(folder, request)
    message = str(refusal.value)
    assert "\n" not in message and str(folder) in message
    assert all(part in message for part in said), message


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(PoolRequest)])
def test_every_field_of_a_request_changes_its_folder(field):
    value = getattr(REQUEST, field)
    other = value + value if isinstance(value, str | tuple) else value + 1
    assert dataclasses.replace(REQUEST, **{field: other}).folder_name != REQUEST.folder_name
    assert dataclasses.replace(REQUEST, **{field: value}).folder_name == REQUEST.folder_name


def test_patches_cover_families_sizes_and_targets_evenly_in_the_whole_and_in_the_held_out_quarter():
    wanted = dataclasses.replace(REQUEST, num_patches=80).patch_list()
    for part, count in ((wanted, 20), (wanted[60:], 5)):
        kinds = collections.Counter((family, size) for family, size, _ in part)
        assert kinds == dict.fromkeys([("lavan", 2), ("gap", 2), ("lavan", 3), ("gap", 3)], count)
        targets = collections.Counter(target for *_, target in part)
        assert set(targets) == set(range(5)) and max(targets.values()) == min(targets.values())


def test_a_built_pool_holds_the_patches_asked_for_in_order(built):
    pool, records = built
    wanted = REQUEST.patch_list()
    assert [(r["family"], r["size_px"], r["target"]) for r in records] == wanted
    np.testing.assert_array_equal(pool.size_px, [size for _, size, _ in wanted])
    np.testing.assert_array_equal(pool.target, [target for *_, target in wanted])
    np.testing.assert_array_equal(pool.masks.sum(axis=(1, 2)), pool.size_px**2)
    assert pool.values.shape == (8, 3, 3, 3) and pool.values.dtype == np.float32
    assert 0 <= pool.values.min() and pool.values.max() <= 1
    assert (pool.values * (1 - pool.masks[..., None]) == 0).all()
    assert len({patch.tobytes() for patch in pool.values}) == 8


def test_the_same_seed_builds_the_same_pool_and_another_seed_another(built):
    request = dataclasses.replace(REQUEST, families=("lavan",), num_patches=4)
    first, again, other = (
        patch_pool.build(dataclasses.replace(request, seed=seed), *source())[0] for seed in (0, 0, 1)
    )
    assert_same(first, again)
    assert first.digest != other.digest


def test_get_builds_once_and_then_reads(built, tmp_path):
    request = dataclasses.replace(REQUEST, families=("lavan",), num_patches=4)
    pool = patch_pool.get(request, tmp_path, source)
    assert_same(pool, patch_pool.get(request, tmp_path, must_not_build))
    assert_same(pool, patch_pool.get(request, "nowhere", must_not_build, explicit=str(tmp_path / request.folder_name)))


def test_a_pool_is_read_as_it_was_saved_without_pickle(built, folder):
    assert_same(patch_pool.load(folder, REQUEST), built[0])
    with np.load(folder / ARRAYS_FILE, allow_pickle=False) as arrays:
        assert set(arrays) == {"values", "masks", "size_px", "target"}
    record = json.loads((folder / RECORD_FILE).read_text())
    assert len(record["patches"]) == 8 and record["digest"] == built[0].digest
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]  # nothing half-written is left


def test_the_last_quarter_is_held_out(built):
    pool = built[0]
    train, held_out = pool.split()
    assert (len(train.values), len(held_out.values)) == (6, 2)
    assert train.digest == held_out.digest == pool.digest
    for whole, first, last in zip(pool[:-1], train[:-1], held_out[:-1], strict=True):
        np.testing.assert_array_equal(np.concatenate([first, last]), whole)
    sizes = [len(part.values) for part in PatchPool(*(x[:7] for x in pool[:-1]), "").split()]
    assert sizes == [6, 1]


@pytest.mark.parametrize("name", ["values", "masks", "size_px", "target"])
def test_a_flipped_bit_in_any_array_is_refused(folder, built, name):
    path = folder / ARRAYS_FILE
    content = bytearray(path.read_bytes())
    data = getattr(built[0], name).tobytes()
    content[content.index(data) + len(data) // 2] ^= 1
    path.write_bytes(content)
    assert_refused(folder, f"delete {folder} to have it built again")


def test_arrays_that_are_whole_but_not_those_of_the_record_are_refused(folder, built):
    pool = built[0]
    np.savez(folder / ARRAYS_FILE, **{**pool._asdict(), "target": pool.target[::-1]})
    assert_refused(folder, "is damaged", "digest")


def test_a_half_written_pool_is_refused(folder):
    whole = folder.with_name("whole")
    shutil.copytree(folder, whole)
    for name in (ARRAYS_FILE, RECORD_FILE):
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
        assert_refused(folder, "cannot be read", "delete")
        (folder / name).unlink()
        assert_refused(folder, "cannot be read", name, "delete")


def test_a_pool_made_to_another_request_is_refused_and_the_field_named(folder):
    request = dataclasses.replace(REQUEST, steps=4)
    assert_refused(folder, "steps is 3 there and 4 in this config", request=request)
    request = dataclasses.replace(REQUEST, families=("gap", "lavan"))
    assert_refused(folder, "families is ['lavan', 'gap'] there and ['gap', 'lavan'] in this config", request=request)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not a pool")
    assert_refused(tmp_path, "cannot be read")
    (tmp_path / RECORD_FILE).write_text("[]")
    np.savez(tmp_path / ARRAYS_FILE, values=np.zeros(3))
    assert_refused(tmp_path, "cannot be read")


def test_saving_leaves_an_existing_pool_alone_and_clears_what_a_killed_save_left(folder, built):
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir()
    (partial / "half").write_text("")
    before = (folder / ARRAYS_FILE).stat().st_ino
    patch_pool.save(folder, REQUEST, *built)
    assert (folder / ARRAYS_FILE).stat().st_ino == before
    shutil.rmtree(folder)
    patch_pool.save(folder, REQUEST, *built)
    assert sorted(path.name for path in pathlib.Path(folder).iterdir()) == sorted([ARRAYS_FILE, RECORD_FILE])
