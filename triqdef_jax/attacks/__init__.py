"""Attacks with adversarial patches. They see ``logits_fn(images) -> logits`` and never a network's parameters.

`ATTACKS` maps a family to ``attack(key, logits_fn, images, labels, settings) -> (Patch, info)``; `make_settings` holds
the published settings of the universal family, LaVAN and the Google adversarial patch.
"""

from triqdef_jax.attacks import patch_pgd, universal
from triqdef_jax.attacks.patch_pgd import PgdSettings
from triqdef_jax.attacks.settings import PRESETS, Patch, PatchSettings, make_settings

ATTACKS = {"universal": universal.attack, "patch_pgd": patch_pgd.attack}

__all__ = ["ATTACKS", "PRESETS", "Patch", "PatchSettings", "PgdSettings", "make_settings"]
