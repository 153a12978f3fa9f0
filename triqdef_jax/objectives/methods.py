"""Training methods as frozen records: what a method feeds the network, what it minimises per bit-width, what it penalises across pairs.

One loop (`train_step.py`) trains them all; a piece that is None costs nothing. To add a method, write a `make_*` that returns a `Method` and
enter it in `METHODS`. Images are float32 `[B, H, W, C]` in [0, 1]; the patched images are p of every q rows of the batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from triqdef_jax import patches as patches_lib
from triqdef_jax.attacks import online, patch_pgd
from triqdef_jax.objectives.penalties import INPUT_GRADIENT, PenaltySettings, pair_penalty


class Inputs(NamedTuple):
    """One step's images: the clean batch, and the patched part of it (None for methods without patches)."""

    images: jax.Array
    labels: jax.Array
    patched_images: jax.Array | None = None
    patched_labels: jax.Array | None = None


class Pool(NamedTuple):
    """Patches to draw from: values float32 `[P, S, S, C]`, masks `[P, S, S]`, sizes int32 `[P]` in pixels."""

    values: jax.Array
    masks: jax.Array
    size_px: jax.Array


@dataclasses.dataclass(frozen=True)
class PatchingSettings:
    """How training images get patches; fields as in `config.patches` and `config.loss`."""

    patched_frac: float = 0.5
    rotation_deg: float = 22.5
    scale_range: tuple[float, float] = (0.9, 1.1)
    size_px: int = 6
    shape: str = "square"
    online_steps: int = 0
    online_step_size: float = 0.1
    attack_steps: int = 10
    attack_step_size: float = 0.1


@dataclasses.dataclass(frozen=True)
class Method:
    """What distinguishes one training method from another.

    Attributes:
      name: key in `METHODS`.
      make_inputs: (key, pool or None, images, labels, logits_fn or None) -> `Inputs`; drives its own compiled pieces.
      needs_pool: reads a patch pool. needs_logits: `make_inputs` attacks the network; its logits_fn is (key, images) -> logits of an
        active bit-width drawn by the key.
      bit_terms: (clean cross-entropy, patched cross-entropy or None) -> the loss of one bit-width, averaged over the active ones.
      map_layers: feature layers, and `INPUT_GRADIENT`, whose maps `[K, B, h, w]` of patched images the pair penalty reads.
      pair_penalty: (maps by name, bits) -> (penalty, similarities by name), or None.
    """

    name: str
    make_inputs: Callable[..., Inputs]
    needs_pool: bool
    needs_logits: bool
    bit_terms: Callable[[jax.Array, jax.Array | None], jax.Array]
    map_layers: tuple[str, ...] = ()
    pair_penalty: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class MethodSettings:
    """All that a method is made from."""

    lambda_adv: float
    feature_layers: tuple[str, ...]
    penalties: PenaltySettings
    patching: PatchingSettings


def make_triqdef(settings: MethodSettings) -> Method:
    """Full method: cross-entropy on clean and pool-patched images, FDP and GPDP over all pairs of bit-widths."""
    penalties = settings.penalties
    layers = settings.feature_layers if penalties.lambda_fdp else ()
    gradient = (INPUT_GRADIENT,) if penalties.lambda_gpdp else ()
    method = make_patch_ce(settings)
    return dataclasses.replace(
        method,
        name="triqdef",
        map_layers=(*layers, *gradient),
        pair_penalty=functools.partial(pair_penalty, settings=penalties) if layers or gradient else None,
    )


def make_patch_ce(settings: MethodSettings) -> Method:
    """Cross-entropy on clean and patched images over all bit-widths, no penalties: the decisive control of the penalties."""
    patching = settings.patching
    return Method(
        name="patch_ce",
        make_inputs=_online_inputs(patching)
        if patching.online_steps
        else functools.partial(_pool_inputs, settings=patching),
        needs_pool=not patching.online_steps,
        needs_logits=bool(patching.online_steps),
        bit_terms=functools.partial(_clean_and_patched, lambda_adv=settings.lambda_adv),
    )


def make_qat(settings: MethodSettings) -> Method:
    """Multi-bit quantization-aware training on clean images."""
    del settings
    return Method(
        name="qat",
        make_inputs=lambda key, pool, images, labels, logits_fn: Inputs(images, labels),
        needs_pool=False,
        needs_logits=False,
        bit_terms=lambda ce_clean, ce_patched: ce_clean,
    )


def make_pbat(settings: MethodSettings) -> Method:
    """Patch-based adversarial training: image-specific untargeted patches, made each step against one active bit-width.

    Reference: Rao, Stutz, Schiele, Adversarial Training against Location-Optimized Adversarial Patches, 2020 (AT-Rand). Deviations: size and
    mix of clean and patched images follow this project's other methods, and the attacked bit-width is drawn per step.
    """
    return Method(
        name="pbat",
        make_inputs=_pbat_inputs(settings.patching),
        needs_pool=False,
        needs_logits=True,
        bit_terms=functools.partial(_clean_and_patched, lambda_adv=settings.lambda_adv),
    )


METHODS: dict[str, Callable[[MethodSettings], Method]] = {
    "triqdef": make_triqdef,
    "patch_ce": make_patch_ce,
    "qat": make_qat,
    "pbat": make_pbat,
}


def make_method(name: str, settings: MethodSettings) -> Method:
    """Return the named method; raises ValueError that lists the known ones."""
    if name not in METHODS:
        raise ValueError(f"loss.method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name](settings)


def _clean_and_patched(ce_clean, ce_patched, *, lambda_adv):
    return ce_clean + lambda_adv * ce_patched


@functools.partial(jax.jit, static_argnames="settings")
def _pool_inputs(key, pool, images, labels, logits_fn=None, *, settings):
    """Paste a random pool patch at a random place into the patched rows."""
    del logits_fn
    victims, victim_labels = _patched_rows(images, labels, settings)
    choice_key, place_key = jax.random.split(key)
    choice = jax.random.randint(choice_key, (victims.shape[0],), 0, pool.values.shape[0])
    placements = _jitter(settings, images.shape[1], pool.size_px[choice]).sample(place_key, victims.shape[0])
    patched = patches_lib.apply_patches(victims, pool.values[choice], pool.masks[choice], placements)
    return Inputs(images, labels, patched, victim_labels)


def _online_inputs(settings):
    """Return `make_inputs` that makes one patch per patched image against drawn bit-widths (EOT), then pastes it at a new place."""
    mask = patches_lib.make_mask(settings.size_px, settings.size_px, settings.shape)

    @functools.cache
    def step(image_size_px):
        return online.make_step(_jitter(settings, image_size_px, settings.size_px))

    @jax.jit
    def paste(key, images, labels, victims, victim_labels, values, masks):
        placements = _jitter(settings, images.shape[1], settings.size_px).sample(key, victims.shape[0])
        return Inputs(images, labels, patches_lib.apply_patches(victims, values, masks, placements), victim_labels)

    def make_inputs(key, pool, images, labels, logits_fn):
        del pool
        make_key, place_key = jax.random.split(key)
        victims, victim_labels = _patched_rows(images, labels, settings)
        masks = jnp.broadcast_to(mask, (victims.shape[0], *mask.shape))
        values = online.ascend(
            make_key,
            logits_fn,
            victims,
            victim_labels,
            step=step(images.shape[1]),
            masks=masks,
            num_steps=settings.online_steps,
            step_size=settings.online_step_size,
        )
        return paste(place_key, images, labels, victims, victim_labels, values, masks)

    return make_inputs


def _pbat_inputs(settings):
    """Return `make_inputs` with image-specific patches at random places against one drawn bit-width."""
    attack = patch_pgd.PgdSettings(
        size_px=settings.size_px, num_steps=settings.attack_steps, step_size=settings.attack_step_size
    )

    def make_inputs(key, pool, images, labels, logits_fn):
        del pool
        draw_key, attack_key = jax.random.split(key)
        victims, victim_labels = _patched_rows(images, labels, settings)
        one_bit = jax.tree_util.Partial(_with_key, logits_fn, draw_key)
        state = patch_pgd.ascend(attack_key, one_bit, victims, victim_labels, attack)
        return Inputs(images, labels, state.best_images, victim_labels)

    return make_inputs


def _with_key(logits_fn, key, images):
    """Fix the draw of a random network; one object, so that attacks compile once."""
    return logits_fn(key, images)


@functools.partial(jax.jit, static_argnames="settings")
def _patched_rows(images, labels, settings):
    return tuple(patches_lib.select_patched(x, settings.patched_frac) for x in (images, labels))


def _jitter(settings, image_size_px, size_px):
    return online.Jitter(settings.rotation_deg, settings.scale_range, size_px, image_size_px)
