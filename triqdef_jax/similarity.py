"""How alike the maps of several bit-widths are, beside chance, and whether that predicts how patches transfer.

Maps come stacked: float32 `[K, B, h, w, C]`, features of either sign or input gradients of K bit-widths on the same B images. A pair is two
indices into K. Values are kept per image until the end, so that intervals resample images. Which networks and images: `alignment.py`.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from triqdef_jax import perceptual

DEFINITIONS = {
    "cosine": "cosine of the raw arrays, all channels, signs kept; tells little about features of networks trained apart, whose "
    "channels do not correspond",
    "map_cosine": "cosine of the channel maps (mean of absolute values over channels)",
    "edge_iou": "intersection over union of the strongest 15 % of Sobel edges of the channel maps",
    "soft_dice": "overlap of the soft edge masks of the channel maps, as in the penalties; below 1 even for equal maps",
    "hog_cosine": "cosine of the soft orientation histograms of the channel maps, as in the penalties",
    "hog_cosine_centred": "the same after subtraction of each histogram vector's mean (Pearson's correlation)",
}
MEASURES = tuple(DEFINITIONS)
MAX_EXACT_SUBJECTS = 6  # 720 permutations of the labels are all tried; beyond, so many are drawn
NUM_PERMUTATIONS = 5000
TIE = 1e-9  # two rank correlations closer than this are equal up to rounding


class PairValues(NamedTuple):
    """One measure of P pairs on B images and the same between different images, float32 `[P, B]` each."""

    value: jax.Array
    chance: jax.Array


class Estimate(NamedTuple):
    """A mean over images with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class RankCorrelation(NamedTuple):
    """Spearman's rho over pairs, nan where a side is constant.

    Attributes:
      low, high: ends of the bootstrap interval. p_value: Mantel's. num_pairs: pairs behind rho.
      weakest: what is left of rho, in its own direction, when the subject that matters most is taken away with its pairs (of the other
        sign: nothing is left); nan below 4 subjects.
    """

    rho: float
    low: float
    high: float
    p_value: float
    num_pairs: int
    weakest: float


def all_pairs(num: int) -> tuple[tuple[int, int], ...]:
    """Return all unordered pairs (i, j), i < j, of `num` subjects, in the order of `numpy.triu_indices`."""
    return tuple(itertools.combinations(range(num), 2))


def measures_of(side_px: int) -> tuple[str, ...]:
    """Return the measures that maps with a shorter side of `side_px` allow.

    Edges need 2 px; orientation histograms need one block, 2 x 2 cells of `perceptual.default_cell_px`.
    """
    has_hog = side_px >= 2 * perceptual.default_cell_px(side_px)
    is_possible = {"edge_iou": side_px >= 2, "soft_dice": side_px >= 2}
    return tuple(name for name in MEASURES if is_possible.get(name, has_hog if name.startswith("hog") else True))


@functools.partial(jax.jit, static_argnames="pairs")
def pair_values(stack: jax.Array, *, pairs: tuple[tuple[int, int], ...]) -> dict[str, PairValues]:
    """Measure every pair of stacked maps image by image, beside the chance level of each.

    Args:
      stack: float32 `[K, B, h, w, C]`, B at least 2. pairs: static indices into K.

    Returns:
      `PairValues` by measure, those of `measures_of`. Chance is `perceptual.chance_level`: map of image n under the first against maps
      of other images of the batch under the second.

    Raises:
      ValueError: for maps of another rank or type, or a batch of one image.
    """
    if stack.ndim != 5 or stack.dtype != jnp.float32:
        raise ValueError(
            f"stack: expected float32 [K, B, h, w, C], got {stack.dtype} {stack.shape}; stack one array per bit-width"
        )
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    values = {}
    for name, (describe, measure) in _measures(stack.shape[2:4]).items():
        described = describe(stack)
        a, b = described[first], described[second]
        chance = jax.vmap(functools.partial(perceptual.chance_level, measure))
        values[name] = PairValues(jax.vmap(measure)(a, b), chance(a, b))
    return values


def _measures(shape: tuple[int, int]) -> dict[str, tuple[Callable, Callable]]:
    """Return for each measure (stack -> descriptors `[K, B, ...]`, descriptors of two -> similarity `[B]`)."""
    cell_px = perceptual.default_cell_px(min(shape))
    edges = lambda stack: perceptual.sobel_magnitude(perceptual.channel_map(stack))

    def hog(stack, centered):
        return perceptual.soft_hog(perceptual.channel_map(stack), cell_px=cell_px, centered=centered)

    known = {
        "cosine": (_flat(lambda stack: stack, 2), perceptual.cosine),
        "map_cosine": (_flat(perceptual.channel_map, 2), perceptual.cosine),
        "edge_iou": (edges, perceptual.hard_edge_iou),
        "soft_dice": (lambda stack: perceptual.soft_edges(edges(stack)), perceptual.soft_dice),
        "hog_cosine": (functools.partial(hog, centered=False), perceptual.cosine),
        "hog_cosine_centred": (functools.partial(hog, centered=True), perceptual.cosine),
    }
    return {name: known[name] for name in measures_of(min(shape))}


def _flat(function: Callable, num_leading: int) -> Callable:
    def flattened(stack):
        out = function(stack)
        return out.reshape(*out.shape[:num_leading], -1)

    return flattened


def image_bootstrap(values: np.ndarray, *, seed: int, num_resamples: int = 2000) -> Estimate:
    """Return the mean over images with its 95 % percentile interval over resampled images.

    Args:
      values: float `[N]`, or `[P, N]`: the mean over P as well, the P values of an image staying together.
      seed: of NumPy's generator, so that quantities of one set of images are resampled alike.

    Raises:
      ValueError: for another rank or no image.
    """
    values = np.asarray(values, float)
    if values.ndim not in (1, 2) or 0 in values.shape:
        raise ValueError(f"values: expected [N] or [P, N] over at least one image, got shape {values.shape}")
    per_image = values.reshape(-1, values.shape[-1]).mean(axis=0)
    num = len(per_image)
    weights = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), num_resamples) / num
    low, high = np.quantile(weights @ per_image, [0.025, 0.975])
    return Estimate(float(per_image.mean()), float(low), float(high))


def rank_correlation(a: np.ndarray, b: np.ndarray, *, seed: int, num_resamples: int = 2000) -> RankCorrelation:
    """Correlate two pairwise quantities over the pairs of K subjects.

    Args:
      a, b: float `[K, K]`, symmetric; the diagonal does not count. seed: of NumPy's generator.

    Returns:
      Spearman's rho over the K (K - 1) / 2 pairs. The interval resamples pairs; pairs share subjects, so it is too narrow if anything.
      The p-value, two-sided, is Mantel's: all pairs of `b` are relabelled together by permutations of the subjects, exactly for K up to
      6. Everything is nan for K below 3 or where a side is constant.

    Raises:
      ValueError: unless both are square, symmetric and of one size.

    Reference: Mantel, The detection of disease clustering, 1967, with ranks.
    """
    a, b = (_symmetric(name, matrix) for name, matrix in (("a", a), ("b", b)))
    if a.shape != b.shape:
        raise ValueError(f"a, b: expected matrices of one size, got {a.shape} and {b.shape}")
    upper = np.triu_indices(len(a), k=1)
    num_pairs = len(upper[0])
    rho = _spearman(a[upper], b[upper])
    if not np.isfinite(rho):
        return RankCorrelation(np.nan, np.nan, np.nan, np.nan, num_pairs, np.nan)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(num_pairs, size=(num_resamples, num_pairs))
    resampled = _spearman(a[upper][drawn], b[upper][drawn])
    low, high = np.nanquantile(resampled, [0.025, 0.975])  # a resample of one pair repeated has no correlation
    orders = _permutations(len(a), rng)
    permuted = b[orders[:, :, None], orders[:, None, :]][:, *upper]
    p_value = np.mean(np.abs(_spearman(a[upper], permuted)) >= abs(rho) - TIE)
    return RankCorrelation(float(rho), float(low), float(high), float(p_value), num_pairs, _weakest(a, b, np.sign(rho)))


def _weakest(a, b, sign):
    """Return the rho least in the direction of `sign` over the ways to leave one subject out, nan where too little is left."""
    if len(a) < 4:
        return np.nan
    upper = np.triu_indices(len(a) - 1, k=1)
    rests = (np.delete(np.arange(len(a)), left_out) for left_out in range(len(a)))
    rhos = [_spearman(a[np.ix_(rest, rest)][upper], b[np.ix_(rest, rest)][upper]) for rest in rests]
    return float(sign * np.min(sign * np.array(rhos)))


def _symmetric(name, matrix):
    matrix = np.asarray(matrix, float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not np.allclose(matrix, matrix.T, equal_nan=True):
        raise ValueError(
            f"{name}: expected a symmetric matrix [K, K], got shape {matrix.shape}; average both directions"
        )
    return matrix


def _permutations(num, rng):
    """Return orders of `num` labels `[M, num]`, the identity first: all of them, or as many as are drawn."""
    if num <= MAX_EXACT_SUBJECTS:
        return np.array(list(itertools.permutations(range(num))))
    drawn = [rng.permutation(num) for _ in range(NUM_PERMUTATIONS - 1)]
    return np.stack([np.arange(num), *drawn])


def _spearman(a, b):
    """Return Spearman's rho along the last axis, broadcast over the others; nan where a side is constant."""
    a, b = (stats.rankdata(side, axis=-1) - (side.shape[-1] + 1) / 2 for side in (a, b))
    num = (a * b).sum(axis=-1)
    den = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return np.divide(num, den, out=np.full(np.shape(num), np.nan), where=den > 0)[()]
