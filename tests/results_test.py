"""Result records: numbers recomputable from outcomes, tables, files."""

import json

import numpy as np
import pytest

from triqdef_jax import config as config_lib
from triqdef_jax import results
from triqdef_jax.results import Outcomes, PoolOutcomes

BITS = (32, 4)
LABELS = np.array([0, 0, 1, 1, 2, 2])


@pytest.fixture
def outcomes():
    """Two bit-widths, six images, two patches (targets 2 and 0); every count below is by hand."""
    clean = np.array([[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0]], np.int32)
    first = np.array([[2, 0, 2, 1, 2, 2], [0, 0, 0, 1, 2, 2]], np.int32)
    second = np.array([[2, 2, 2, 2, 2, 2], [0, 1, 0, 1, 0, 0]], np.int32)
    pool = PoolOutcomes(np.stack([first, second]), np.array([2, 0], np.int32), "digest")
    return Outcomes(LABELS, np.arange(6), clean, {"held-out": pool})


def test_counts_are_those_of_the_hand(outcomes):
    summary = results.summarise(outcomes, BITS, seed=0)
    assert summary["clean_accuracy"]["32"]["num"] == 6
    assert summary["clean_accuracy"]["4"]["num"] == 4
    rates = summary["pools"]["held-out"]["bits"]["32"]
    # Patch 1 (target 2): images 0-3 count, 0 and 2 fell. Patch 2 (target 0): images 2-5 count, 2 fell.
    assert (rates["asr_correct"]["num"], rates["asr_correct"]["den"]) == (3, 8)
    assert rates["asr_correct"]["per_patch"] == [{"num": 2, "den": 4}, {"num": 1, "den": 4}]
    # Target reached: images 0 and 2 under patch 1, image 2 under patch 2.
    assert (rates["tsr"]["num"], rates["tsr"]["den"]) == (3, 8)
    assert rates["tsr_clean"]["num"] == 0


def test_images_wrong_before_the_patch_do_not_count_as_successes(outcomes):
    rates = results.summarise(outcomes, BITS, seed=0)["pools"]["held-out"]["bits"]["4"]
    # Right before, not of the target class: patch 1 images 0, 2, 3; patch 2 images 2, 3, 4.
    assert rates["asr_correct"]["den"] == 6
    assert rates["robust_acc"]["den"] == 12


def test_intervals_contain_their_estimate_and_lie_in_the_unit_range(outcomes):
    for pool in results.summarise(outcomes, BITS, seed=0)["pools"].values():
        for rates in pool["bits"].values():
            for rate in rates.values():
                assert 0 <= rate["low"] <= rate["rate"] <= rate["high"] <= 1


def record_of(outcomes, name="runs/one"):
    config = config_lib.default()
    return results.describe(config, results.summarise(outcomes, BITS, seed=0), workdir=name, step=7, deployed=False)


def test_saved_outcomes_recompute_the_record(outcomes, tmp_path):
    path = results.save(tmp_path, "evaluation", record_of(outcomes), outcomes)
    record = json.loads(path.read_text())
    with np.load(tmp_path / "evaluation_outcomes.npz", allow_pickle=False) as arrays:
        clean, labels = arrays["clean"], arrays["labels"]
        patched, target = arrays["predictions:held-out"], arrays["target:held-out"]
    for row, bits in enumerate(record["clean_accuracy"]):
        counted = (clean[row] == labels) & (labels != target[:, None])
        fooled = counted & (patched[row] != labels)
        rate = record["pools"]["held-out"]["bits"][bits]["asr_correct"]
        assert (rate["num"], rate["den"]) == (fooled.sum(), counted.sum())
    assert record["versions"]["jax"] and record["threat_model"] and record["definitions"]


def test_tables_have_a_line_per_bit_width_and_the_printed_rates(outcomes):
    lines = results.table(record_of(outcomes)).splitlines()
    assert [line.split()[0] for line in lines] == ["bits", "32", "4"]
    assert "100.0 %" in lines[1] and "37.5 %" in lines[1]


def test_runs_that_met_different_patches_are_not_set_side_by_side(outcomes):
    one, other = record_of(outcomes), record_of(outcomes, "runs/other")
    assert "other: asr" in results.side_by_side([one, other], "held-out")
    other["pools"]["held-out"]["digest"] = "another"
    with pytest.raises(ValueError, match="met different patches"):
        results.side_by_side([one, other], "held-out")
