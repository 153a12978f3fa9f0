"""Which checkpoints of a run stay on the disk: the newest few and, beside them, the best by the score in their meta.

The score of a step is read from its own directory and from nowhere else, so it is kept, copied, damaged and deleted with it.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers

SCORE = "score"  # entry of a checkpoint's meta: a finite number, larger is better


@dataclasses.dataclass
class NewestAndBest(checkpoint_managers.PreservationPolicy):
    """Keeps the newest checkpoints and the best one; Orbax deletes the others, once the newest is whole.

    Attributes:
      num_newest: how many of the newest are kept.
      scores: step -> score; whoever saves enters the step before it is saved. Empty keeps the newest alone.
    """

    num_newest: int
    scores: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Returns for each checkpoint, sorted by step, whether it stays."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.num_newest :], best_of({s: self.scores[s] for s in steps if s in self.scores})}
        return [step in kept for step in steps]


def best_of(scores: dict[int, float]) -> int | None:
    """Returns the step of the highest score, of equal ones the latest, which has trained longest; None of none."""
    return max(scores, key=lambda step: (scores[step], step), default=None)


def read_scores(directory: pathlib.Path, steps: Iterable[int]) -> dict[int, float]:
    """Returns the scores in the meta entries of steps; a step without one, or whose entry cannot be read, has none."""
    found = {}
    for step in steps:
        try:
            score = json.loads((directory / str(step) / "meta" / "metadata").read_text())["user"][SCORE]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(score, int | float) and math.isfinite(score):
            found[step] = float(score)
    return found
