"""A dictionary of textures for black-box attacks: real image regions, one for each cluster of texture statistics.

Regions of every class are described by Gram matrices of feature maps and clustered; the region nearest to each centre
stands for its cluster. Features come from a network of the attacker's own or from a fixed filter bank; the attacked
network is never asked. Images are float32 [B, H, W, C] in [0, 1]. NumPy on the host.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import scipy  # its parts load when they are first used

from triqdef_jax.attacks import queries
from triqdef_jax.attacks.settings import check_arrays, check_positive

FILTER_SIGMAS = (0.7, 1.4, 2.8)  # px, an octave apart: edges from one pixel to a third of a 16-px image
NUM_KMEANS_STARTS = 5
QUIET = 0.1  # of the loudest channel: clusters of a quieter one would be clusters of noise
TINY = 1e-12  # features that are 0 everywhere stay 0


class Textures(NamedTuple):
    """K textures of real images.

    Attributes:
      values: float32 [K, T, T, C] in [0, 1], on the uint8 grid.
      classes: int32 [K], label of the image each was cut from; ascending, and within a class the largest cluster first.
      shares: float32 [K], share of the class's regions in the cluster that the texture stands for.
      rows: int32 [K], the image it was cut from, and corners: int32 [K, 2], upper left corner of the region there.
    """

    values: np.ndarray
    classes: np.ndarray
    shares: np.ndarray
    rows: np.ndarray
    corners: np.ndarray


def make_textures(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    region_px: int,
    texture_px: int | None = None,
    num_per_class: int = 30,
    regions_per_image: int = 4,
    features_fn: Callable | None = None,
    batch_images: int = 256,
) -> Textures:
    """Build a dictionary of textures from training images.

    Args:
      key: PRNG key of the regions and of the clustering.
      images: float32 [B, H, W, C] in [0, 1].
      labels: int32 [B].
      region_px: side of the square regions, larger than the patch so that it can be cropped from many places.
      texture_px: side T of the textures, no smaller than the region, which is continued by reflection. None: the region.
      num_per_class: most clusters of a class; fewer where it has fewer different regions.
      regions_per_image: random regions of each image.
      features_fn: ``images [N, H, W, C] -> features [N, h, w, F]`` of a network of the attacker's own, any grid; None
        for `filter_bank`.
      batch_images: images in every call of `features_fn`.

    Returns:
      `Textures`.

    Raises:
      ValueError: for arrays of wrong shape, type or range, regions larger than the images, textures smaller than these.

    Reference: Yang, Kortylewski, Xie, Cao, Yuille, PatchAttack, 2020, section 3.3: 30 clusters of each class by Gram
    matrices of VGG-19, and an image synthesised for each centre. Deviations: no VGG, for a pretrained network of another
    domain has no place here; no synthesis, the real region nearest to the centre takes its place; and regions are random
    instead of chosen by Grad-CAM.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    texture_px = region_px if texture_px is None else texture_px
    _check(images, labels, region_px, texture_px, num_per_class, regions_per_image)
    rng = queries.make_rng(key)
    rows = np.repeat(np.arange(len(images)), regions_per_image)
    corners = rng.integers(0, np.array(images.shape[1:3]) - region_px + 1, (len(rows), 2))
    describe = filter_bank if features_fn is None else features_fn
    features = queries.in_batches(lambda batch, start: describe(batch), images, min(batch_images, len(images)))
    statistics = gram_statistics(features, rows, corners, region_px=region_px, image_shape=images.shape[1:3])
    chosen, shares = [], []
    for label in np.unique(labels):
        members = np.flatnonzero(labels[rows] == label)
        found, share = _representatives(rng, statistics[members], num_per_class)
        chosen.append(members[found])
        shares.append(share)
    chosen = np.concatenate(chosen)
    rows, corners = rows[chosen].astype(np.int32), corners[chosen].astype(np.int32)
    values = images[rows][queries.window(corners, (region_px, region_px))]
    return Textures(_extend(values, texture_px), labels[rows].astype(np.int32), np.concatenate(shares), rows, corners)


def filter_bank(images: np.ndarray) -> np.ndarray:
    """Describe every pixel by its colour and by the slopes and bumps of the brightness around it.

    Args:
      images: float32 [B, H, W, C].

    Returns:
      float32 [B, H, W, C + 9]: the channels; then, of the mean channel under a Gaussian of each of `FILTER_SIGMAS`, the
      central differences along rows and along columns times sigma and the sum of the second ones times sigma squared, so
      that scales count alike. Images are continued by reflection.
    """
    images = np.asarray(images, np.float64)
    maps, brightness = [images], images.mean(axis=-1)
    for sigma in FILTER_SIGMAS:
        smooth = scipy.ndimage.gaussian_filter(brightness, (0, sigma, sigma))
        slopes = [sigma * scipy.ndimage.correlate1d(smooth, (-0.5, 0.0, 0.5), axis=axis) for axis in (1, 2)]
        bumps = sum(scipy.ndimage.correlate1d(smooth, (1.0, -2.0, 1.0), axis=axis) for axis in (1, 2))
        maps.append(np.stack([*slopes, sigma**2 * bumps], axis=-1))
    return np.concatenate(maps, axis=-1).astype(np.float32)


def gram_statistics(
    features: np.ndarray, rows: np.ndarray, corners: np.ndarray, *, region_px: int, image_shape: tuple[int, int]
) -> np.ndarray:
    """Describe regions by the Gram matrix of their features, ``G = F^T F / n`` over the n cells that they touch.

    Channels are first divided by their root mean square over everything, so that loud ones do not drown the others; those
    below `QUIET` of the loudest are raised by no more than 1 / `QUIET`, for they may be noise.

    Args:
      features: float [B, h, w, F] on any grid.
      rows: int [R], the image of each region.
      corners: int [R, 2], upper left corners in pixels.
      region_px: side of the regions.
      image_shape: (H, W) in pixels, which the grid covers.

    Returns:
      float64 [R, F (F + 1) / 2], the upper triangle with what lies off the diagonal times sqrt 2: the Euclidean distance
      of two rows is the Frobenius distance of the matrices.

    Raises:
      ValueError: for features of another rank.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 4:
        raise ValueError(f"features_fn: expected features [N, h, w, F], got shape {features.shape}")
    loudness = np.sqrt((features**2).mean(axis=(0, 1, 2)))
    features = features / np.maximum(loudness, max(QUIET * loudness.max(), TINY))
    upper, cells_per_px = np.triu_indices(features.shape[-1]), np.array(features.shape[1:3]) / image_shape
    weights = np.where(upper[0] == upper[1], 1.0, np.sqrt(2.0))
    first = np.floor(corners * cells_per_px).astype(int)
    last = np.ceil((corners + region_px) * cells_per_px).astype(int)
    statistics = np.empty((len(rows), len(weights)))
    for index, (row, (top, left), (bottom, right)) in enumerate(zip(rows, first, last, strict=True)):
        cells = features[row, top:bottom, left:right].reshape(-1, features.shape[-1])
        statistics[index] = (cells.T @ cells / len(cells))[upper] * weights
    return statistics


def _representatives(rng, statistics, num_clusters):
    """Return the rows nearest to the centres of their clusters, int [k], and the clusters' shares, largest first."""
    num_clusters = min(num_clusters, len(np.unique(statistics, axis=0)))
    # Clusters without members are dropped.
    centers, _ = scipy.cluster.vq.kmeans(statistics, num_clusters, iter=NUM_KMEANS_STARTS, rng=rng)
    nearest, distances = scipy.cluster.vq.vq(statistics, centers)
    clusters, counts = np.unique(nearest, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    found = [np.where(nearest == cluster, distances, np.inf).argmin() for cluster in clusters[order]]
    return np.array(found), (counts[order] / len(statistics)).astype(np.float32)


def _extend(values, texture_px):
    """Continue regions [K, R, R, C] by reflection to [K, T, T, C] and round them to the uint8 grid."""
    more = texture_px - values.shape[1]
    sides = (more // 2, more - more // 2)
    values = np.pad(values, ((0, 0), sides, sides, (0, 0)), mode="reflect" if values.shape[1] > 1 else "edge")
    return np.round(255.0 * values).astype(np.float32) / np.float32(255.0)


def _check(images, labels, region_px, texture_px, num_per_class, regions_per_image):
    check_arrays(images, labels)
    for name, value in (("num_per_class", num_per_class), ("regions_per_image", regions_per_image)):
        check_positive(name, value)
    if not 1 <= region_px <= min(images.shape[1:3]):
        raise ValueError(f"region_px: expected 1 to the images' {min(images.shape[1:3])} px, got {region_px}")
    if texture_px < region_px:
        raise ValueError(f"texture_px: expected region_px={region_px} or more, got {texture_px}")
