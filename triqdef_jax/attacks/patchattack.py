"""PatchAttack: black-box patches by reinforcement learning, of textures (TPA) or of one colour (MPA).

Each image has a policy of its own (`policies`) that learns where to put which crop of which texture, or which rectangle.
The attacked network is asked for logits and never differentiated. Images are float32 [B, H, W, C] in [0, 1].
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from triqdef_jax.attacks import policies, queries
from triqdef_jax.attacks.settings import Patch, check_choice, check_positive
from triqdef_jax.attacks.textures import Textures

KINDS = ("tpa", "mpa")
NUM_LEVELS = 256  # of each channel of MPA's colour
# The paper takes the area in pixels over sigma^2 = 400^2 off the reward, at 224 x 224 px; this is the same per share.
AREA_PENALTY = 224**2 / 400**2
MIN_DEVIATION = 1e-8  # of a batch of rewards: samples that are all alike teach nothing
_LAST_STEP = 2**31 - 1  # of a random network: the draw that measures
FOOLED = 1e6  # a sample that fools ranks above all that do not; rewards are above -1e4


@dataclass(frozen=True, kw_only=True)
class PatchAttackSettings:
    """Settings of the attack.

    Attributes:
      size_px: side of TPA's squares, or the longest side of MPA's rectangle, in pixels.
      target: class aimed at, -1 for untargeted.
      kind: 'tpa', squares cropped from textures; 'mpa', one rectangle in one colour, as small as will do.
      num_queries: budget: patched images per image, over all agents; whole batches of samples only.
      num_samples: actions sampled for an image in each step of its policy. The paper takes 500 in up to 50 steps.
      num_agents: policies one after another, each of which adds a square to the best image so far. TPA only; the paper
        takes up to 10.
      stop_when_fooled: an image is asked no more once it is fooled; else its best patch is improved to the end.
      batch_images: images in one call of the network, and policies trained side by side.
      random_logits: whether the network is called as ``logits_fn(key, images)`` with a fresh key in each step. A lucky
        draw then ends a search, and success, measured on one more draw, is lower; ``eot.fixed`` avoids both.
    """

    size_px: int
    target: int = -1
    kind: str = "tpa"
    num_queries: int = 10_000
    num_samples: int = 50
    num_agents: int = 1
    stop_when_fooled: bool = True
    batch_images: int = 256
    random_logits: bool = False

    def __post_init__(self):
        check_choice("kind", self.kind, KINDS)
        for name in ("size_px", "num_queries", "num_agents", "batch_images"):
            check_positive(name, getattr(self, name))
        if self.target < -1:
            raise ValueError(f"target: expected a class >= 0 or -1 for untargeted, got {self.target}")
        if self.num_samples < 2:
            raise ValueError(f"num_samples: expected 2 or more, for rewards are compared, got {self.num_samples}")
        if self.kind == "mpa" and self.num_agents > 1:
            raise ValueError(f"num_agents: expected 1 for kind 'mpa', got {self.num_agents}")
        if not self.num_steps:
            raise ValueError(
                f"num_queries: expected num_agents x num_samples = {self.num_agents * self.num_samples} or more, "
                f"got {self.num_queries}"
            )

    @property
    def num_steps(self) -> int:
        """Steps of each agent."""
        return self.num_queries // (self.num_agents * self.num_samples)


class _Best(NamedTuple):
    """The best patch of each image so far; arrays are changed in place."""

    images: np.ndarray  # [B, H, W, C], patched
    masks: np.ndarray  # bool [B, H, W]
    score: np.ndarray  # [B]
    log_success: np.ndarray  # [B]
    fooled: np.ndarray  # bool [B]
    asked: np.ndarray  # int32 [B]


class _Plan(NamedTuple):
    """What all agents share.

    Attributes:
      sizes: number of choices of each action.
      allowed: for each action None or bool [B, n_i].
      render: ``(actions [N, A], images [N, H, W, C], masks [N, H, W]) -> patched images, masks``.
      num_policies: trained side by side.
      num_chunks: how many times, for all images.
    """

    sizes: tuple[int, ...]
    allowed: tuple
    render: Callable
    num_policies: int
    num_chunks: int

    def chunk(self, index: int) -> slice:
        """Images of a chunk; the last may hold fewer than there are policies."""
        return slice(index * self.num_policies, (index + 1) * self.num_policies)

    def pad(self, rows: np.ndarray) -> np.ndarray:
        """Repeat the first row so that every policy has one."""
        return np.concatenate([rows, np.repeat(rows[:1], self.num_policies - len(rows), axis=0)])


def attack(
    key: jax.Array,
    logits_fn: Callable,
    images: jax.Array,
    labels: jax.Array,
    settings: PatchAttackSettings,
    *,
    textures: Textures | None = None,
) -> tuple[Patch, dict]:
    """Train a policy per image that places a textured square or a plain rectangle; keep the best sample.

    The reward of a sample is ``log p`` with p the target's probability, or ``1 - p(label)`` untargeted; MPA takes
    `AREA_PENALTY` times its share of the image off. Rewards are standardised within the batch of an image.

    Args:
      key: PRNG key.
      logits_fn: ``images float32 [N, H, W, C] -> logits [N, K]``, any arrays that NumPy can read; it gets NumPy images,
        always the same N. With `settings.random_logits`: ``(key, images) -> logits``.
      images: float32 [B, H, W, C] in [0, 1].
      labels: int32 [B].
      settings: `PatchAttackSettings`.
      textures: TPA's dictionary, `make_textures` of training images. An untargeted attack takes textures of all classes
        but the image's own, a targeted one those of the target.

    Returns:
      `Patch` with P = B and the info of `sparse_rs.attack` on single images; `loss` is ``-log p`` of the best sample. It
      ranks by success first, then by reward; among MPA's successes by area. The canvas has side `size_px`, with several
      agents the image's longer side.

    Raises:
      ValueError: for arrays of wrong shape, type or range, a patch that does not fit, a target that the network lacks,
        textures that are missing or smaller than the patch.

    Reference: Yang, Kortylewski, Xie, Cao, Yuille, PatchAttack, 2020, sections 3.2 and 3.3: LSTM with embeddings of 30,
    Adam at 0.03, standardised rewards, no discount. Deviations: 50 samples per step instead of 500, which leaves 40 steps
    of 2,000 queries instead of 4; an image stops at its first success and else uses its whole budget, where the paper
    waits three steps for the former and stops when rewards settle; MPA's rectangle is bounded by `size_px`, its second
    corner drawn relative to the first, so that it meets other attacks on equal terms; with `size_px` the image's side it
    is the paper's MPA_RGB.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    queries.check(images, labels, settings)
    plan = _make_plan(images, labels, settings, textures)
    network_key, policy_key = jax.random.split(key)
    rows = min(settings.batch_images, len(images) * settings.num_samples)
    ask = queries.make_ask(network_key, logits_fn, batch_images=rows, random_logits=settings.random_logits)
    clean = queries.predict_clean(ask, images, labels, settings.target)
    best = _start(images)
    for run in range(plan.num_chunks * settings.num_agents):
        _run_agent(jax.random.fold_in(policy_key, run), ask, best, labels, run, plan, settings)
    return queries.report(
        key,
        best.images,
        best.masks,
        labels,
        target=settings.target,
        canvas_px=settings.size_px if settings.num_agents == 1 else max(images.shape[1:3]),
        clean_predictions=clean,
        predictions=ask(best.images, _LAST_STEP).argmax(axis=1).astype(np.int32),
        loss=-best.log_success,
        queries=best.asked,
    )


def _start(images):
    num = len(images)
    worst = np.full((2, num), -np.inf)
    return _Best(images.copy(), np.zeros(images.shape[:3], bool), *worst, np.zeros(num, bool), np.zeros(num, np.int32))


def _run_agent(key, ask, best, labels, run, plan, settings):
    """Train the policies of one chunk of images and improve `best` in place."""
    chunk = np.arange(len(labels))[plan.chunk(run // settings.num_agents)]
    bases, masks = best.images[chunk].copy(), best.masks[chunk].copy()  # agents add to what the one before left
    allowed = tuple(None if mask is None else plan.pad(mask[chunk]) for mask in plan.allowed)
    learners = policies.make_policies(jax.random.fold_in(key, 0), num=plan.num_policies, sizes=plan.sizes)
    for step in range(settings.num_steps):
        searched = np.flatnonzero(~best.fooled[chunk]) if settings.stop_when_fooled else np.arange(len(chunk))
        if not searched.size:
            return
        draw_key = jax.random.fold_in(key, 1 + step)
        actions = policies.sample(draw_key, learners, allowed, num_samples=settings.num_samples)
        rows, chosen = chunk[searched], np.asarray(actions)[searched].reshape(-1, len(plan.sizes))
        samples = plan.render(chosen, *(np.repeat(a[searched], settings.num_samples, axis=0) for a in (bases, masks)))
        logits = ask(samples[0], 1 + run * settings.num_steps + step)
        rewards = _judge(best, rows, samples, logits, labels[rows], settings)
        advantages = np.zeros((plan.num_policies, settings.num_samples), np.float32)
        deviation = np.maximum(rewards.std(axis=1, keepdims=True), MIN_DEVIATION)
        advantages[searched] = (rewards - rewards.mean(axis=1, keepdims=True)) / deviation
        learners = policies.learn(learners, actions, advantages, allowed)


def _judge(best, rows, samples, logits, labels, settings):
    """Keep the best samples of the images `rows` in place and return all rewards, float [A, S]."""
    (images, masks), num = samples, settings.num_samples
    labels = np.repeat(labels, num)
    log_success = queries.log_success(logits, labels, settings.target)
    fooled = queries.is_fooled(logits.argmax(axis=1), labels, settings.target)
    penalty = AREA_PENALTY * masks.mean(axis=(1, 2)) if settings.kind == "mpa" else 0.0
    rewards = log_success - penalty
    score = np.where(fooled, FOOLED + (-penalty if settings.kind == "mpa" else rewards), rewards).reshape(-1, num)
    winner = score.argmax(axis=1)
    flat = np.arange(len(rows)) * num + winner
    best.asked[rows] += num
    is_better = score.max(axis=1) > best.score[rows]
    rows, flat = rows[is_better], flat[is_better]
    for array, values in zip(best, (images, masks, score.ravel(), log_success, fooled), strict=False):
        array[rows] = values[flat]
    return rewards.reshape(-1, num)


def _make_plan(images, labels, settings, textures):
    num_policies = min(settings.batch_images, len(images))
    shared = dict(num_policies=num_policies, num_chunks=-(-len(images) // num_policies))
    sides, size = images.shape[1:3], settings.size_px
    if settings.kind == "mpa":
        sizes = (*sides, size, size, *[NUM_LEVELS] * images.shape[-1])
        return _Plan(sizes=sizes, allowed=(None,) * len(sizes), render=_paint, **shared)
    allowed = _allowed_textures(images, labels, textures, settings)
    crops = textures.values.shape[1] - size + 1
    sizes = (sides[0] - size + 1, sides[1] - size + 1, len(textures.values), crops, crops)
    render = functools.partial(_paste_crops, textures.values, size)
    return _Plan(sizes=sizes, allowed=(None, None, allowed, None, None), render=render, **shared)


def _allowed_textures(images, labels, textures, settings):
    """Return bool [B, K]; raises ValueError for textures that do not serve."""
    if textures is None:
        raise ValueError(
            "textures: kind 'tpa' needs a dictionary; make one with textures.make_textures(training images)"
        )
    if textures.values.shape[1] < settings.size_px or textures.values.shape[-1] != images.shape[-1]:
        raise ValueError(
            f"textures: expected [K, T, T, {images.shape[-1]}] with T >= size_px={settings.size_px}, "
            f"got {textures.values.shape}"
        )
    goal = labels if settings.target < 0 else np.full(len(labels), settings.target)
    allowed = (textures.classes[None, :] == goal[:, None]) != (settings.target < 0)
    if not allowed.any(axis=1).all():
        wanted = "a class other than each image's" if settings.target < 0 else f"target class {settings.target}"
        raise ValueError(f"textures: expected some of {wanted}, got classes {np.unique(textures.classes).tolist()}")
    return allowed


def _paste_crops(textures, size_px, actions, images, masks):
    """Actions: row, column, texture, row and column of the crop."""
    corners, square = actions[:, :2], (size_px, size_px)
    _, *crop = queries.window(actions[:, 3:], square)
    masks = masks.copy()
    masks[queries.window(corners, square)] = True
    return queries.paste(images, textures[actions[:, 2, None, None], *crop], corners), masks


def _paint(actions, images, masks):
    """Actions: row and column of a corner, from there to the opposite corner, and the level of each channel."""
    del masks  # one agent only: nothing is there yet
    inside = np.ones(images.shape[:3], bool)
    for axis, shape in ((0, (-1, images.shape[1], 1)), (1, (-1, 1, images.shape[2]))):
        offset = np.arange(images.shape[1 + axis])[None, :] - actions[:, axis, None]
        inside &= ((offset >= 0) & (offset <= actions[:, 2 + axis, None])).reshape(shape)
    colors = (actions[:, 4:] / 255.0).astype(np.float32)[:, None, None]
    return np.where(inside[..., None], colors, images), inside
