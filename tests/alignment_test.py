"""Alignment of a network with itself is 1, rows agree with values per image, files re-read, runs compare only on equal terms."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from triqdef_jax import alignment, files, patch_pool, probes, runs, similarity, sources, transfer
from triqdef_jax.objectives.penalties import INPUT_GRADIENT
from triqdef_jax.patch_pool import PatchPool

BITS = (32, 4)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def workdir(tiny_run, tmp_path_factory):
    """A copy of the finished tiny run whose patch pool lies ready, four random patches of 3 px."""
    folder = tmp_path_factory.mktemp("alignment")
    copied = folder / "tiny"
    shutil.copytree(tiny_run[0], copied)
    config = runs.read_config(copied)
    config.eval.batch_size = 4
    config.patches.update(shared_dir=str(folder / "shared"), pool_size=8, sizes_px=(3,))
    files.atomic_write_json(copied / "config.json", config)
    request = sources.request(config, 0, (3,), 8)
    values = RNG.integers(0, 256, (8, 3, 3, 3)).astype(np.float32) / 255
    pool = PatchPool(values, np.ones((8, 3, 3), np.float32), np.full(8, 3, np.int32), np.arange(8, dtype=np.int32), "")
    pool = pool._replace(digest=patch_pool.digest(pool))
    patch_pool.save(folder / "shared" / request.folder_name, request, pool, [])
    return copied


@pytest.fixture(scope="module")
def tiny(workdir, tiny_run):
    trained = runs.load_trained(workdir)
    return trained, [probes.one_bit(trained, b) for b in BITS], *probes.first_test_images(tiny_run[1], 6)


@pytest.fixture(scope="module")
def record(workdir):
    return alignment.make_record(workdir, num_images=6, is_independent=False, num_steps=0)


def test_a_network_aligns_perfectly_with_itself_and_less_with_another_bit_width(tiny):
    _, (full, four), images, labels = tiny
    found = alignment.measure([full, full], images, labels, batch_size=4)
    other = alignment.measure([full, four], images, labels, batch_size=4)
    assert set(found.values) == {"stem", "stage1", INPUT_GRADIENT}
    for name, measures in found.values.items():
        for measure in set(measures) - {"soft_dice", "edge_iou"}:
            np.testing.assert_allclose(measures[measure].value, 1.0, rtol=1e-5, err_msg=f"{name} {measure}")
        assert set(np.unique(measures["edge_iou"].value)) <= {0.0, 1.0}  # 0 where a map is flat
    gradients = (run.values[INPUT_GRADIENT]["cosine"].value.mean() for run in (found, other))
    assert next(gradients) > next(gradients) + 0.01


def test_the_last_batch_reaches_back_and_changes_no_value(tiny):
    _, networks, images, labels = tiny
    whole, first, last = (
        alignment.measure(networks, images[rows], labels[rows], batch_size=4).values
        for rows in (slice(6), slice(4), slice(2, 6))
    )
    for name, measures in whole.items():
        for measure, found in measures.items():
            np.testing.assert_array_equal(found.value[:, :2], first[name][measure].value[:, :2])
            np.testing.assert_array_equal(found.value[:, 2:], last[name][measure].value)
            np.testing.assert_array_equal(found.chance[:, 2:], last[name][measure].chance)


def test_less_than_two_networks_or_images_are_refused(tiny):
    _, networks, images, labels = tiny
    with pytest.raises(ValueError, match="2 bit-widths and 2 images or more, got 1 and 6"):
        alignment.measure(networks[:1], images, labels, batch_size=4)


def synthetic(num_bits, num_images):
    pairs = len(similarity.all_pairs(num_bits))
    return {
        name: {
            measure: similarity.PairValues(*RNG.uniform(0, 1, (2, pairs, num_images)).astype(np.float32))
            for measure in ("cosine", "hog_cosine_centred")
        }
        for name in (INPUT_GRADIENT, "stage1", "stem")
    }


def test_rows_are_means_of_the_values_with_pairs_of_the_float_network_apart():
    values, bits = synthetic(3, 40), (8, 32, 4)
    rows = alignment.pair_rows(values, bits, seed=0, network="shared", images="clean")
    assert [row["map"] for row in rows[::6]] == ["stem", "stage1", INPUT_GRADIENT]
    assert [(row["a"], row["b"], row["kind"]) for row in rows[:3]] == [
        ("8", "32", "fp-b"),
        ("8", "4", "b-b"),
        ("32", "4", "fp-b"),
    ]
    first = values["stem"]["cosine"]
    assert rows[1]["value"] == pytest.approx(first.value[1].mean(), rel=1e-5)
    assert rows[1]["chance"] == pytest.approx(first.chance[1].mean(), rel=1e-5)
    assert rows[1]["low"] < rows[1]["value"] < rows[1]["high"]
    fp, quantized = alignment.group_rows(values, bits, seed=0, network="shared", images="clean")[:2]
    assert (fp["kind"], fp["num_pairs"], quantized["num_pairs"]) == ("fp-b", 2, 1)
    assert fp["value"] == pytest.approx(first.value[[0, 2]].mean(), rel=1e-5)
    assert fp["excess"] == pytest.approx((first.value - first.chance)[[0, 2]].mean(), abs=1e-5)
    assert fp["excess_low"] < fp["excess"] < fp["excess_high"]


def test_prediction_ranks_pairs_by_alignment_and_transfer():
    values = synthetic(4, 10)
    upper = np.triu_indices(4, k=1)
    success = np.zeros((4, 4))
    success[upper] = values["stem"]["cosine"].value.mean(axis=1)  # transfer follows this measure exactly, one way
    moved = transfer.Transfer(success, "by hand")
    rows = alignment.prediction_rows(values, moved, seed=0, network="shared", images="clean")
    assert rows[0]["map"] == "stem" and rows[0]["measure"] == "cosine"
    assert rows[0]["rho"] == pytest.approx(1.0) and rows[0]["num_pairs"] == 6 and rows[0]["p"] <= 2 / 24
    assert all(row["rho"] < 1.0 for row in rows[1:])


def test_a_record_holds_every_pair_map_and_measure_and_reads_back(record, tmp_path):
    files.atomic_write_json(tmp_path / "alignment.json", record)
    assert json.loads((tmp_path / "alignment.json").read_text()) == record
    assert (record["kind"], record["name"], record["num_images"]) == ("alignment", "tiny", 6)
    found = {(row["images"], row["map"]): 0 for row in record["pairs"]}
    for row in record["pairs"]:
        assert (row["a"], row["b"], row["kind"], row["network"]) == ("32", "4", "fp-b", "shared")
        assert row["low"] <= row["value"] <= row["high"] and row["value"] <= 1.0 + 1e-6
        found[row["images"], row["map"]] += 1
    assert len(found) == 2 * 3 and set(found.values()) == {len(similarity.MEASURES)}
    assert record["prediction"] == [] and record["transfer"] == []


def test_patched_images_are_measured_apart_from_clean_ones(record):
    by_set = {
        image_set: [row for row in record["pairs"] if row["images"] == image_set] for image_set in ("clean", "patched")
    }
    assert len(by_set["clean"]) == len(by_set["patched"])
    # Six images of an 8-step network: some pair of rows differs by far more than rounding.
    assert max(abs(a["value"] - b["value"]) for a, b in zip(*by_set.values(), strict=True)) > 0.01


def test_printed_numbers_are_the_records(record):
    row = next(row for row in record["groups"] if row["map"] == INPUT_GRADIENT and row["measure"] == "cosine")
    line = next(
        line
        for line in alignment.table(record, "shared", "clean").splitlines()
        if line.startswith("input_gradient  cosine")
    )
    assert f"{row['value']:.3f} [" in line and f"({row['chance']:.3f})" in line
    lines = alignment.reading(record)
    assert lines[0].startswith("shared, clean, fp-b: above chance in")
    assert f"cosine {row['value']:.2f} (chance {row['chance']:.2f})" in lines[0]


def test_runs_stand_side_by_side_and_only_on_equal_images_and_patches(record):
    other = record | {"name": "other"}
    head = alignment.side_by_side([record, other], "shared", "patched").splitlines()[0]
    assert "tiny: fp-b" in head and "other: fp-b" in head
    with pytest.raises(ValueError, match="different images or patches"):
        alignment.side_by_side([record, other | {"patches_digest": "x"}], "shared", "clean")


def test_the_reading_says_how_many_small_p_values_luck_brings():
    rows = [
        {"network": "shared", "rho": rho, "p": p, "num_pairs": 10, "weakest": -0.5}
        for rho, p in ((0.9, 0.01), (0.1, 0.8))
    ]
    about = {"network": "shared", "images": "clean", "share": {"32": 0.0, "2": 0.25}}
    moved = {"network": "shared", "origin": "by hand", "success": [[0.9, 0.1], [0.2, 0.8]]}
    lines = alignment.reading({"zero_gradient": [about], "groups": [], "transfer": [moved], "prediction": rows})
    assert lines[0] == "shared, clean: input gradients that are all zero: 25.0 % at 2 bits"
    assert "transfer from by hand: success on other bit-widths 10.0 to 20.0 %" in lines[1]
    assert "rho 0.10 to 0.90, median 0.50, median -0.50 without the bit-width that matters most" in lines[2]
    assert "p < 0.05 in 1 of 2 measures (by luck 0.1)" in lines[2]


def test_a_missing_workdir_is_one_line_and_exit_code_two():
    done = subprocess.run([sys.executable, "-m", "triqdef_jax.alignment"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: --workdirs=DIR[,DIR] is needed: the directories of trained runs\n"
