"""Sparse-RS: score-based random search for patches, for one image each or universal; gradients are never read.

The patch's colours are corners of the colour cube, so it lies on the uint8 grid all along. All images advance together,
one call of the network per query; the search runs on the host in NumPy. Left out: frames and scattered pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from triqdef_jax import metrics
from triqdef_jax.attacks import queries
from triqdef_jax.attacks.settings import NUM_EVAL_IMAGES, Patch, check_positive
from triqdef_jax.patches import Placement

# A square's share of the patch is divided by `divisor` once more than `mark` of 10,000 parts of the budget are spent.
SHRINKING = ((10, 2), (50, 4), (200, 8), (500, 16), (1000, 32), (2000, 64), (4000, 128), (6000, 256), (8000, 512))
START_FRACS = {"untargeted": 0.4, "targeted": 0.1, "universal": 0.3}  # alpha_init of the paper
REACH_FRAC = 0.75  # of the image's side: how far the first moves go
NUM_START_SQUARES = 1000  # painted over one another to start a universal patch


@dataclass(frozen=True, kw_only=True)
class SparseRsSettings:
    """Settings of the random search.

    Attributes:
      size_px: side of the square patch in pixels.
      target: class aimed at, -1 for untargeted; a universal patch needs a class.
      is_universal: one patch for all images instead of one for each.
      num_queries: budget: patched images per image, or, universal, patches tried. The paper has 10,000 untargeted,
        50,000 targeted and 100,000 universal.
      num_restarts: searches from new starts among which the budget is shared; an image keeps the best of all. The paper has
        one. On small images several find more: on 64 digits of 16 px, a 3 px patch and 2,000 queries left a ResNet-8 right
        on 10 and 13 images (two keys) from one start, on 3 and 5 from eight. Not for a universal patch.
      start_frac: share of the patch that the first squares cover, None for the paper's `START_FRACS`.
      move_every_queries: one of so many queries moves the patch, the others repaint a square of it.
      stop_when_fooled: an image is asked no more once it is fooled; else its loss is lowered to the end of the budget.
      batch_images: largest number of images in one call of the network.
      universal_images: images on which a universal patch is tried.
      num_batches: how often these images are drawn anew over the budget.
      num_eval_images: images held out of a universal search; they choose the best patch and measure success.
      random_logits: whether the network is called as ``logits_fn(key, images)`` with a fresh key in each step. A lucky
        draw then ends a search, and success, measured on one more draw, is lower; ``eot.fixed`` avoids both.
    """

    size_px: int
    target: int = -1
    is_universal: bool = False
    num_queries: int = 10_000
    num_restarts: int = 1
    start_frac: float | None = None
    move_every_queries: int = 4
    stop_when_fooled: bool = True
    batch_images: int = 256
    universal_images: int = 30
    num_batches: int = 10
    num_eval_images: int = NUM_EVAL_IMAGES
    random_logits: bool = False

    def __post_init__(self):
        counts = ("num_queries", "num_restarts", "batch_images", "universal_images", "num_batches", "num_eval_images")
        for name in ("size_px", *counts):
            check_positive(name, getattr(self, name))
        if self.num_restarts > (1 if self.is_universal else self.num_queries):
            raise ValueError(
                f"num_restarts: expected 1 for a universal patch and at most num_queries={self.num_queries} otherwise, "
                f"got {self.num_restarts}"
            )
        if self.target < -1 or (self.is_universal and self.target < 0):
            raise ValueError(
                f"target: expected a class >= 0{'' if self.is_universal else ' or -1 for untargeted'}, got {self.target}"
            )
        if self.start_frac is not None and not 0.0 < self.start_frac <= 1.0:
            raise ValueError(f"start_frac: expected a share in (0, 1] or None, got {self.start_frac}")
        if self.move_every_queries < 2:
            raise ValueError(f"move_every_queries: expected 2 or more, got {self.move_every_queries}")

    @property
    def num_steps(self) -> int:
        """Queries of one search."""
        return self.num_queries // self.num_restarts

    def side_px(self, query: int) -> int:
        """Side of the square that is repainted at a query of a search, in pixels: ``max(1, floor(size_px sqrt(share)))``."""
        goal = "universal" if self.is_universal else "targeted" if self.target >= 0 else "untargeted"
        spent = query * 10_000 // self.num_steps
        divisor = max((divisor for mark, divisor in SHRINKING if spent > mark), default=1)
        return max(1, int(self.size_px * math.sqrt((self.start_frac or START_FRACS[goal]) / divisor)))

    def first_channel_query(self) -> int:
        """Query from which single channels change instead of pixels: half of those that are left for single pixels."""
        first = next((query for query in range(self.num_steps) if self.side_px(query) == 1), self.num_steps)
        return first + (self.num_steps - first) // 2


def attack(
    key: jax.Array, logits_fn: Callable, images: jax.Array, labels: jax.Array, settings: SparseRsSettings
) -> tuple[Patch, dict]:
    """Search for patches at random: propose a repainted square or a move, keep it when the loss falls.

    Untargeted, the loss is the margin ``z_y - max_{k != y} z_k``; targeted, the cross-entropy of the target. Colours are
    corners of the colour cube. A patch starts as vertical stripes at a random place. Squares shrink over the budget to
    single pixels, which always change, then to single channels; moves shrink linearly.

    Args:
      key: PRNG key.
      logits_fn: ``images float32 [N, H, W, C] -> logits [N, K]``, any arrays that NumPy can read; it gets NumPy images,
        always the same N. With `settings.random_logits`: ``(key, images) -> logits``.
      images: float32 [B, H, W, C] in [0, 1]; of training, B > num_eval_images, when universal.
      labels: int32 [B].
      settings: `SparseRsSettings`.

    Returns:
      For single images: `Patch` with P = B and a dict of NumPy arrays: `images` [B, H, W, C] with the patches on;
      `predictions` [B], measured on these once more after the search, and `success` [B] by them; `clean_predictions`
      [B]; `loss` [B], the lowest; `queries` int32 [B], patched images asked during the search; `placements`; `seed`.
      Universal: `Patch` with P = 1 and `queries` [1], images asked during the search; `losses` [num_queries, 1] of the
      patch kept after each query on its batch; `eval_losses` [looks, 1]; `best_loss` [1]; `eval_index` [E],
      `clean_predictions` [E]; `eval_placements`, `predictions` [1, E]; `success`, counts; `seed`.

    Raises:
      ValueError: for arrays of wrong shape, type or range, a patch that does not fit, a target the network lacks.

    Reference: Croce, Andriushchenko, Singh, Flammarion, Hein, Sparse-RS, 2022, patches; schedule in `SHRINKING`.
    Deviations: images that are wrong from the start are attacked like all others; places of squares are drawn per image;
    when a universal search draws new images, it asks them about the patch it has, where the paper takes the next one
    whatever its loss; and its best patch is chosen on held-out images, where the paper takes the last.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    queries.check(images, labels, settings)
    search = _search_universal if settings.is_universal else _search_images
    return search(key, logits_fn, images, labels, settings)


class _Found(NamedTuple):
    """The best patch of each image; arrays are changed in place."""

    values: np.ndarray  # [B, S, S, C]
    corners: np.ndarray  # int [B, 2]
    loss: np.ndarray  # [B]
    fooled: np.ndarray  # bool [B]


def _search_images(key, logits_fn, images, labels, settings):
    rng = queries.make_rng(key)
    ask = _make_ask(key, logits_fn, settings, min(settings.batch_images, len(images)))
    clean = queries.predict_clean(ask, images, labels, settings.target)
    found, asked = None, np.zeros(len(images), np.int32)
    for restart in range(settings.num_restarts):
        rows = (
            np.arange(len(images)) if found is None or not settings.stop_when_fooled else np.flatnonzero(~found.fooled)
        )
        if not rows.size:
            break
        first_step = 1 + restart * settings.num_steps
        other, used = _search_once(rng, ask, images[rows], labels[rows], first_step, settings)
        asked[rows] += used
        if found is None:
            found = other
        else:
            _keep_better(found, rows, other)
    patched = queries.paste(images, found.values, found.corners)
    masks = np.zeros(images.shape[:3], bool)
    masks[queries.window(found.corners, found.values.shape[1:3])] = True
    return queries.report(
        key,
        patched,
        masks,
        labels,
        target=settings.target,
        canvas_px=settings.size_px,
        clean_predictions=clean,
        predictions=ask(patched, settings.num_queries + 1).argmax(axis=1).astype(np.int32),
        loss=found.loss,
        queries=asked,
    )


def _search_once(rng, ask, images, labels, first_step, settings):
    """Search from one start; return the best patches and how often each image was asked about, int32 [B]."""
    values, corners = _start_stripes(rng, images, settings.size_px)
    logits = ask(queries.paste(images, values, corners), first_step)
    found = _Found(values, corners, *_measure(logits, labels, settings.target))
    asked, first_channel = np.ones(len(images), np.int32), settings.first_channel_query()
    for query in range(1, settings.num_steps):
        rows = np.flatnonzero(~found.fooled) if settings.stop_when_fooled else np.arange(len(images))
        if not rows.size:
            break
        proposal = _propose(rng, values[rows], corners[rows], query, images.shape, settings, first_channel)
        logits = ask(queries.paste(images[rows], *proposal), first_step + query)
        _keep_better(found, rows, _Found(*proposal, *_measure(logits, labels[rows], settings.target)))
        asked[rows] += 1
    return found, asked


def _keep_better(found, rows, other):
    """Put those patches of `other`, of the images `rows`, in place of the found ones that they beat."""
    fooled, loss = found.fooled[rows], found.loss[rows]
    # A patch that fools is never given up for one with a lower loss that does not, which targets make possible.
    is_better = (other.fooled > fooled) | ((other.fooled == fooled) & (other.loss < loss))
    for array, values in zip(found, other, strict=True):
        array[rows[is_better]] = values[is_better]


def _search_universal(key, logits_fn, images, labels, settings):
    num_eval, rng = settings.num_eval_images, queries.make_rng(key)
    if len(images) <= num_eval:
        raise ValueError(f"images: expected more than num_eval_images={num_eval}, got {len(images)}; hold fewer out")
    order = rng.permutation(len(images))
    held, kept = order[:num_eval], order[num_eval:]
    num = min(settings.universal_images, len(kept))
    # Two sizes, for a batch as small as the paper's would waste most of a call padded to the held-out images.
    ask = _make_ask(key, logits_fn, settings, min(settings.batch_images, num))
    ask_held = _make_ask(key, logits_fn, settings, min(settings.batch_images, num_eval))
    clean = queries.predict_clean(ask_held, images[held], labels, settings.target)
    held_corners = _draw_corners(rng, images.shape, num_eval, settings.size_px)
    first_channel, period = settings.first_channel_query(), math.ceil(settings.num_queries / settings.num_batches)

    def loss_on(ask, rows, corners, values, step):
        pasted = queries.paste(images[rows], np.broadcast_to(values, (len(rows), *values.shape[1:])), corners)
        logits = ask(pasted, step)
        return -queries.log_success(logits, labels[rows], settings.target).mean(), logits

    def look(best, values, step):
        held_loss, logits = loss_on(ask_held, held, held_corners, values, step)
        found = (held_loss, values, logits.argmax(axis=1).astype(np.int32))
        return (found if best is None or held_loss < best[0] else best), held_loss

    values, best, losses, looks = _start_squares(rng, settings.size_px, images.shape[-1]), None, [], []
    for query in range(settings.num_queries):
        proposal = values
        if query % period == 0:
            best, held_loss = look(best, values, 2 * query + 2)
            looks.append(held_loss)
            rows, loss = rng.choice(kept, num, replace=False), np.inf
            corners = _draw_corners(rng, images.shape, num, settings.size_px)
        else:
            proposal = _repaint(rng, values, query, settings, first_channel)
        new_loss, _ = loss_on(ask, rows, corners, proposal, 2 * query + 1)
        if new_loss < loss:
            values, loss = proposal, new_loss
        losses.append(loss)
    best, held_loss = look(best, values, 2 * settings.num_queries + 2)
    looks.append(held_loss)
    asked = settings.num_queries * num + len(looks) * num_eval
    center = held_corners.T.astype(np.float32)[:, None] + np.float32((settings.size_px - 1) / 2)
    return _universal_patch(best[1], settings), dict(
        losses=np.array(losses, np.float32)[:, None],
        eval_losses=np.array(looks, np.float32)[:, None],
        best_loss=np.array([best[0]], np.float32),
        eval_index=held,
        eval_placements=Placement(*center, np.zeros((1, num_eval), np.float32), np.ones((1, num_eval), np.float32)),
        clean_predictions=clean,
        predictions=best[2][None],
        success=metrics.success_counts(clean, best[2][None], labels[held], np.array([settings.target])),
        queries=np.array([asked], np.int32),
        seed=np.asarray(jax.random.key_data(key)),
    )


def _universal_patch(values, settings):
    size = settings.size_px
    return Patch(jnp.asarray(values), jnp.ones((1, size, size)), jnp.array([size]), jnp.array([settings.target]))


def _make_ask(key, logits_fn, settings, batch_images):
    key = jax.random.fold_in(key, 1)
    return queries.make_ask(key, logits_fn, batch_images=batch_images, random_logits=settings.random_logits)


def _measure(logits, labels, target):
    """Return the loss, float [N], and whether each image is fooled, bool [N]."""
    loss = queries.margin(logits, labels) if target < 0 else -queries.log_success(logits, labels, target)
    return loss, queries.is_fooled(logits.argmax(axis=1), labels, target)


def _start_stripes(rng, images, size_px):
    """Return vertical stripes [B, S, S, C] of random colours and random corners [B, 2]."""
    num, channels = len(images), images.shape[-1]
    stripes = rng.integers(0, 2, (num, 1, size_px, channels)).astype(np.float32)
    return np.repeat(stripes, size_px, axis=1), _draw_corners(rng, images.shape, num, size_px)


def _start_squares(rng, size_px, channels):
    """Return one patch [1, S, S, C] of squares with sides up to the root of its own, painted over one another."""
    values = np.zeros((1, size_px, size_px, channels), np.float32)
    for _ in range(NUM_START_SQUARES):
        side = rng.integers(1, math.isqrt(size_px) + 1)
        row, col = rng.integers(0, size_px - side + 1, 2)
        values[0, row : row + side, col : col + side] = rng.integers(0, 2, channels)
    return values


def _draw_corners(rng, image_shape, num, size_px):
    return rng.integers(0, np.array(image_shape[1:3]) - size_px + 1, (num, 2))


def _propose(rng, values, corners, query, image_shape, settings, first_channel):
    """Return changed (values, corners): a move of at most the reach, when it is one's turn, or a repainted square."""
    sides = np.array(image_shape[1:3])
    room = sides - settings.size_px
    reach = np.floor(REACH_FRAC * sides * (1.0 - query / settings.num_steps)).astype(int)
    if query % settings.move_every_queries == 0 and (np.minimum(reach, room) > 0).any():
        return values, np.clip(corners + rng.integers(-reach, reach + 1, corners.shape), 0, room)
    return _repaint(rng, values, query, settings, first_channel), corners


def _repaint(rng, values, query, settings, first_channel):
    """Return patches [N, S, S, C] with one square each in a random colour, single pixels in a colour that is new."""
    (num, size, _, channels), side = values.shape, settings.side_px(query)
    square = queries.window(rng.integers(0, size - side + 1, (num, 2)), (side, side))
    if query >= first_channel:
        flips = np.eye(channels)[rng.integers(0, channels, num)]
    else:  # at least one channel changes
        flips = rng.integers(1, 2**channels, num)[:, None] >> np.arange(channels) & 1
    painted = values.copy()
    colors = rng.integers(0, 2, (num, 1, 1, channels)) if side > 1 else np.abs(values[square] - flips[:, None, None])
    painted[square] = colors
    return painted
