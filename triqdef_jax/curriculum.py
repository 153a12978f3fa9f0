"""BACT, the bit-width curriculum, as a static list of stages: which bit-widths train from which step on.

Reference: TriQDef (Guesmi et al. 2026), bit-adaptive curriculum training. The paper gives the order (32 and 8 bits first, then 5, 4, 2) but
no lengths; the defaults, 30 %, 45 % and 60 % of the run, are ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

FIRST_STAGE_BITS = 8  # Bit-widths from here up need no adaptation and train from the first step.


class Stage(NamedTuple):
    """A span of steps with one set of active bit-widths.

    Attributes:
      start, stop: first step and the step after the last.
      bits: active bit-widths, in the order of the network's bits.
      new_bits: those that start with this stage and have to be calibrated, widest first.
    """

    start: int
    stop: int
    bits: tuple[int, ...]
    new_bits: tuple[int, ...]


def joining_bits(bits: Sequence[int]) -> tuple[int, ...]:
    """Return the bit-widths that join after the start, widest first; the widest bit-width of all never does."""
    return tuple(sorted((b for b in bits if b < FIRST_STAGE_BITS and b != max(bits)), reverse=True))


def make_stages(
    bits: Sequence[int], num_steps: int, starts: Sequence[float], *, enabled: bool = True
) -> tuple[Stage, ...]:
    """Build the curriculum of a run.

    Args:
      bits: all bit-widths of the run. num_steps: length of the run.
      starts: fraction of the run at which each joining bit-width (descending) becomes active; rising, in (0, 1).
      enabled: False trains all bit-widths from the first step, in one stage.

    Returns:
      Stages that cover [0, num_steps) without gaps; stages without a step are merged into the next.

    Raises:
      ValueError: when `starts` does not fit the bit-widths.
    """
    joining = joining_bits(bits) if enabled else ()
    if enabled:
        _check_starts(bits, joining, starts)
    joins_at = dict.fromkeys(bits, 0) | {b: int(frac * num_steps) for b, frac in zip(joining, starts, strict=False)}
    edges = sorted(set(joins_at.values()))
    stages = []
    for start, stop in zip(edges, [*edges[1:], num_steps], strict=True):
        active = tuple(b for b in bits if joins_at[b] <= start)
        new = tuple(sorted((b for b in bits if joins_at[b] == start), reverse=True))
        stages.append(Stage(start, stop, active, new))
    return tuple(stages)


def _check_starts(bits, joining, starts):
    if len(starts) != len(joining):
        raise ValueError(
            f"bact.starts needs one fraction for each of the bit-widths {joining} that join later (quant.bits = {tuple(bits)}), "
            f"got {tuple(starts)}; set bact.starts to {len(joining)} rising fractions"
        )
    if any(not 0 < frac < 1 for frac in starts) or list(starts) != sorted(set(starts)):
        raise ValueError(f"bact.starts must be rising fractions between 0 and 1, got {tuple(starts)}")


def penalty_ramp(step: int, *, warmup_steps: int, start: int = 0) -> float:
    """Return the factor in [0, 1] of the penalties at `step`, rising linearly over `warmup_steps` after `start`; 1 without warm-up.

    Args:
      step: the step about to run, an int of the host.
    """
    if warmup_steps == 0:
        return 1.0
    return min(max((step - start + 1) / warmup_steps, 0.0), 1.0)
