"""Numbers about attacks: success counts, intervals, paired tests, from predictions and labels in NumPy.

Counts are whole numbers of images; a rate is divided once, at the end, and is nan when nothing was counted.
"""

from typing import NamedTuple

import numpy as np
import scipy  # its parts load when they are first used; statistics take a second

RESAMPLES_PER_CHUNK = 256  # bounds the bootstrap's memory: 256 x 10,000 images are 10 MB
EXACT_PAIRS = 2**24  # up to here float32 holds every whole number


class Count(NamedTuple):
    """`num` of `den` images, integers or integer arrays of one shape."""

    num: np.ndarray
    den: np.ndarray

    @property
    def rate(self) -> np.ndarray:
        """num / den, float64, nan where den is 0."""
        num, den = np.asarray(self.num, float), np.asarray(self.den, float)
        return np.divide(num, den, out=np.full(num.shape, np.nan), where=den > 0)[()]


class Interval(NamedTuple):
    """An estimate with the ends of its confidence interval, numbers or arrays of one shape; nan where nothing was counted."""

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray


class McNemar(NamedTuple):
    """Paired comparison: images right under both, one or none of two conditions, and the exact two-sided p-value."""

    both: int
    only_a: int
    only_b: int
    neither: int
    p_value: float


def success_counts(clean_pred, patched_pred, labels, target=None) -> dict[str, Count]:
    """Count what patches achieved, under four names because four denominators are in use.

    Args, Raises, definitions: as `success_masks`.

    Returns:
      Dict of `Count`; integers for one patch, integer arrays [P] for P.
    """
    masks = success_masks(clean_pred, patched_pred, labels, target)
    return {name: Count(num.sum(axis=-1), den.sum(axis=-1)) for name, (num, den) in masks.items()}


def success_masks(clean_pred, patched_pred, labels, target=None) -> dict[str, Count]:
    """Say for each image whether it counts and whether it is a success, under four names.

    * `robust_acc`: right with the patch / all images.
    * `asr_correct`, the headline: wrong with the patch and right before / right before.
    * `asr_all`: prediction changed by the patch / all images.
    * `tsr`: target predicted with the patch / label differs from the target.
    * `tsr_clean`: the same without the patch, the rate of doing nothing.

    For a targeted patch, images of the target class are excluded from `asr_correct` and from both `tsr`. Without a
    target both `tsr` count 0 of 0.

    Args:
      clean_pred: int [N], predictions without a patch.
      patched_pred: int [N], or [P, N] for P patches on the same images.
      labels: int [N].
      target: None, an int, or int [P]; -1 stands for untargeted.

    Returns:
      Dict of `Count` whose `num` and `den` are bool arrays of the shape of `patched_pred`.

    Raises:
      ValueError: when shapes do not agree or a target is below -1.
    """
    clean, patched, labels = np.asarray(clean_pred), np.asarray(patched_pred), np.asarray(labels)
    target = np.asarray(-1 if target is None else target)
    _check_predictions(clean, patched, labels, target)
    target = np.broadcast_to(target, patched.shape[:-1])[..., None]
    is_other = labels != target  # all images for an untargeted patch
    was_right, is_right = clean == labels, patched == labels
    is_aimed = (target >= 0) & is_other
    everything = np.ones_like(is_right)
    pairs = {
        "robust_acc": (is_right, everything),
        "asr_correct": (~is_right, was_right & is_other),
        "asr_all": (patched != clean, everything),
        "tsr": (patched == target, is_aimed),
        "tsr_clean": (clean == target, is_aimed),
    }
    return {name: _masks(*pair) for name, pair in pairs.items()}


def wilson(num: int, den: int, *, level: float = 0.95) -> Interval:
    """Return Wilson's score interval of a rate, for images that are independent: one patch, one network.

    Args:
      num: successes, 0 to `den`.
      den: trials.
      level: confidence level in (0, 1).

    Returns:
      `Interval`, all nan when `den` is 0.

    Raises:
      ValueError: unless 0 <= num <= den and 0 < level < 1.

    Reference: Wilson, 1927; without continuity correction.
    """
    _check_level(level)
    if not 0 <= num <= den:
        raise ValueError(f"num, den: expected 0 <= num <= den, got {num} and {den}")
    if den == 0:
        return Interval(np.nan, np.nan, np.nan)
    ends = scipy.stats.binomtest(int(num), int(den)).proportion_ci(level, method="wilson")
    return Interval(float(num / den), float(ends.low), float(ends.high))


def cluster_bootstrap(num, den, *, seed: int, num_resamples: int = 2000, level: float = 0.95) -> Interval:
    """Return percentile intervals of ``sum num / sum den`` when outcomes share patches and images.

    Each resample draws P patches and, independently, N images with replacement and keeps every pair of the two, so
    that neither 1,000 images under one lucky patch nor ten patches on one easy image count as independent trials. Rows
    may be seeds instead of patches. Where every pair is a success, or none is, resamples cannot differ: there the interval
    is Wilson's, with the images that count under any patch as trials.

    Args:
      num: [..., P, N], 1 where the pair counts as a success (only where `den` is 1), else 0. Leading axes hold several
        quantities of the same patches and images, which meet the same resamples and cost little more than one.
      den: [..., P, N], 1 where the pair counts at all, else 0.
      seed: of NumPy's generator.
      num_resamples: number of bootstrap resamples; those in which no pair counts are left out.
      level: confidence level in (0, 1).

    Returns:
      `Interval` of numbers, or of arrays of the leading shape; nan where no pair counts.

    Raises:
      ValueError: for arrays that are not [..., P, N] of one shape or hold other numbers, or successes that do not count.

    Reference: the pigeonhole bootstrap of two crossed factors, Owen, 2007: its intervals are at least as wide as they
    should be. With one row, only images are resampled.
    """
    num, den = np.asarray(num), np.asarray(den)
    _check_level(level)
    if num.ndim < 2 or num.shape != den.shape or 0 in num.shape:
        raise ValueError(f"num, den: expected two arrays [..., P, N] of one shape, got {num.shape} and {den.shape}")
    if ((den != 0) & (den != 1)).any() or ((num != 0) & (num != den)).any():
        raise ValueError("num, den: expected 0 or 1 and num <= den in every pair; mask num with den")
    if num_resamples < 1:
        raise ValueError(f"num_resamples: expected 1 or more, got {num_resamples}")
    rates = _resampled_rates(num, den, np.random.default_rng(seed), num_resamples)
    ends = np.full((2, rates.shape[1]), np.nan)
    is_counted = np.isfinite(rates).any(axis=0)
    if is_counted.any():
        tail = (1.0 - level) / 2
        ends[:, is_counted] = np.nanquantile(rates[:, is_counted], [tail, 1.0 - tail], axis=0)
    total = Count(num.sum(axis=(-2, -1)).reshape(-1), den.sum(axis=(-2, -1)).reshape(-1))
    num_images = den.any(axis=-2).sum(axis=-1).reshape(-1)
    for place in np.flatnonzero((total.num == 0) | (total.num == total.den)):
        is_success = total.num[place] > 0
        ends[:, place] = wilson(is_success * num_images[place], num_images[place], level=level)[1:]
    estimate, low, high = (values.reshape(num.shape[:-2])[()] for values in (total.rate, *ends))
    return Interval(estimate, low, high)


def mcnemar(correct_a, correct_b) -> McNemar:
    """Compare two conditions on the same images by McNemar's exact test.

    Under the null hypothesis an image on which they differ is equally likely right under either, so the number right
    only under A is binomial(only_a + only_b, 1/2).

    Args:
      correct_a: bool [N], right under condition A, over all images.
      correct_b: bool [N], the same images under B.

    Returns:
      `McNemar`; its p-value is 1 when the two never differ.

    Raises:
      ValueError: unless both are bool [N].
    """
    a, b = np.asarray(correct_a), np.asarray(correct_b)
    if a.ndim != 1 or a.shape != b.shape or a.dtype != bool or b.dtype != bool:
        raise ValueError(
            f"correct_a, correct_b: expected bool [N] over the same images, "
            f"got {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        )
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p_value = scipy.stats.binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    return McNemar(int((a & b).sum()), only_a, only_b, int((~a & ~b).sum()), float(p_value))


def holm(p_values) -> np.ndarray:
    """Adjust the p-values of several tests of one question, float64 like the input (Holm, 1979).

    Rejecting where the result is below a level keeps the chance of any false rejection below it, whatever the tests' dependence.

    Raises:
      ValueError: for a p-value outside [0, 1] or an input that is no vector.
    """
    p = np.asarray(p_values, float)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p_values: expected a vector of numbers in [0, 1], got {p_values}")
    order = np.argsort(p, kind="stable")
    steps = p[order] * (len(p) - np.arange(len(p)))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def _masks(is_success, is_counted):
    is_success, is_counted = np.broadcast_arrays(is_success, is_counted)
    return Count(is_success & is_counted, is_counted)


def _resampled_rates(num, den, rng, num_resamples):
    """Return the rates `[num_resamples, quantities]` of every resample, nan where it has no pair that counts.

    A resample is how often each patch and each image was drawn, so its sums are products of matrices; in float32, a third of the time of
    float64, whole numbers are exact up to `EXACT_PAIRS`.
    """
    num_rows, num_images = num.shape[-2:]
    dtype = np.float32 if num_rows * num_images <= EXACT_PAIRS else np.float64
    num, den = (array.astype(dtype).reshape(-1, num_images).T for array in (num, den))
    rates = []
    for start in range(0, num_resamples, RESAMPLES_PER_CHUNK):
        size = min(RESAMPLES_PER_CHUNK, num_resamples - start)
        rows = rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size).astype(dtype)
        images = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size).astype(dtype)
        per_row = ((images @ array).reshape(size, -1, num_rows) for array in (num, den))
        rates.append(Count(*(np.einsum("sqp,sp->sq", sums, rows) for sums in per_row)).rate)
    return np.concatenate(rates)


def _check_level(level):
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a share between 0 and 1, got {level}")


def _check_predictions(clean, patched, labels, target):
    if labels.ndim != 1 or clean.shape != labels.shape:
        raise ValueError(f"clean_pred, labels: expected two arrays [N], got {clean.shape} and {labels.shape}")
    if patched.ndim not in (1, 2) or patched.shape[-1] != labels.size:
        raise ValueError(f"patched_pred: expected [N] or [P, N] with N={labels.size}, got {patched.shape}")
    if target.ndim and target.shape != patched.shape[:-1]:
        raise ValueError(f"target: expected one number or one per patch {patched.shape[:-1]}, got {target.shape}")
    if (target < -1).any():
        raise ValueError(f"target: expected classes >= 0 or -1 for untargeted, got {target.tolist()}")
