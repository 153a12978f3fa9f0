"""Traces of some training steps, for `xprof` or Perfetto: what ran when on host and devices."""

import re
from collections.abc import Callable
from typing import Any

import jax

EVENT = "train"  # the name of the annotation of a step; its number is `step_num`


def parse_steps(text: str, num_steps: int) -> range:
    """Return the steps of 'FIRST:LAST', both included, counted from 1 as in metrics.jsonl; '' is none.

    Raises:
      ValueError: no such range, or steps that a run of `num_steps` steps does not have.
    """
    if not text:
        return range(0)
    ends = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(int(ends[1]), int(ends[2]) + 1) if ends else range(0)
    if not steps or steps[0] < 1 or steps[-1] > num_steps:
        raise ValueError(
            f"--profile_steps must be FIRST:LAST with 1 <= FIRST <= LAST <= {num_steps}, the steps of the run, got {text!r}"
        )
    return steps


class StepTrace:
    """Writes one trace of the steps in a range; other steps, and runs that are past it, leave nothing.

    Args:
      folder: where the trace goes, as `plugins/profile/<time>/`. steps: from `parse_steps`.
    """

    def __init__(self, folder, steps: range):
        self._folder, self._steps, self._is_on = folder, steps, False

    def step(self, number: int, function: Callable, *args) -> Any:
        """Return `function(*args)`, traced as step `number` where that lies in the range; waits for the devices after the last one."""
        if number not in self._steps:
            return function(*args)
        if not self._is_on:
            jax.profiler.start_trace(self._folder)
            self._is_on = True
        with jax.profiler.StepTraceAnnotation(EVENT, step_num=number):
            result = function(*args)
        if number == self._steps[-1]:
            jax.block_until_ready(result)
            self.close()
        return result

    def close(self) -> None:
        """End a trace that is being taken, as of a run that leaves within the range."""
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()
