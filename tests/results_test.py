"""Result records: numbers recomputable from outcomes, tables, files."""

import json

import numpy as np
import pytest

from triqdef_jax import config as config_lib
from triqdef_jax import results
from triqdef_jax.results import Cell, Outcomes

TARGETS = ("32", "4")
LABELS = np.array([0, 0, 1, 1, 2, 2])
ABOUT = {"attack": "lavan", "surrogate": "fp", "access": "transfer"}


@pytest.fixture
def outcomes():
    """Two bit-widths, six images, two patches (targets 2 and 0), one attack on the last three images; every count below is by hand."""
    clean = np.array([[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0]], np.int32)
    first = np.array([[2, 0, 2, 1, 2, 2], [0, 0, 0, 1, 2, 2]], np.int32)
    second = np.array([[2, 2, 2, 2, 2, 2], [0, 1, 0, 1, 0, 0]], np.int32)
    pool = Cell("held-out", ABOUT, np.stack([first, second]), np.array([2, 0], np.int32), np.arange(6), "digest")
    single = np.array([[[1, 2, 0]], [[0, 0, 2]]], np.int32)
    about = ABOUT | {"access": "white-box", "attack": "patch_pgd", "surrogate": "self:4"}
    own = Cell("own", about, single, np.array([-1], np.int32), np.array([3, 4, 5]), "other")
    return Outcomes(TARGETS, LABELS, np.arange(6), clean, (pool, own))


def summary_of(outcomes):
    return results.summarise(outcomes, seed=0)


def test_counts_are_those_of_the_hand(outcomes):
    summary = summary_of(outcomes)
    assert summary["clean_accuracy"]["32"]["num"] == 6
    assert summary["clean_accuracy"]["4"]["num"] == 4
    rates = summary["cells"][0]["success"]["32"]
    # Patch 1 (target 2): images 0-3 count, 0 and 2 fell. Patch 2 (target 0): images 2-5 count, 2 fell.
    assert (rates["asr_correct"]["num"], rates["asr_correct"]["den"]) == (3, 8)
    assert rates["asr_correct"]["per_patch"] == [{"num": 2, "den": 4}, {"num": 1, "den": 4}]
    # Target reached: images 0 and 2 under patch 1, image 2 under patch 2.
    assert (rates["tsr"]["num"], rates["tsr"]["den"]) == (3, 8)
    assert rates["tsr_clean"]["num"] == 0


def test_a_cell_on_some_of_the_images_counts_those_alone(outcomes):
    rates = summary_of(outcomes)["cells"][1]["success"]
    # 32 bits: images 3, 4, 5 were right, 3 and 4 stay right... 5 fell. 4 bits: 3 and 4 were right and fell; 5 was wrong before.
    assert (rates["32"]["asr_correct"]["num"], rates["32"]["asr_correct"]["den"]) == (1, 3)
    assert (rates["4"]["asr_correct"]["num"], rates["4"]["asr_correct"]["den"]) == (2, 2)
    assert rates["32"]["tsr"]["den"] == 0 and np.isnan(rates["32"]["tsr"]["rate"])


def test_images_wrong_before_the_patch_do_not_count_as_successes(outcomes):
    rates = summary_of(outcomes)["cells"][0]["success"]["4"]
    # Right before, not of the target class: patch 1 images 0, 2, 3; patch 2 images 2, 3, 4.
    assert rates["asr_correct"]["den"] == 6
    assert rates["robust_acc"]["den"] == 12


def test_intervals_contain_their_estimate_and_lie_in_the_unit_range(outcomes):
    for cell in summary_of(outcomes)["cells"]:
        for rates in cell["success"].values():
            for rate in rates.values():
                assert not rate["den"] or 0 <= rate["low"] <= rate["rate"] <= rate["high"] <= 1


def record_of(outcomes, name="runs/one"):
    described = results.describe(config_lib.default(), workdir=name, step=7, deployed=False)
    return described | {"preset": "quick"} | summary_of(outcomes)


def test_every_rate_of_a_record_can_be_recomputed_from_the_saved_outcomes(outcomes, tmp_path):
    record = json.loads(results.save(tmp_path, "quick", record_of(outcomes), outcomes).read_text())
    arrays = np.load(tmp_path / "quick_outcomes.npz", allow_pickle=False)
    num_checked = 0
    for cell in record["cells"]:
        patched, target, rows = (arrays[f"{field}:{cell['name']}"] for field in ("predictions", "target", "rows"))
        labels, aimed = arrays["labels"][rows], (target >= 0)[:, None]
        other = labels != target[:, None]
        for k, name in enumerate(record["targets"]):
            clean, now = arrays["clean"][k][rows], patched[k]
            was_right = np.broadcast_to(clean == labels, now.shape) & other
            expected = {
                "asr_correct": (was_right & (now != labels), was_right),
                "robust_acc": (now == labels, np.ones(now.shape)),
                "asr_all": (now != clean, np.ones(now.shape)),
                "tsr": (aimed & other & (now == target[:, None]), aimed & other),
                "tsr_clean": (aimed & other & (clean == target[:, None]), aimed & other),
            }
            for rate, (num, den) in expected.items():
                said = cell["success"][name][rate]
                assert [said[key] for key in ("num", "den")] == [num.sum(), den.sum()]
                assert said["rate"] == (num.sum() / den.sum() if den.sum() else None)
                num_checked += 1
    assert num_checked == 2 * 2 * 5
    assert record["versions"]["jax"] and record["threat_model"] and record["definitions"]


def test_a_saved_record_reads_back_with_its_outcomes(outcomes, tmp_path):
    path = results.save(tmp_path, "quick", record_of(outcomes), outcomes)
    record, read = results.load(path)
    assert record["targets"] == list(TARGETS)
    for one, other in zip(outcomes.cells, read.cells, strict=True):
        np.testing.assert_array_equal(one.predictions, other.predictions)
        assert (one.name, one.digest) == (other.name, other.digest) and other.about["access"] == one.about["access"]
    (tmp_path / "quick_outcomes.npz").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"quick.json cannot be read .*evaluate again"):
        results.load(path)
    with pytest.raises(FileNotFoundError, match="no record"):
        results.load(tmp_path / "full.json")


def test_right_under_every_patch_is_the_worst_of_the_patches(outcomes):
    pool, own = outcomes.cells
    np.testing.assert_array_equal(outcomes.correct(pool)[0], [False, True, False, True, True, True])
    np.testing.assert_array_equal(outcomes.correct(own)[1], [False, False, True])


def test_tables_have_a_line_per_bit_width_and_the_printed_rates(outcomes):
    lines = results.table(record_of(outcomes)).splitlines()
    assert [line.split()[0] for line in lines] == ["bits", "32", "4"]
    assert "100.0 %" in lines[1] and "37.5 %" in lines[1]


def test_records_of_many_cells_have_a_line_per_cell(outcomes):
    record = record_of(outcomes._replace(cells=(*outcomes.cells, outcomes.cells[1]._replace(name="again"))))
    lines = results.table(record).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "bits",
        "clean accuracy",
        "asr: held-out",
        "asr: own",
        "asr: again",
    ]


def test_runs_that_met_different_patches_are_not_set_side_by_side(outcomes):
    one, other = record_of(outcomes), record_of(outcomes, "runs/other")
    assert "other: asr" in results.side_by_side([one, other], "held-out")
    other["cells"][0]["digest"] = "another"
    with pytest.raises(ValueError, match="met different patches"):
        results.side_by_side([one, other], "held-out")
