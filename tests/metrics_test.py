"""Tests of success counts, intervals and paired tests."""

import numpy as np
import pytest
from scipy import stats

from triqdef_jax import metrics

# Six images, target class 2. Image 3 is wrong before the attack, images 4 and 5 are of the target class.
LABELS = np.array([0, 0, 1, 1, 2, 2])
CLEAN = np.array([0, 0, 1, 2, 2, 0])
PATCHED = np.array([2, 0, 0, 2, 0, 2])


def test_targeted_counts_match_the_hand():
    counts = metrics.success_counts(CLEAN, PATCHED, LABELS, 2)
    assert counts["robust_acc"] == (2, 6)  # images 1 and 5
    assert counts["asr_correct"] == (2, 3)  # right before and not of class 2: 0, 1, 2; flipped: 0 and 2
    assert counts["asr_all"] == (4, 6)  # changed: 0, 2, 4, 5
    assert counts["tsr"] == (2, 4)  # of 0..3: 0 and 3
    assert counts["tsr_clean"] == (1, 4)  # image 3 said 2 already


def test_untargeted_counts_match_the_hand():
    counts = metrics.success_counts(CLEAN, PATCHED, LABELS)
    assert counts["asr_correct"] == (3, 4)  # right before: 0, 1, 2, 4; flipped: 0, 2, 4
    assert counts["robust_acc"] == (2, 6) and counts["asr_all"] == (4, 6)
    assert counts["tsr"] == (0, 0) and np.isnan(counts["tsr"].rate)


def test_many_patches_count_like_one_at_a_time():
    rng = np.random.default_rng(0)
    patched, target = rng.integers(0, 3, (4, 6)), np.array([2, 0, -1, 1])
    together = metrics.success_counts(CLEAN, patched, LABELS, target)
    for p in range(4):
        alone = metrics.success_counts(CLEAN, patched[p], LABELS, None if target[p] < 0 else int(target[p]))
        for name, count in alone.items():
            assert (together[name].num[p], together[name].den[p]) == count, name


def test_a_network_wrong_everywhere_has_no_conditional_rate():
    counts = metrics.success_counts(np.ones(3, int), np.ones(3, int), np.zeros(3, int))
    assert counts["asr_correct"] == (0, 0) and np.isnan(counts["asr_correct"].rate)
    assert counts["robust_acc"].rate == 0.0
    empty = metrics.success_counts([], [], [])
    assert all(count == (0, 0) for count in empty.values())


def test_rates_divide_array_counts_and_mark_the_empty_ones():
    np.testing.assert_array_equal(metrics.Count(np.array([1, 0]), np.array([4, 0])).rate, [0.25, np.nan])


def test_wilson_equals_its_closed_form():
    num, den, z = 262, 1000, stats.norm.ppf(0.975)
    rate = num / den
    middle = (rate + z**2 / (2 * den)) / (1 + z**2 / den)
    half = z / (1 + z**2 / den) * np.sqrt(rate * (1 - rate) / den + z**2 / (4 * den**2))
    # The same formula in another order of operations: a few units in the last place.
    np.testing.assert_allclose(metrics.wilson(num, den), [rate, middle - half, middle + half], rtol=1e-12)
    np.testing.assert_allclose(metrics.wilson(num, den)[1:], [0.236, 0.290], atol=5e-4)  # as usually quoted, 3 digits


def test_wilson_holds_at_the_ends():
    assert metrics.wilson(0, 10).low == 0.0 < metrics.wilson(0, 10).high
    assert metrics.wilson(10, 10).high == 1.0
    assert np.isnan(metrics.wilson(0, 0)).all()


def test_bootstrap_of_one_patch_agrees_with_the_binomial():
    num = (np.arange(400) < 120)[None]
    interval = metrics.cluster_bootstrap(num, np.ones_like(num), seed=0)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    # A quantile from 2000 resamples has a standard error of about 3 % of the half width per end.
    np.testing.assert_allclose(interval, [0.3, 0.3 - half, 0.3 + half], atol=0.15 * half)


def test_bootstrap_sees_that_patches_differ():
    num = np.zeros((4, 500), int)
    num[:2] = 1  # two patches always succeed, two never: the images say nothing about the next patch
    clustered = metrics.cluster_bootstrap(num, np.ones_like(num), seed=1)
    naive = metrics.wilson(1000, 2000)
    assert clustered.estimate == 0.5 and clustered.high - clustered.low > 10 * (naive.high - naive.low)


def test_bootstrap_equals_explicit_resampling():
    rng = np.random.default_rng(5)
    den = rng.integers(0, 2, (3, 8))
    num = den * rng.integers(0, 2, (3, 8))
    interval = metrics.cluster_bootstrap(num, den, seed=3, num_resamples=3000, level=0.8)
    rates = []
    for _ in range(3000):
        rows, cols = rng.integers(0, 3, 3), rng.integers(0, 8, 8)
        total = den[rows][:, cols].sum()
        rates.append(num[rows][:, cols].sum() / total if total else np.nan)
    # Two independent sets of 3000 resamples: the standard error of a decile here is about 0.008.
    np.testing.assert_allclose(interval[1:], np.nanquantile(rates, [0.1, 0.9]), atol=0.05)


def test_several_quantities_meet_the_resamples_of_each_alone():
    rng = np.random.default_rng(1)
    den = rng.integers(0, 2, (2, 3, 4, 9))
    den[1, 2] = 0  # nothing counts in one of the six
    num = den * rng.integers(0, 2, den.shape)
    together = metrics.cluster_bootstrap(num, den, seed=2, num_resamples=300)
    assert together.low.shape == (2, 3)
    for place in np.ndindex(2, 3):
        alone = metrics.cluster_bootstrap(num[place], den[place], seed=2, num_resamples=300)
        np.testing.assert_array_equal([end[place] for end in together], alone)
    assert np.isnan([end[1, 2] for end in together]).all() and np.isfinite(together.low[0]).all()


def test_sums_in_float32_are_those_in_float64(monkeypatch):
    rng = np.random.default_rng(4)
    den = np.ones((5, 2000), bool)
    num = rng.random(den.shape) < 0.7
    single = metrics.cluster_bootstrap(num, den, seed=0, num_resamples=600)
    monkeypatch.setattr(metrics, "EXACT_PAIRS", 0)
    assert metrics.cluster_bootstrap(num, den, seed=0, num_resamples=600) == single


def test_bootstrap_repeats_itself_and_survives_empty_counts():
    num, den = np.eye(3), np.ones((3, 3))
    assert metrics.cluster_bootstrap(num, den, seed=7) == metrics.cluster_bootstrap(num, den, seed=7)
    assert np.isnan(metrics.cluster_bootstrap(np.zeros((2, 3)), np.zeros((2, 3)), seed=0)).all()
    single = np.zeros((2, 3))
    single[0, 0] = 1.0  # most resamples miss the only pair that counts
    assert metrics.cluster_bootstrap(single, single, seed=0) == metrics.wilson(1, 1)


def test_where_resamples_cannot_differ_the_interval_is_that_of_the_images_alone():
    den = np.ones((10, 4))
    den[:, 3] = 0  # the fourth image counts under no patch
    for num, expected in ((np.zeros_like(den), metrics.wilson(0, 3)), (den, metrics.wilson(3, 3))):
        assert metrics.cluster_bootstrap(num, den, seed=0) == expected


def test_mcnemar_is_the_exact_binomial_test():
    a = np.array([True] * 8 + [False] * 2 + [True] * 5 + [False] * 3)
    b = np.array([False] * 8 + [True] * 2 + [True] * 5 + [False] * 3)
    result = metrics.mcnemar(a, b)
    assert result[:4] == (5, 8, 2, 3)
    # 2 P(X <= 2) for ten fair coins: 2 (1 + 10 + 45) / 1024, up to float64 rounding.
    np.testing.assert_allclose(result.p_value, 112 / 1024, rtol=1e-9)
    assert metrics.mcnemar(a, a).p_value == 1.0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: metrics.success_counts(CLEAN[:5], PATCHED, LABELS), "clean_pred, labels: expected two arrays [N]"),
        (lambda: metrics.success_counts(CLEAN, PATCHED[:5], LABELS), "patched_pred: expected"),
        (lambda: metrics.success_counts(CLEAN, PATCHED, LABELS, [1, 2]), "target: expected one number"),
        (lambda: metrics.success_counts(CLEAN, PATCHED, LABELS, -2), "-1 for untargeted"),
        (lambda: metrics.wilson(3, 2), "0 <= num <= den"),
        (lambda: metrics.wilson(1, 2, level=95), "level: expected"),
        (lambda: metrics.cluster_bootstrap(np.ones(3), np.ones(3), seed=0), "two arrays [..., P, N]"),
        (lambda: metrics.cluster_bootstrap(np.full((1, 3), 0.5), np.ones((1, 3)), seed=0), "expected 0 or 1"),
        (lambda: metrics.cluster_bootstrap(np.ones((1, 3)), np.zeros((1, 3)), seed=0), "mask num with den"),
        (lambda: metrics.cluster_bootstrap(np.ones((1, 3)), np.ones((1, 3)), seed=0, num_resamples=0), "num_resamples"),
        (lambda: metrics.mcnemar(CLEAN, PATCHED), "expected bool [N]"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)
