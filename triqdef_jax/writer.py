"""What a run tells while it runs: metrics to files, progress to the terminal; by the lead process only.

``metrics.jsonl`` is always written, one flat JSON object per line with ``step`` first; TensorBoard event files beside
it when tensorboardX is installed. Nothing here touches a device: pass numbers that are already on the host.
"""

import contextlib
import importlib.util
import json
import math
import os
import pathlib
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, BinaryIO, TextIO

from triqdef_jax import files

METRICS_FILE = "metrics.jsonl"

_BOARD_FLUSH_S = 30.0  # a flush waits for the disk
_RATE_MEMORY = 0.7  # weight of the past in images/s: a pause for a checkpoint fades within some ten updates


class MetricWriter:
    """Appends scalars of a run to ``metrics.jsonl`` and, if possible, to TensorBoard."""

    def __init__(self, workdir: str | os.PathLike, *, restored_step: int = 0, is_lead: bool = True):
        """Opens the files, dropping what an interrupted run wrote after the checkpoint it resumes from.

        Args:
          workdir: directory of the run, made if need be.
          restored_step: step of the checkpoint the run resumes from. Lines of later steps go, and so does a line torn
            by a kill. 0 is a fresh run: the file starts empty.
          is_lead: False for the processes that must not write: then every method does nothing.

        Raises:
          ValueError: restored_step is negative. OSError: the files cannot be written.
        """
        if restored_step < 0:
            raise ValueError(f"restored_step must be 0 or more steps; got {restored_step}")
        self._file: BinaryIO | None = None
        self._board = None
        if is_lead:
            path = pathlib.Path(workdir) / METRICS_FILE
            _keep_until(path, restored_step)
            self._file = open(path, "ab", buffering=0)
            self._board = _open_board(workdir, restored_step)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line and flushes it.

        Args:
          step: number of finished steps.
          values: name -> scalar (Python, NumPy or JAX). Numbers that are not finite become null, which JSON can say.

        Raises:
          ValueError: a value is not a single number, or is named 'step'.
          OSError: the line cannot be written; the file ends with the line before, and resuming writes what is missing.
        """
        if self._file is None:
            return
        scalars = {name: _scalar(name, value) for name, value in values.items()}
        line = {"step": int(step)} | {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        _append(self._file, (json.dumps(line, allow_nan=False) + "\n").encode())
        if self._board is not None:
            self._board.write(int(step), {name: value for name, value in scalars.items() if math.isfinite(value)})

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            board, self._board = self._board, None
            board.close()


class Progress:
    """Tells how far a run is: on a terminal one line that is rewritten, elsewhere one line per update, on stderr."""

    def __init__(
        self,
        total_steps: int,
        images_per_step: int,
        *,
        start_step: int = 0,
        is_lead: bool = True,
        stream: TextIO | None = None,
        unit: str = "step",
    ):
        """Starts the clock.

        Args:
          total_steps: steps of the whole run.
          images_per_step: images that one step consumes, over all processes.
          start_step: the step the run resumes from; it counts as done but not towards the speed.
          is_lead: False for the processes that must be silent.
          stream: where to write; None means stderr.
          unit: what is counted.
        """
        self._unit = unit
        self._total_steps = total_steps
        self._images_per_step = images_per_step
        self._is_lead = is_lead
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._step, self._time = start_step, time.monotonic()
        self._rate = 0.0  # steps per second, smoothed
        self._num_measured = 0
        self._is_open_line = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def update(self, step: int, values: Mapping[str, Any] | None = None, label: str = "") -> None:
        """Tells the state after ``step`` finished steps.

        Args:
          step: number of finished steps.
          values: what to show beside it, name -> number, such as the loss.
          label: what the run is doing, such as its stage.
        """
        if not self._is_lead:
            return
        self._measure(step)
        parts = [f"{self._unit} {step}/{self._total_steps}", label]
        parts += [f"{name} {float(value):.4g}" for name, value in (values or {}).items()]
        if self._rate:
            parts.append(f"{self._rate * self._images_per_step:.4g} images/s")
            parts.append(f"{_duration((self._total_steps - step) / self._rate)} left")
        line = "  ".join(part for part in parts if part)
        if self._is_terminal:
            width = shutil.get_terminal_size().columns
            line = "\r\x1b[K" + line[: width - 1]
        print(line, end="" if self._is_terminal else "\n", file=self._stream, flush=True)
        self._is_open_line = self._is_terminal

    def close(self) -> None:
        """Ends the rewritten line, so that what follows starts on its own."""
        if self._is_open_line:
            print(file=self._stream, flush=True)
            self._is_open_line = False

    def _measure(self, step: int) -> None:
        """Updates the speed; the first update since the start holds compilation and is replaced by the second."""
        now = time.monotonic()
        if step > self._step and now > self._time:
            rate = (step - self._step) / (now - self._time)
            self._num_measured += 1
            self._rate = rate if self._num_measured <= 2 else _RATE_MEMORY * self._rate + (1 - _RATE_MEMORY) * rate
            self._step, self._time = step, now


def _keep_until(path: pathlib.Path, restored_step: int) -> None:
    """Rewrites a metrics file with the whole lines of steps up to ``restored_step``; 0 keeps none."""
    kept = []
    if restored_step and path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            step = _step_of(line)
            if step is not None and step <= restored_step:
                kept.append(line + "\n")
    with files.atomic_open(path) as file:
        file.write("".join(kept).encode())


def _append(file: BinaryIO, line: bytes) -> None:
    """Appends a whole line or nothing: a full disk takes the first bytes of what it has no room for."""
    end = file.seek(0, os.SEEK_END)
    try:
        while line:
            line = line[file.write(line) :]
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(end)
        files.name_file(error, file.name)
        raise


def _step_of(line: str) -> int | None:
    """Returns the step of a metrics line, or None for a torn one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


class _Board:
    """TensorBoard's event file, written by the caller itself.

    The library's usual writer hands events to a thread, which a full disk ends: then its queue of ten fills up and training waits for ever.
    """

    def __init__(self, workdir, restored_step):
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._make_event, self._flushed = Event, time.time()
        name = f"events.out.tfevents.{int(self._flushed)}.{socket.gethostname()}"
        self._records = RecordWriter(os.path.join(workdir, name))
        self._add(0, file_version="brain.Event:2")
        if restored_step:  # hides what an interrupted run wrote later
            self._add(restored_step + 1, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step, **what):
        event = self._make_event(wall_time=time.time(), step=step, **what)
        self._records.write(event.SerializeToString())

    def write(self, step, scalars):
        from tensorboardX import summary

        try:
            for name, value in scalars.items():
                self._add(step, summary=summary.scalar(name, value))
            if time.time() - self._flushed > _BOARD_FLUSH_S:
                self._records.flush()
                self._flushed = time.time()
        except OSError as error:
            files.name_file(error, self._records.path)
            raise

    def close(self):
        with contextlib.suppress(OSError):  # metrics.jsonl holds the same figures
            self._records.close()


def _open_board(workdir: str | os.PathLike, restored_step: int) -> _Board | None:
    """Returns a TensorBoard writer, or None where tensorboardX is not installed."""
    return _Board(workdir, restored_step) if importlib.util.find_spec("tensorboardX") else None


def _scalar(name: str, value: Any) -> float:
    try:
        if name == "step":
            raise ValueError("the name is taken")
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metric {name!r} must be a single number under a name other than 'step'; got {value!r:.80}"
        ) from error


def _duration(seconds: float) -> str:
    """Returns '47s', '3m 05s' or '2h 07m'."""
    seconds = round(max(0.0, seconds))
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}m {seconds:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"
