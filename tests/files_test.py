"""Files are whole or absent; digests see every difference that counts and no other."""

import json

import ml_collections
import ml_dtypes
import numpy as np
import pytest

from triqdef_jax import files


def test_json_is_written_with_numpy_tuples_and_configs_converted(tmp_path):
    config = ml_collections.ConfigDict({"bits": (8, 4), "lr": 0.1})
    path = tmp_path / "new" / "a.json"
    files.atomic_write_json(path, {"n": np.int64(3), "x": np.ones(2, np.float32), "c": config, 4: "k"})
    assert json.loads(path.read_text()) == {"n": 3, "x": [1.0, 1.0], "c": {"bits": [8, 4], "lr": 0.1}, "4": "k"}


def test_numbers_that_are_not_finite_become_null(tmp_path):
    files.atomic_write_json(tmp_path / "a.json", [float("nan"), np.float32("inf"), 1.0])
    assert json.loads((tmp_path / "a.json").read_text()) == [None, None, 1.0]


def test_what_has_no_json_form_is_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "a.json"
    files.atomic_write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="cannot write a set as JSON"):
        files.atomic_write_json(path, {"new": {1, 2}})
    assert json.loads(path.read_text()) == {"old": 1}


def test_a_failure_while_writing_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), files.atomic_open(path) as file:
        file.write(b"half of the n")
        raise RuntimeError("power cut")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with files.atomic_open(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_npz_comes_back_and_equal_arrays_give_equal_bytes(tmp_path):
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array([True, False])}
    files.atomic_savez(tmp_path / "a.npz", **arrays)
    files.atomic_savez(tmp_path / "b.npz", **arrays)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as loaded:
        assert sorted(loaded) == ["a", "b"]
        assert all(np.array_equal(loaded[name], arrays[name]) for name in arrays)


def test_array_digest_sees_names_dtypes_shapes_and_single_bits():
    array = np.arange(6, dtype=np.float32)
    other_bit = array.copy()
    other_bit.view(np.uint32)[3] ^= 1
    variants = [
        {"a": array},
        {"b": array},
        {"a": array.view(np.int32)},
        {"a": array.reshape(2, 3)},
        {"a": other_bit},
        {"a": array, "b": array},
        {"a": array.astype(ml_dtypes.bfloat16)},
        {"a": np.float32(1)},
    ]
    assert len({files.sha256_of_arrays(variant) for variant in variants}) == len(variants)


def test_array_digest_ignores_the_order_of_names_and_of_memory():
    array = np.arange(6).reshape(2, 3)
    assert files.sha256_of_arrays({"a": array, "b": array}) == files.sha256_of_arrays({"b": array, "a": array})
    assert files.sha256_of_arrays({"a": array}) == files.sha256_of_arrays({"a": np.asfortranarray(array)})


def test_config_hash_is_the_start_of_the_sha256_of_canonical_json():
    # By hand: printf '{"a":1,"b":[1.5,"x"]}' | sha256sum
    assert files.config_hash({"b": (1.5, "x"), "a": 1}) == "253252306831c7a5"


def test_config_hash_tells_int_from_float_but_not_list_from_tuple():
    assert files.config_hash({"a": 1}) != files.config_hash({"a": 1.0})
    assert files.config_hash({"a": [1, 2]}) == files.config_hash({"a": (1, 2)})


def test_a_directory_has_one_trainer_at_a_time(tmp_path):
    path = tmp_path / "run" / ".lock"
    with files.exclusive(path):
        with pytest.raises(ValueError, match="another process is at work"), files.exclusive(path):
            pass
    with files.exclusive(path), pytest.raises(ValueError):  # free again after the block
        files.exclusive(path).__enter__()
