"""Similarities of pairs of maps by hand and against slow references; their intervals; rank correlation of pairs."""

import itertools

import numpy as np
import pytest
from scipy import stats

from triqdef_jax import perceptual, similarity

RNG = np.random.default_rng(0)
# Three "bit-widths" on six images: the second equals the first, the third has nothing to do with them.
NOISE = RNG.standard_normal((2, 6, 16, 16, 3)).astype(np.float32)
STACK = np.stack([NOISE[0], NOISE[0], NOISE[1]])
PAIRS = similarity.all_pairs(3)


@pytest.fixture(scope="module")
def values():
    return similarity.pair_values(STACK, pairs=PAIRS)


def test_pairs_come_in_the_order_of_an_upper_triangle():
    assert PAIRS == ((0, 1), (0, 2), (1, 2))
    assert list(PAIRS) == list(zip(*np.triu_indices(3, k=1), strict=True))


def test_equal_maps_score_one_by_every_measure_whose_best_value_is_one(values):
    for name in set(similarity.MEASURES) - {"soft_dice"}:
        np.testing.assert_allclose(
            values[name].value[0], 1.0, rtol=1e-5, err_msg=name
        )  # rounding of sums of 768 products


def test_the_soft_dice_of_equal_maps_is_that_of_a_mask_with_itself(values):
    mask = np.asarray(perceptual.soft_edges(perceptual.sobel_magnitude(perceptual.channel_map(NOISE[0]))), np.float64)
    expected = (mask**2).sum((1, 2)) / mask.sum((1, 2))
    np.testing.assert_allclose(values["soft_dice"].value[0], expected, rtol=1e-5)
    assert (expected > 0.8).all() and (expected < 1).all()


def test_unrelated_maps_score_what_chance_does(values):
    for name in similarity.MEASURES:
        value, chance = (np.asarray(side[1]) for side in values[name])
        # The chance level averages four partners; images of noise scatter by less than 0.15 in every measure.
        assert abs(value.mean() - chance.mean()) < 0.15, name
    assert values["hog_cosine"].chance[1].mean() > 0.6  # histograms are non-negative
    assert abs(values["hog_cosine_centred"].chance[1].mean()) < 0.3


def test_every_measure_agrees_with_a_slow_reference(values):
    a, b = NOISE[0, 4], NOISE[1, 4]
    maps = [np.abs(x).mean(-1) / np.abs(x).mean(-1).max() for x in (a, b)]
    slopes = [np.asarray(perceptual.sobel_magnitude(m)) for m in maps]
    edges = [slope > np.percentile(slope, 85) for slope in slopes]
    hogs = [np.asarray(perceptual.soft_hog(m, cell_px=4), np.float64) for m in maps]
    expected = {
        "cosine": cosine(a, b),
        "map_cosine": cosine(*maps),
        "edge_iou": (edges[0] & edges[1]).sum() / (edges[0] | edges[1]).sum(),
        "hog_cosine": cosine(*hogs),
        "hog_cosine_centred": np.corrcoef(*hogs)[0, 1],
    }
    for name, number in expected.items():
        np.testing.assert_allclose(values[name].value[1, 4], number, atol=1e-5, err_msg=name)  # float32 sums


def cosine(a, b):
    return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())


def test_chance_pairs_each_image_with_other_images():
    stack = np.zeros((2, 2, 2, 2, 1), np.float32)
    stack[:, 0, 0, 0] = stack[:, 1, 1, 1] = 1.0  # the two images share no pixel, the two bit-widths are equal
    found = similarity.pair_values(stack, pairs=((0, 1),))
    np.testing.assert_array_equal(found["cosine"].value, [[1.0, 1.0]])
    np.testing.assert_array_equal(found["cosine"].chance, [[0.0, 0.0]])


def test_maps_too_small_for_a_measure_go_without_it():
    assert similarity.measures_of(1) == ("cosine", "map_cosine")
    assert similarity.measures_of(2) == ("cosine", "map_cosine", "edge_iou", "soft_dice")
    assert similarity.measures_of(4) == similarity.MEASURES
    assert similarity.measures_of(16) == similarity.MEASURES


def test_stacks_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"stack: expected float32 \[K, B, h, w, C\]"):
        similarity.pair_values(STACK[0], pairs=((0, 1),))


def test_the_bootstrap_interval_is_that_of_a_mean_and_keeps_pairs_of_an_image_together():
    sample = RNG.standard_normal(400)
    estimate = similarity.image_bootstrap(sample, seed=1)
    half = 1.96 * sample.std() / 20
    assert estimate.value == pytest.approx(sample.mean())
    np.testing.assert_allclose(
        [estimate.low, estimate.high], np.array([-half, half]) + sample.mean(), atol=0.02
    )  # 2,000 draws
    assert similarity.image_bootstrap(np.stack([sample, sample]), seed=1) == pytest.approx(estimate)
    assert similarity.image_bootstrap(np.stack([sample, -sample]), seed=1).high == pytest.approx(0.0)
    with pytest.raises(ValueError, match="at least one image"):
        similarity.image_bootstrap(np.zeros((2, 0)), seed=0)


def symmetric(num, seed):
    matrix = np.random.default_rng(seed).standard_normal((num, num))
    return matrix + matrix.T


def test_rho_is_that_of_scipy_over_the_pairs():
    a, b = symmetric(5, 0), symmetric(5, 1)
    upper = np.triu_indices(5, k=1)
    found = similarity.rank_correlation(a, b, seed=0)
    assert found.rho == pytest.approx(stats.spearmanr(a[upper], b[upper]).statistic)
    assert found.num_pairs == 10
    assert found.low < found.rho < found.high
    rests = [np.delete(np.arange(5), left_out) for left_out in range(5)]
    left, kept = np.triu_indices(4, k=1), [(a[np.ix_(rest, rest)], b[np.ix_(rest, rest)]) for rest in rests]
    remaining = [stats.spearmanr(x[left], y[left]).statistic for x, y in kept]
    assert found.weakest == pytest.approx(min(remaining) if found.rho > 0 else max(remaining))
    assert similarity.rank_correlation(a, -b, seed=0).weakest == pytest.approx(-found.weakest)


def test_mantels_p_value_counts_relabellings():
    a, b = symmetric(4, 2), symmetric(4, 3)
    upper = np.triu_indices(4, k=1)
    rhos = []
    for order in itertools.permutations(range(4)):
        relabelled = b[np.ix_(order, order)]
        rhos.append(stats.spearmanr(a[upper], relabelled[upper]).statistic)
    expected = np.mean(np.abs(rhos) >= abs(rhos[0]) - 1e-9)  # equal up to rounding counts as equal
    assert similarity.rank_correlation(a, b, seed=0).p_value == pytest.approx(expected)


def test_perfect_agreement_of_five_has_the_smallest_p_value_of_120_relabellings():
    a = symmetric(5, 4)
    found = similarity.rank_correlation(a, np.exp(a), seed=0)
    assert found.rho == pytest.approx(1.0)
    assert found.p_value == pytest.approx(1 / 120)


def test_many_subjects_are_relabelled_at_random_and_the_identity_counts():
    a = symmetric(8, 5)
    assert similarity.rank_correlation(a, a, seed=0).p_value == pytest.approx(1 / similarity.NUM_PERMUTATIONS)


def test_what_cannot_be_ranked_is_nan_and_what_has_a_direction_is_refused():
    assert np.isnan(similarity.rank_correlation(symmetric(3, 0), symmetric(3, 1), seed=0).weakest)
    assert np.isnan(similarity.rank_correlation(symmetric(2, 0), symmetric(2, 1), seed=0).rho)
    assert np.isnan(similarity.rank_correlation(symmetric(4, 0), np.ones((4, 4)), seed=0).p_value)
    with pytest.raises(ValueError, match="average both directions"):
        similarity.rank_correlation(np.arange(9.0).reshape(3, 3), symmetric(3, 0), seed=0)
    with pytest.raises(ValueError, match="matrices of one size"):
        similarity.rank_correlation(symmetric(3, 0), symmetric(4, 0), seed=0)
