"""Grids: the range of one more seed, and which points lie beyond it; all on hand-made points."""

import numpy as np
import pytest
from scipy import stats

from triqdef_jax import grids


def point(rate, *, half=0.02, **changes):
    """A point of a grid with one bit-width, clean accuracy 0.9 and this success, each with an interval of +-half."""
    ends = lambda value: {"rate": value, "low": value - half, "high": value + half, "den": 400}
    return {"changes": changes, "clean_accuracy": {"4": ends(0.9)}, "success": {"4": ends(rate)}}


def test_one_more_seed_lies_in_the_prediction_interval_of_student():
    rates = np.array([0.1, 0.2, 0.3])
    found = grids.one_more_seed(rates)
    half = stats.t.ppf(0.975, 2) * 0.1 * np.sqrt(4 / 3)
    assert half > 0.2 and found == {"mean": pytest.approx(0.2), "low": 0.0, "high": pytest.approx(0.2 + half)}
    # By simulation: of normal figures, 95 % of fourth ones lie in the interval of the three before. 20,000 draws: +-0.3 %.
    drawn = 0.5 + 0.01 * np.random.default_rng(0).normal(size=(20_000, 4))
    mean, sd = drawn[:, :3].mean(1), drawn[:, :3].std(1, ddof=1)
    inside = np.abs(drawn[:, 3] - mean) <= half / 0.1 * sd
    assert inside.mean() == pytest.approx(0.95, abs=0.006)


def test_a_point_is_beyond_the_seeds_only_outside_their_range_and_apart_from_the_base():
    seeds = point(0.20), point(0.21, seed=1), point(0.19, seed=2)  # one more lies within 0.2 +- 0.0497
    grid = point(0.24, alpha=0.0), point(0.26, alpha=1.0), point(0.26, half=0.05, beta=0.0), point(0.1, beta=2.0)
    found = grids.against_seeds([*seeds, *grid])
    assert [(one["changes"], one["field"], one["is_above"]) for one in found["beyond"]] == [
        ({"alpha": 1.0}, "success", True),
        ({"beta": 2.0}, "success", False),
    ]
    assert (found["num_seeds"], found["num_rates"]) == (3, 8)
    assert found["seeds"]["success"]["4"]["high"] == pytest.approx(0.2497, abs=1e-4)


def test_seeds_that_agree_by_luck_do_not_make_every_other_point_differ():
    alike = point(0.2), point(0.2, seed=1), point(0.2, seed=2)
    assert grids.against_seeds([*alike, point(0.21, alpha=1.0)])["beyond"] == []


def test_without_seeds_of_the_base_nothing_is_said_of_a_grid():
    failed = {"changes": {"seed": 1}, "clean_accuracy": {}, "success": {}}
    assert grids.against_seeds([point(0.2), point(0.9, alpha=1.0), failed]) == {"num_seeds": 1}
    assert grids.against_seeds([point(0.2, seed=1), point(0.9, seed=2)]) == {"num_seeds": 2}  # the base is yet to come
