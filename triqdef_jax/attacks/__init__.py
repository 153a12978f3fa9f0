"""Attacks with adversarial patches. They see ``logits_fn(images) -> logits`` and never a network's parameters.

`ATTACKS` maps a name to an `Entry`: ``attack(key, logits_fn, images, labels, settings) -> (Patch, info)``, the function
that builds its settings, and what it needs. `eot` makes networks that average or draw, for any of them. In place of
`logits_fn`, 'adaptive' takes functions of all bit-widths' logits and features, one per gradient estimator; the attack
of 'patchattack' needs ``textures=make_textures(...)`` of training images besides.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

from triqdef_jax.attacks import adaptive, controls, eot, patch_pgd, patchattack, sparse_rs, universal
from triqdef_jax.attacks.adaptive import AdaptiveSettings
from triqdef_jax.attacks.controls import ControlSettings
from triqdef_jax.attacks.patchattack import PatchAttackSettings
from triqdef_jax.attacks.settings import (
    PGD_PRESETS,
    PRESETS,
    Patch,
    PatchSettings,
    PgdSettings,
    make_pgd_settings,
    make_settings,
)
from triqdef_jax.attacks.sparse_rs import SparseRsSettings
from triqdef_jax.attacks.textures import Textures, make_textures


class Entry(NamedTuple):
    """An attack as a program meets it.

    Attributes:
      attack: ``(key, logits_fn, images, labels, settings) -> (Patch, info)``.
      settings: ``(**fields) -> settings``, published values where a field is not given; `size_px` always is.
      kind: 'universal': P patches for all images, `size_px` and `target` are tuples of P. 'per_image': a patch for each
        image, both are numbers.
      access: what it asks of the network: 'gradient', 'query' (logits of images), or 'none' (measuring only).
    """

    attack: Callable
    settings: Callable
    kind: Literal["universal", "per_image"]
    access: Literal["gradient", "query", "none"]


def _universal(name):
    return Entry(universal.attack, functools.partial(make_settings, name), "universal", "gradient")


def _reinforced(kind):
    settings = functools.partial(PatchAttackSettings, kind=kind)
    return Entry(patchattack.attack, settings, "per_image", "query")


def _control(kind):
    return Entry(controls.attack, functools.partial(ControlSettings, kind=kind), "universal", "none")


ATTACKS = {
    "lavan": _universal("lavan"),
    "gap": _universal("gap"),
    "patch_pgd": Entry(patch_pgd.attack, functools.partial(make_pgd_settings, "strong"), "per_image", "gradient"),
    "patchattack": _reinforced("tpa"),
    "mpa": _reinforced("mpa"),
    "sparse_rs": Entry(sparse_rs.attack, SparseRsSettings, "per_image", "query"),
    "adaptive": Entry(adaptive.attack, AdaptiveSettings, "per_image", "gradient"),
    "grey": _control("grey"),
    "noise": _control("noise"),
    "crop": _control("crop"),
}


def get(name: str) -> Entry:
    """Return the entry of an attack; raises ValueError that lists the known ones for another name."""
    if name not in ATTACKS:
        raise ValueError(f"attack: expected one of {', '.join(ATTACKS)}, got {name!r}")
    return ATTACKS[name]


__all__ = [
    "ATTACKS",
    "PGD_PRESETS",
    "PRESETS",
    "AdaptiveSettings",
    "ControlSettings",
    "Entry",
    "Patch",
    "PatchAttackSettings",
    "PatchSettings",
    "PgdSettings",
    "SparseRsSettings",
    "Textures",
    "adaptive",
    "eot",
    "get",
    "make_pgd_settings",
    "make_settings",
    "make_textures",
]
