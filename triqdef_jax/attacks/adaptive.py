"""The attack on a defence that knows itself watched: all bit-widths at once, unsaturated logits, every gradient estimator, re-alignment.

Per-image patches, sign steps from several starts and places; values live on the uint8 grid wherever they are measured. Networks come as
functions from images to the logits and feature maps of K bit-widths at once, one function per gradient estimator of the quantizers
(`models.multibit.make_outputs_fn` and `MultiBitNetwork.with_estimator` build them). Arrays `[K, B]` run over bit-widths, then images.
Left out: random networks. A bit-width drawn per query is covered, because the mean over bit-widths is its expectation.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from triqdef_jax import patches, perceptual
from triqdef_jax.attacks import loop, losses
from triqdef_jax.attacks.settings import Patch, check_positive
from triqdef_jax.patches import Placement

DICE_WEIGHT, HOG_WEIGHT = 0.5, 1.0  # alpha and beta with which TriQDef pushes the same similarities down


def _cross_entropy(logits, labels, targets):
    """CE(target), or -CE(label) without one."""
    at_target = losses.cross_entropy(logits, jnp.maximum(targets, 0))
    return jnp.where(targets >= 0, at_target, -losses.cross_entropy(logits, labels))


LOSSES = {"margin": losses.margin, "cross_entropy": _cross_entropy}
AGGREGATES = {"mean": functools.partial(jnp.mean, axis=0), "worst": functools.partial(jnp.max, axis=0)}


@dataclass(frozen=True, kw_only=True)
class AdaptiveSettings:
    """Settings of the adaptive attack; each component can be switched off by itself.

    Attributes:
      size_px: side of the square patch in pixels.
      target: class aimed at, -1 for untargeted.
      loss: what is minimised at each bit-width, a key of `LOSSES`; with a target both aim at it.
      aggregate: 'mean' of the bit-widths' losses, or 'worst', the largest: then the bit-width that resists most is attacked.
      rescale_margin: mean size of the lead of the label over the other classes to which each bit-width's logits are scaled, 0 to leave
        them alone. At 7 a softmax over ten classes has 1 % left to lose. Far below, cross-entropy pushes all other classes alike: at 1
        one start fooled 48 % instead of 57 % (ResNet-8 on digits, 64 images, three keys, mean over five bit-widths).
      estimators: names of the functions to attack through, in order; each image keeps the best of all.
      realign_weight: weight of the similarity between bit-widths, which is raised; 0 for none.
      realign_features: raise the similarity of the feature maps, which FDP pushes down.
      realign_gradients: raise the similarity of the input gradients, which GPDP pushes down; each step then differentiates twice.
      num_steps: sign steps per start.
      step_size: pixel value per step, in units of the range [0, 1].
      num_restarts: starts and places per image and estimator.
      location: 'random', 'center', 'corner' or 'fixed', see `patches.sample_placements`.
    """

    size_px: int
    target: int = -1
    loss: str = "margin"
    aggregate: str = "mean"
    rescale_margin: float = 7.0
    estimators: tuple[str, ...] = ("clipped", "identity", "soft_round")
    realign_weight: float = 0.0
    realign_features: bool = True
    realign_gradients: bool = False
    num_steps: int = 100
    step_size: float = 0.05
    num_restarts: int = 1
    location: str = "random"

    def __post_init__(self):
        for name, known in (("loss", LOSSES), ("aggregate", AGGREGATES), ("location", patches.LOCATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {tuple(known)}, got {getattr(self, name)!r}")
        for name in ("size_px", "num_steps", "step_size", "num_restarts"):
            check_positive(name, getattr(self, name))
        for name in ("rescale_margin", "realign_weight"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.target < -1:
            raise ValueError(f"target: expected a class >= 0 or -1 for untargeted, got {self.target}")
        if not self.estimators:
            raise ValueError("estimators: expected at least one name, got none")
        if self.realign_weight and not (self.realign_features or self.realign_gradients):
            raise ValueError("realign_weight: expected realign_features or realign_gradients with it, got neither")


class _Rule(NamedTuple):
    """The part of the settings that shapes the traced program."""

    loss: str
    aggregate: str
    realigns_features: bool
    realigns_gradients: bool


class _Problem(NamedTuple):
    """What stays the same during a run; all arrays."""

    outputs_fn: jax.tree_util.Partial
    images: jax.Array  # [B, H, H, C]
    labels: jax.Array  # [B]
    targets: jax.Array  # [B]
    masks: jax.Array  # [B, S, S], all ones
    placements: Placement  # [B]
    factors: jax.Array  # [K], of the logits
    step_size: jax.Array
    realign_weight: jax.Array


class _Best(NamedTuple):
    """The best iterate of each image, as it would be stored."""

    num_resisting: jax.Array  # int32 [B], bit-widths that are not fooled
    loss: jax.Array  # [B], aggregated margin of the scaled logits
    values: jax.Array  # [B, S, S, C], on the uint8 grid
    predictions: jax.Array  # int32 [B, K]


class _State(NamedTuple):
    """What a step changes."""

    values: jax.Array  # [B, S, S, C]
    best: _Best
    num_zero: jax.Array  # int32 [B], steps on which no pixel had a gradient


def attack(
    key: jax.Array,
    outputs_fns: Mapping[str, Callable],
    images: jax.Array,
    labels: jax.Array,
    settings: AdaptiveSettings,
) -> tuple[Patch, dict]:
    """Find for each image the patch that fools as many bit-widths as possible.

    ``P <- clip(P - step_size * sign(grad_P [agg_k loss(c_k f_k(x_P), y) - realign_weight * similarity(x_P)]))``

    with c_k the factor that gives bit-width k a mean lead of `rescale_margin` on the clean images, and the similarity, in [0, 1.5], the
    mean over maps and pairs of bit-widths of ``alpha soft_dice + beta cos(hog)``: the bracket of FDP and GPDP with TriQDef's weights.
    Every iterate is measured as it would be stored. The one kept fools the most bit-widths and, among those that fool equally many,
    has the lowest aggregated margin of the scaled logits; so over steps, restarts and estimators.

    Args:
      key: PRNG key; run i of all estimators' restarts starts from fold_in(key, i). Every run has places and noise of its own: on trained
        networks a second place gains more than a second gradient at the same place.
      outputs_fns: estimator name to ``images [B, H, H, C] -> (logits [K, B, classes], dict of features [K, B, h, w, C'])``, in inference
        mode; the values must be the same under all names. Give ``jax.tree_util.Partial(fn, params)``, and the step is compiled once for
        all params. With `realign_gradients` it also takes ``[K, B, H, H, C]``, one batch per bit-width.
      images: float32 [B, H, H, C] in [0, 1].
      labels: int32 [B].
      settings: `AdaptiveSettings`.

    Returns:
      `Patch` with one patch per image (P = B), on the uint8 grid, and a dict of NumPy arrays. For each image: `images` [B, H, H, C] with
      the patch on; `placements`; `loss` [B], the aggregated margin of the scaled logits; `predictions_per_bit` and
      `clean_predictions_per_bit` int [K, B]; `success_per_bit` bool [K, B]; `success` bool [B], fooled at every bit-width; `hardest`
      int [B], the first bit-width that is not fooled or else the first of all; `predictions` and `clean_predictions` [B], those of
      bit-width `hardest`; `estimator` int [B], index of the winner. For all runs, [estimators, restarts, B]: `best_loss`, `num_fooled`
      (bit-widths) and `zero_gradient`, the share of steps without any gradient, a sign of masking. Also `factors` [K] and `seed`, the
      key's words.

    Raises:
      ValueError: for arrays of wrong shape or type, an estimator without a function, a missing class, features needed and not given,
        maps too small for orientation histograms, logits that are never finite.

    Reference: TriQDef (Guesmi et al. 2026) for the similarities, whose sign is turned here. Rescaling: Gupta and Ajanthan, Improved
      Gradient based Adversarial Attacks for Quantized Networks, AAAI 2022: their NJS rule divides by the mean singular value of the
      Jacobian and bounds the softmax's error signal per image. Deviation: one factor per bit-width from the mean lead, so that all
      bit-widths weigh alike in the objective; sign steps need no Jacobian, whose size they ignore.
    """
    fns = _checked_fns(outputs_fns, images, labels, settings)
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    first = fns[settings.estimators[0]]  # forward passes are the same through all
    clean, factors = _look_at_clean(first, images, labels, jnp.float32(settings.rescale_margin))
    names = np.repeat(settings.estimators, settings.num_restarts)
    runs = [
        _descend(jax.random.fold_in(key, start), fns[name], images, labels, factors, settings)
        for start, name in enumerate(names)
    ]
    bests, zeros, placements = (jax.tree.map(lambda *x: np.stack(x), *items) for items in zip(*runs, strict=True))
    patch, info = _choose(bests, placements, images, np.asarray(labels), np.asarray(clean), settings)
    by_run = info["best_loss"].shape
    info |= {"factors": np.asarray(factors), "zero_gradient": zeros.reshape(by_run)}
    return patch, info | {"seed": np.asarray(jax.random.key_data(key))}


def _descend(key, outputs_fn, images, labels, factors, settings):
    """Run one start through one estimator; return its `_Best`, the share of steps without a gradient [B], its placements."""
    values, placements = _start(key, images.shape, settings.size_px, settings.location)
    problem = _Problem(
        outputs_fn,
        images,
        labels,
        targets=jnp.full_like(labels, settings.target),
        masks=jnp.ones(values.shape[:-1]),
        placements=placements,
        factors=factors,
        step_size=jnp.float32(settings.step_size),
        realign_weight=jnp.float32(settings.realign_weight),
    )
    state = _State(values, _worst(values, len(factors)), jnp.zeros_like(labels))
    # One index more than steps: the last one only measures the iterate that the step before it made.
    num_looks = settings.num_steps + 1
    state = loop.run_loop(make_step(_rule_of(settings)), state, (problem,), 0, num_looks)
    return state.best, state.num_zero / num_looks, placements


@functools.cache
def make_step(rule: _Rule) -> Callable:
    """Build ``step(index, state, problem) -> state``, the same object for the same rule."""

    def objective(values, problem):
        pasted = patches.apply_patches(problem.images, values, problem.masks, problem.placements)
        logits, maps = _outputs(rule, pasted, problem)
        scaled = logits * problem.factors[:, None, None]
        total = AGGREGATES[rule.aggregate](_per_bit(LOSSES[rule.loss], scaled, problem))
        if maps:
            total -= problem.realign_weight * map_similarity(maps)
        return total.sum(), logits  # the sum's gradient is each image's own

    def step(index, state, problem):
        del index
        values = patches.round_to_uint8(state.values) / 255.0
        gradient, logits = jax.grad(objective, has_aux=True)(values, problem)
        moved = jnp.clip(state.values - problem.step_size * jnp.sign(gradient), 0.0, 1.0)
        is_zero = (gradient == 0.0).all(axis=(1, 2, 3))
        return _State(moved, _keep_best(rule, state.best, values, logits, problem), state.num_zero + is_zero)

    return step


def map_similarity(maps: Mapping[str, jax.Array]) -> jax.Array:
    """Return how alike the maps of K bit-widths are: ``0.5 soft_dice + cos(hog)``, the mean over maps and pairs.

    Args:
      maps: name to features or input gradients, float32 [K, B, h, w, C], K at least 2.

    Returns:
      float32 [B] in [0, 1.5].

    Raises:
      ValueError: for maps smaller than one block of the orientation histogram (see `perceptual.soft_hog`).
    """
    return sum(_pair_mean(features) for features in maps.values()) / len(maps)


def _pair_mean(features):
    maps = perceptual.channel_map(features)
    edges = perceptual.soft_edges(perceptual.sobel_magnitude(maps))
    hogs = perceptual.soft_hog(maps, cell_px=perceptual.default_cell_px(min(maps.shape[-2:])))
    similar = perceptual.pair_similarity(edges, hogs, alpha=DICE_WEIGHT, beta=HOG_WEIGHT)
    return similar[np.triu_indices(maps.shape[0], k=1)].mean(axis=0)


def _outputs(rule, images, problem):
    """Return the logits [K, B, classes] and the maps that are to be aligned."""
    if not rule.realigns_gradients:
        logits, features = problem.outputs_fn(images)
        return logits, features if rule.realigns_features else {}

    def cross_entropy(batches):
        logits, features = problem.outputs_fn(batches)
        scaled = logits * problem.factors[:, None, None]
        per_bit = jax.vmap(losses.cross_entropy, (0, None))(scaled, problem.labels)
        return per_bit.sum(), (logits, features)

    # One batch per bit-width: a single pass backward then gives every bit-width its own gradient.
    batches = jnp.broadcast_to(images, (problem.factors.shape[0], *images.shape))
    gradients, (logits, features) = jax.grad(cross_entropy, has_aux=True)(batches)
    return logits, (features if rule.realigns_features else {}) | {"input_gradient": gradients}


def _per_bit(loss, logits, problem):
    """Return a loss at every bit-width, float32 [K, B]."""
    return jax.vmap(loss, (0, None, None))(logits, problem.labels, problem.targets)


def _keep_best(rule, best, values, logits, problem):
    """Keep the iterate where it fools more bit-widths than the best, or as many by a larger margin; a nan never does."""
    predictions = logits.argmax(axis=-1).astype(jnp.int32)
    num_resisting = jnp.sum(~_is_fooled(predictions, problem.labels, problem.targets), axis=0, dtype=jnp.int32)
    margins = _per_bit(losses.margin, logits * problem.factors[:, None, None], problem)
    current = _Best(num_resisting, AGGREGATES[rule.aggregate](margins), values, predictions.T)
    is_equal = current.num_resisting == best.num_resisting
    is_better = (current.num_resisting < best.num_resisting) | (is_equal & (current.loss < best.loss))
    is_better &= jnp.isfinite(current.loss)
    return jax.tree.map(lambda a, b: jnp.where(is_better.reshape(-1, *[1] * (a.ndim - 1)), a, b), current, best)


def _is_fooled(predictions, labels, targets):
    return (predictions == targets) | ((targets < 0) & (predictions != labels))


def _worst(values, num_bits):
    """Return a `_Best` that every finite iterate beats."""
    num = values.shape[0]
    none = jnp.full(num, num_bits + 1, jnp.int32), jnp.full(num, jnp.inf)
    return _Best(*none, jnp.zeros_like(values), jnp.zeros((num, num_bits), jnp.int32))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _start(key, image_shape, size_px, location):
    """Return patches of uniform noise [B, S, S, C] and their placements."""
    place_key, noise_key = jax.random.split(key)
    batch, side, _, channels = image_shape
    sizes = dict(image_size_px=side, size_px=size_px)
    placements = patches.sample_placements(place_key, batch, **sizes, location=location)
    return jax.random.uniform(noise_key, (batch, size_px, size_px, channels)), placements


@jax.jit
def _look_at_clean(outputs_fn, images, labels, rescale_margin):
    """Return the clean predictions [K, B] and the factor of each bit-width's logits [K]."""
    logits, _ = outputs_fn(images)
    leads = jax.vmap(losses.margin, (0, None, None))(logits, labels, jnp.full_like(labels, -1))
    size = jnp.abs(leads).mean(axis=1)
    is_scaled = (rescale_margin > 0) & (size > 0)
    return logits.argmax(axis=-1), jnp.where(is_scaled, rescale_margin / jnp.where(is_scaled, size, 1.0), 1.0)


def _rule_of(settings):
    is_on = settings.realign_weight > 0
    maps = (is_on and settings.realign_features, is_on and settings.realign_gradients)
    return _Rule(settings.loss, settings.aggregate, *maps)


def _choose(bests, placements, images, labels, clean, settings):
    """Choose for each image among the runs, [runs, B, ...], and write down what happened."""
    if not np.isfinite(bests.loss).any(axis=0).all():
        raise ValueError("outputs_fns: the logits of some image were never finite; check parameters and statistics")
    winner, each = np.lexsort((bests.loss, bests.num_resisting), axis=0)[0], np.arange(len(labels))
    best, places = jax.tree.map(lambda field: field[winner, each], (bests, placements))
    masks = np.ones(best.values.shape[:-1], np.float32)
    predictions = best.predictions.T
    fooled = _is_fooled(predictions, labels, np.int32(settings.target))
    hardest = fooled.argmin(axis=0)  # False before True
    by_run = (len(settings.estimators), settings.num_restarts, len(labels))
    info = dict(
        images=np.asarray(_paste(images, best.values, masks, places)),
        placements=places,
        loss=best.loss,
        predictions_per_bit=predictions,
        clean_predictions_per_bit=clean,
        success_per_bit=fooled,
        success=fooled.all(axis=0),
        hardest=hardest,
        predictions=predictions[hardest, each],
        clean_predictions=clean[hardest, each],
        estimator=winner // settings.num_restarts,
        best_loss=bests.loss.reshape(by_run),
        num_fooled=len(predictions) - bests.num_resisting.reshape(by_run),
    )
    sizes, targets = (np.full(len(labels), number, np.int32) for number in (settings.size_px, settings.target))
    return Patch(*(jnp.asarray(array) for array in (best.values, masks, sizes, targets))), info


_paste = jax.jit(patches.apply_patches)


def _checked_fns(outputs_fns, images, labels, settings):
    """Refuse bad arguments before anything is compiled; return the functions to attack through as Partials."""
    missing = [name for name in settings.estimators if name not in outputs_fns]
    if missing:
        raise ValueError(f"estimators: expected some of {tuple(outputs_fns)}, the functions given, got {missing[0]!r}")
    if images.ndim != 4 or images.dtype != jnp.float32 or images.shape[1] != images.shape[2]:
        raise ValueError(f"images: expected float32 [B, H, H, C] in [0, 1], got {images.dtype} {images.shape}")
    if not 0.0 <= np.min(images) <= np.max(images) <= 1.0:
        raise ValueError("images: expected values in [0, 1], got others; divide pixels by 255 and do not normalise")
    if labels.shape != images.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels: expected int32 {images.shape[:1]}, got {labels.dtype} {labels.shape}")
    if settings.size_px > images.shape[1]:
        raise ValueError(f"size_px: expected at most the image's {images.shape[1]} px, got {settings.size_px}")
    fns = {name: loop.as_partial(outputs_fns[name]) for name in settings.estimators}
    for name, fn in fns.items():
        _check_outputs(name, *jax.eval_shape(fn, jax.ShapeDtypeStruct(images.shape, images.dtype)), images, settings)
    return fns


def _check_outputs(name, logits, features, images, settings):
    if logits.ndim != 3 or logits.shape[1] != images.shape[0] or settings.target >= logits.shape[2]:
        expected = f"logits [K, {images.shape[0]}, classes] with a class {max(settings.target, 0)}"
        raise ValueError(f"outputs_fns: expected {expected} from {name!r}, got {logits.shape}")
    if settings.realign_weight and logits.shape[0] < 2:
        raise ValueError(f"realign_weight: expected at least two bit-widths to align, got one from {name!r}")
    if settings.realign_weight and settings.realign_features and not features:
        raise ValueError(f"realign_features: expected feature maps, got none from {name!r}; name some or switch it off")
