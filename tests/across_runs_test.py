"""Comparison of runs: paired counts by hand, runs that cannot be compared, means over seeds; all on hand-made outcomes."""

import numpy as np
import pytest
from outcomes_example import make_cell, make_outcomes, record_of
from scipy import stats

from triqdef_jax import across_runs


def test_a_comparison_counts_discordant_images_and_adjusts_for_all_its_tests():
    a, b = make_outcomes(make_cell("x", 2), make_cell("y", 3)), make_outcomes(make_cell("x", 12), make_cell("y", 3))
    record = across_runs.compare(record_of(a), a, record_of(b, "two"), b)
    pairs = {pair["cell"]: pair for pair in record["pairs"]}
    assert (pairs["x"]["only_a"], pairs["x"]["only_b"], pairs["x"]["both"], pairs["x"]["neither"]) == (10, 0, 28, 2)
    exact = stats.binomtest(10, 10, 0.5).pvalue
    assert pairs["x"]["p_value"] == pytest.approx(exact) and pairs["x"]["p_adjusted"] == pytest.approx(3 * exact)
    assert pairs["clean"]["p_adjusted"] == pairs["y"]["p_adjusted"] == 1.0
    lines = across_runs.comparison_table(record, ["4", "2"]).splitlines()
    assert lines[1].split() == ["bits", "4"] and lines[3].split()[:4] == ["x", "10", ":", "0"] and len(lines) == 5


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda r, o: (r | {"data": "cifar10"}, o), "met different images"),
        (lambda r, o: (r | {"image_ids_sha256": "0"}, o), "met different images"),
        (lambda r, o: (r, o._replace(cells=(o.cells[0]._replace(digest="0"),))), "different patches"),
        (lambda r, o: (r, o._replace(cells=(o.cells[0]._replace(name="z"),))), "no cell in common"),
    ],
)
def test_runs_that_met_other_images_or_patches_are_not_compared(change, said):
    a = make_outcomes(make_cell("x", 2))
    with pytest.raises(ValueError, match=said):
        across_runs.compare(record_of(a), a, *change(record_of(a, "two"), a))


def test_attacks_on_the_run_itself_are_compared_by_settings_not_by_pixels():
    own = make_cell("pgd", 2, access="white-box", surrogate="self:4")
    a, b = make_outcomes(own), make_outcomes(own._replace(digest="its own"))
    assert across_runs.compare(record_of(a), a, record_of(b), b)["pairs"]
    other = make_outcomes(own._replace(about=own.about | {"settings": {"steps": 2}}))
    with pytest.raises(ValueError, match="different settings"):
        across_runs.compare(record_of(a), a, record_of(other), other)


def test_seeds_are_summarised_by_mean_and_t_interval():
    records = [record_of(make_outcomes(make_cell("x", n)), f"s{n}", seed=n) for n in (4, 8, 12)]
    summary = across_runs.seeds(records)
    rates = np.array([0.1, 0.2, 0.3])
    spread = summary["success"]["x"]["4"]
    low, high = stats.t.interval(0.95, 2, loc=rates.mean(), scale=stats.sem(rates))
    assert [spread[k] for k in ("mean", "sd", "low", "high")] == pytest.approx([0.2, 0.1, max(0.0, low), high])
    assert "3 seeds of qat" in across_runs.seeds_table(summary)
    with pytest.raises(ValueError, match="seeds: expected at least two runs of one method"):
        across_runs.seeds([records[0], records[1] | {"method": "triqdef"}])
