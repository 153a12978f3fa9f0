"""What attacks without gradients share: asking the network, scoring logits, pasting and reporting, in NumPy on the host.

A query attack may face anything that maps images to scores, an exported model or a remote one, so networks get NumPy
images in batches of one size and may return any array. Images are float32 [B, H, W, C] in [0, 1], targets -1 when
untargeted. How an attack searches lives in its own module.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax import numpy as jnp

from triqdef_jax.attacks.settings import Patch, check_arrays
from triqdef_jax.patches import Placement

LOWEST_LOG = -1e4  # floor of a log-probability: a batch of rewards keeps a finite mean


def make_rng(key: jax.Array) -> np.random.Generator:
    """Build NumPy's generator from a key's words: searches draw on the host, thousands of times, a few numbers each."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def in_batches(fn: Callable, images: np.ndarray, batch_images: int) -> np.ndarray:
    """Return ``fn(images)`` computed in batches of one size, the last one padded with its first image.

    Args:
      fn: ``(images [batch_images, ...], start row) -> array [batch_images, ...]``.
      images: [N, ...], N > 0.
      batch_images: rows of every call, so that a jitted function is compiled once.

    Returns:
      NumPy array [N, ...].

    Raises:
      ValueError: when `fn` returns another number of rows.
    """
    results = []
    for start in range(0, len(images), batch_images):
        batch = images[start : start + batch_images]
        rows = np.arange(batch_images)
        result = np.asarray(fn(batch[np.where(rows < len(batch), rows, 0)], start))
        if result.ndim == 0 or len(result) != batch_images:
            raise ValueError(
                f"logits_fn: expected one row of results for each of {batch_images} images, got shape {result.shape}"
            )
        results.append(result[: len(batch)])
    return np.concatenate(results)


def make_ask(key: jax.Array, logits_fn: Callable, *, batch_images: int, random_logits: bool) -> Callable:
    """Build ``ask(images [N, H, W, C], step) -> logits float32 [N, K]``, which never differentiates.

    Args:
      key: PRNG key of a random network; `step` and the batch are folded in, so that no two calls share a draw.
      logits_fn: ``images -> logits [batch_images, K]``, or ``(key, images) -> logits`` with `random_logits`.
      batch_images: images of every call.
      random_logits: as above.

    Returns:
      The function; it raises ValueError for logits that are not [N, K] or not numbers.
    """

    def call(step, images, start):
        if not random_logits:
            return logits_fn(images)
        return logits_fn(jax.random.fold_in(jax.random.fold_in(key, step), start), images)

    def ask(images, step):
        logits = in_batches(lambda batch, start: call(step, batch, start), images, batch_images)
        if logits.ndim != 2 or np.isnan(logits).any():
            raise ValueError(
                f"logits_fn: expected logits [N, K] without nan, got shape {logits.shape}; check the network"
            )
        return logits.astype(np.float32)

    return ask


def margin(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the label's lead over the best other class, ``z_y - max_{k != y} z_k``, float32 [N]; below 0 it is lost."""
    at_label = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    others = logits.copy()
    np.put_along_axis(others, labels[:, None], -np.inf, axis=1)
    return at_label - others.max(axis=1)


def log_success(logits: np.ndarray, labels: np.ndarray, target: int) -> np.ndarray:
    """Return ``log p(target)``, or ``log (1 - p(label))`` when untargeted, float64 [N], at least `LOWEST_LOG`.

    Both are differences of two log-sums, so neither cancels when the probability is near 0.
    """
    logits = logits.astype(np.float64)
    goal = np.zeros(logits.shape, bool)
    goal[np.arange(len(logits)), labels if target < 0 else target] = True
    aimed = np.where(goal != (target < 0), logits, -np.inf)
    return np.maximum(_log_sum(aimed) - _log_sum(logits), LOWEST_LOG)


def is_fooled(predictions: np.ndarray, labels: np.ndarray, target: int) -> np.ndarray:
    """Return bool [N]: predicted the target, or something else than the label when untargeted."""
    return predictions == target if target >= 0 else predictions != labels


def paste(images: np.ndarray, values: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Return copies of images with one rectangle of values each.

    Args:
      images: float32 [N, H, W, C].
      values: float32 [N, h, w, C].
      corners: int [N, 2], upper left corner (row, col) of each rectangle, which lies inside the image.
    """
    patched = images.copy()
    patched[window(corners, values.shape[1:3])] = values
    return patched


def window(corners: np.ndarray, shape: tuple[int, int]) -> tuple:
    """Return what indexes rectangles of one shape (h, w) in arrays [N, H, W, ...]: ``array[window(corners, shape)]``."""
    rows = corners[:, 0, None] + np.arange(shape[0])
    cols = corners[:, 1, None] + np.arange(shape[1])
    return np.arange(len(corners))[:, None, None], rows[:, :, None], cols[:, None, :]


def report(
    key: jax.Array,
    patched: np.ndarray,
    masks: np.ndarray,
    labels: np.ndarray,
    *,
    target: int,
    canvas_px: int,
    clean_predictions: np.ndarray,
    predictions: np.ndarray,
    loss: np.ndarray,
    queries: np.ndarray,
) -> tuple[Patch, dict]:
    """Cut the patches out of the images and write down what every attack on single images reports.

    Args:
      key: the attack's key.
      patched: float32 [B, H, W, C] in [0, 1], on the uint8 grid where the mask is set.
      masks: bool [B, H, W], the pixels of each patch, at least one.
      labels, clean_predictions, predictions, queries: int [B].
      target: class aimed at, -1 for untargeted.
      canvas_px: side S of the patches' canvas, no smaller than any mask's bounding box.
      loss: float [B].

    Returns:
      `Patch` of B patches, each in the upper left of its canvas, and the info of `sparse_rs.attack`.
    """
    num, channels = len(patched), patched.shape[-1]
    values = np.zeros((num, canvas_px, canvas_px, channels), np.float32)
    canvas_masks = np.zeros((num, canvas_px, canvas_px), np.float32)
    boxes = np.array([_bounding_box(mask) for mask in masks], np.int32)
    for index, (top, left, bottom, right) in enumerate(boxes):
        mask = masks[index, top:bottom, left:right]
        canvas_masks[index, : bottom - top, : right - left] = mask
        values[index, : bottom - top, : right - left] = patched[index, top:bottom, left:right] * mask[..., None]
    size_px, center = (boxes[:, 2:] - boxes[:, :2]).max(axis=1), (boxes[:, :2] + boxes[:, 2:] - 1) / 2
    patch = Patch(*map(jnp.asarray, (values, canvas_masks, size_px, np.full(num, target, np.int32))))
    info = dict(
        images=patched,
        loss=loss.astype(np.float32),
        placements=Placement(*center.T.astype(np.float32), np.zeros(num, np.float32), np.ones(num, np.float32)),
        clean_predictions=clean_predictions,
        predictions=predictions,
        success=is_fooled(predictions, labels, target),
        queries=queries,
        seed=np.asarray(jax.random.key_data(key)),
    )
    return patch, info


def check(images: np.ndarray, labels: np.ndarray, settings) -> None:
    """Raise ValueError unless the arrays are what attacks take and a patch of `settings.size_px` fits into the images."""
    check_arrays(images, labels)
    if settings.size_px > min(images.shape[1:3]):
        raise ValueError(
            f"size_px: expected a patch that fits into {images.shape[1]} x {images.shape[2]} px, got {settings.size_px}"
        )


def predict_clean(ask: Callable, images: np.ndarray, labels: np.ndarray, target: int) -> np.ndarray:
    """Return predictions int32 [B] without a patch; raises ValueError where the network lacks a label or the target."""
    logits = ask(images, 0)
    for name, low, high in (("labels", labels.min(), labels.max()), ("target", max(target, 0), target)):
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(
                f"{name}: expected classes below the network's {logits.shape[1]} logits, got {low} to {high}"
            )
    return logits.argmax(axis=1).astype(np.int32)


def _log_sum(logits):
    """``log sum_k exp z_k`` per row; -inf logits count as absent, and one per row is finite."""
    peak = logits.max(axis=1, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(divide="ignore"):  # log 0 = -inf where no class is left
        return np.log(np.exp(logits - peak).sum(axis=1)) + peak[:, 0]


def _bounding_box(mask):
    """Return (top, left, bottom, right), the last two exclusive, of a mask with at least one pixel."""
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return rows[0], cols[0], rows[-1] + 1, cols[-1] + 1
