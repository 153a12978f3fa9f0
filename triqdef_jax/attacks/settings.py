"""What an attack is told and what it hands back: frozen settings, their published presets, the `Patch` record."""

from dataclasses import dataclass
from typing import NamedTuple

import jax

from triqdef_jax.attacks.losses import LOSSES, OPTIMIZERS
from triqdef_jax.patches import LOCATIONS, SHAPES

NUM_EVAL_IMAGES = 128  # Images that judge iterates and finished patches, kept apart from those they are optimised on.


class Patch(NamedTuple):
    """P patches on one canvas.

    Attributes:
      values: float32 [P, S, S, C] in [0, 1], on the uint8 grid.
      masks: float32 [P, S, S] in {0, 1}.
      size_px: int32 [P], side or diameter in pixels.
      target: int32 [P], the class aimed at, -1 when untargeted.
    """

    values: jax.Array
    masks: jax.Array
    size_px: jax.Array
    target: jax.Array


@dataclass(frozen=True, kw_only=True)
class PatchSettings:
    """Settings of the universal attack; one entry of `size_px` and `target` per patch.

    Attributes:
      size_px: side of each patch in pixels.
      target: class of each patch, -1 for untargeted.
      canvas_px: side S of the common canvas, None for the largest size.
      loss: 'ce_target', 'lavan', 'untargeted' or 'margin' (`LOSSES`), minimised.
      optimizer: 'sign_momentum' or 'adam' (`OPTIMIZERS`).
      num_steps: optimiser steps.
      step_size: pixel value per step, in units of the range [0, 1].
      batch_images: images per patch and step; one forward holds patches x restarts x this many.
      num_eval_images: images held out of the optimisation; they choose the best iterate and measure success. One
        forward holds patches x restarts x this many.
      eval_every_steps: steps between two looks at the held-out images.
      num_restarts: independent starts; the one with the lowest held-out loss is kept for each patch.
      location: 'random', 'center', 'corner', or 'fixed' (one random place per patch and restart).
      rotation_deg: rotations drawn per image, uniform in +- this many degrees.
      scale_range: scales drawn per image, uniform between the two.
      shape: 'square' or 'circle'.
      random_logits: whether the network is called as ``logits_fn(key, images)`` with a fresh key in each step: a bit
        drawn per step, a randomised defence.
    """

    size_px: tuple[int, ...]
    target: tuple[int, ...]
    canvas_px: int | None = None
    loss: str = "ce_target"
    optimizer: str = "adam"
    num_steps: int = 500
    step_size: float = 5.0 / 255.0
    batch_images: int = 16
    num_eval_images: int = NUM_EVAL_IMAGES
    eval_every_steps: int = 25
    num_restarts: int = 1
    location: str = "random"
    rotation_deg: float = 0.0
    scale_range: tuple[float, float] = (1.0, 1.0)
    shape: str = "square"
    random_logits: bool = False

    def __post_init__(self):
        _check_choice("loss", self.loss, LOSSES)
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("location", self.location, LOCATIONS)
        _check_choice("shape", self.shape, SHAPES)
        for name in ("num_steps", "batch_images", "num_eval_images", "eval_every_steps", "num_restarts"):
            check_positive(name, getattr(self, name))
        check_positive("step_size", self.step_size)
        if not self.size_px or len(self.size_px) != len(self.target):
            raise ValueError(f"target: expected one class per patch, got size_px={self.size_px}, target={self.target}")
        if not all(1 <= size <= self.canvas for size in self.size_px):
            raise ValueError(f"size_px: expected sizes from 1 to canvas_px={self.canvas}, got {self.size_px}")
        if self.rotation_deg < 0.0 or not 0.0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(
                "rotation_deg, scale_range: expected an angle >= 0 and 0 < low <= high, "
                f"got {self.rotation_deg} and {self.scale_range}"
            )
        self._check_targets()

    @property
    def canvas(self) -> int:
        """Side S of the canvas in pixels."""
        return max(self.size_px, default=0) if self.canvas_px is None else self.canvas_px

    def _check_targets(self):
        goals = {"ce_target": "targeted", "lavan": "targeted", "untargeted": "untargeted", "margin": "either"}
        goal = goals[self.loss]
        if min(self.target) < -1:
            raise ValueError(f"target: expected classes >= 0 or -1 for untargeted, got {self.target}")
        if goal == "targeted" and min(self.target) < 0:
            raise ValueError(f"target: loss {self.loss!r} needs a class >= 0 for every patch, got {self.target}")
        if goal == "untargeted" and max(self.target) >= 0:
            raise ValueError(f"target: loss {self.loss!r} needs -1 for every patch, got {self.target}")


PRESETS = {
    # Karmon et al., LaVAN, ICML 2018: CE(target) - CE(source) at one place. Steps and step size are the patch PGD of
    # PatchGuard (Xiang et al., 2021), for LaVAN gives no step size for images in [0, 1].
    "lavan": dict(loss="lavan", optimizer="sign_momentum", num_steps=500, step_size=0.05, location="fixed"),
    # Brown et al., Adversarial Patch, 2017: log Pr(target) in expectation over images, places, turns and sizes. Batch,
    # turns and sizes are PatchAttack's (Yang et al., 2020), Adam at 5 / 255 is ART's.
    "gap": dict(
        loss="ce_target",
        optimizer="adam",
        num_steps=500,
        step_size=5.0 / 255.0,
        batch_images=16,
        location="random",
        rotation_deg=22.5,
        scale_range=(0.9, 1.1),
    ),
}


def make_settings(name: str, **fields) -> PatchSettings:
    """Build the settings of a published attack.

    Args:
      name: 'lavan' or 'gap', a key of `PRESETS`.
      **fields: `size_px`, `target` and whatever is to differ from the preset.

    Returns:
      `PatchSettings`.

    Raises:
      ValueError: for an unknown name or an invalid field value.

    Reference: Karmon et al., 2018, and Brown et al., 2017, as noted beside `PRESETS`. Which options TriQDef (2026) used
    is not published; both presets draw squares, since its patches are given as 6x6.
    """
    _check_choice("name", name, PRESETS)
    return PatchSettings(**{**PRESETS[name], **fields})


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless ``value > 0``."""
    if not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def _check_choice(name, value, known):
    if value not in known:
        raise ValueError(f"{name}: expected one of {tuple(known)}, got {value!r}")
