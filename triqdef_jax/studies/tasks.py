"""Programs of a study, each in a process of its own: in order, one after another or one per device; what is finished is not started again.

`<folder>/tasks.json` holds what every task took, summed over its attempts, `<folder>/logs/<task>.log` what it said, `<folder>/compiled` JAX's cache
of compiled programs, which all share. Times are of whole processes: imports and compilation count, the latter less where another task
compiled the same.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from triqdef_jax import compile_cache, entry, files

STATE_FILE, LOGS_DIR, COMPILED_DIR = "tasks.json", "logs", "compiled"
POLL_S = 0.1
DONE, FAILED, LEFT_OUT = "done", "failed", "left out"
# One chip per process, by the variables that CUDA and libtpu read; ROCm reads its own.
DEVICES_VARIABLE, TPU_VARIABLE = "CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS"
TPU_ALONE = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}


class PreemptedError(RuntimeError):
    """SIGTERM came; what the programs finished is kept."""


class Task(NamedTuple):
    """One program.

    Attributes:
      name: unique, also of its log, as in 'train qat'. kind: its first word, by which the time left is guessed. command: what to start.
      needs: names of tasks that must have ended well before. identity: of all that its product depends on. product: a path that is there when
        it has ended well. is_alone: no other program runs beside it.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    identity: str
    product: pathlib.Path
    is_alone: bool = False


class Ended(NamedTuple):
    """How a task ended: 'done', 'failed' or 'left out', why if not done, seconds on the clock and of the processor over all attempts."""

    status: str
    detail: str = ""
    wall_s: float = 0.0
    cpu_s: float = 0.0


class _Running(NamedTuple):
    task: Task
    process: subprocess.Popen
    place: int
    start: float


def run(
    tasks: Iterable[Task],
    folder: str | pathlib.Path,
    *,
    num_processes: int = 1,
    environment: Mapping[str, str] | None = None,
    tell: Callable = print,
) -> dict:
    """Run tasks in their order as far as their needs allow; one that fails stops only those that need it.

    Args:
      folder: of state and logs. num_processes: at the same time; where more than one, process k sees accelerator k alone.
      environment: further variables, where this process has none of the name. tell: called with a line when a task starts and when it ends.

    Returns:
      {name: `Ended`} of all tasks.

    Raises:
      PreemptedError: SIGTERM came, or a program said that it was preempted; no program is left running. KeyboardInterrupt passes, likewise.
    """
    queue = _Queue(tuple(tasks), pathlib.Path(folder), num_processes, environment or {}, tell)
    previous = signal.signal(signal.SIGTERM, queue.stop)
    try:
        return queue.work()
    finally:
        queue.end_all()
        signal.signal(signal.SIGTERM, previous)


class _Queue:
    def __init__(self, tasks, folder, num_processes, environment, tell):
        self.folder, self.tell, self.num = folder, tell, num_processes
        self.waiting, self.running, self.ended = list(tasks), [], {}
        self.total, self.is_stopping = len(tasks), False
        # Most of a short run is compilation, and the runs of a study are much the same programs.
        compiled = {compile_cache.VARIABLE: str((folder / COMPILED_DIR).resolve())}
        self.environment = {**compiled, **environment, **compile_cache.inherited()}
        self.state = _read_state(folder / STATE_FILE)
        for task in tasks:
            if self._is_finished(task):
                self.ended[task.name] = self._ended(task, DONE)
                self.waiting.remove(task)

    def work(self):
        while self.waiting or self.running:
            if not self.is_stopping:
                self._start_ready()
            for one in list(self.running):
                pid, status, usage = os.wait4(one.process.pid, os.WNOHANG)
                if pid:
                    self._finish(one, os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime)
            if self.is_stopping and not self.running:
                raise PreemptedError("preempted: what is finished is kept; the same command continues")
            if self.running:
                time.sleep(POLL_S)
        return self.ended

    def stop(self, *_):
        """Pass SIGTERM on; the trainings save and leave."""
        self.is_stopping = True
        for one in self.running:
            one.process.terminate()

    def end_all(self):
        """Leave no program behind, whatever happened."""
        self.stop()
        for one in self.running:
            one.process.wait()

    def _start_ready(self):
        for task in list(self.waiting):
            bad = [name for name in task.needs if name in self.ended and self.ended[name].status != DONE]
            if bad:
                self.waiting.remove(task)
                self.ended[task.name] = Ended(LEFT_OUT, f"{bad[0]} {self.ended[bad[0]].status}")
            elif self._has_room(task) and all(name in self.ended for name in task.needs):
                self.waiting.remove(task)
                self._start(task)

    def _has_room(self, task):
        is_crowded = task.is_alone or any(one.task.is_alone for one in self.running)
        return len(self.running) < (1 if is_crowded else self.num)

    def _start(self, task):
        place = min(set(range(self.num)) - {one.place for one in self.running})
        log = log_path(self.folder, task.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = self.environment | (device_environment(place) if self.num > 1 else {})
        with open(log, "ab") as file:
            file.write(f"$ {' '.join(task.command)}\n".encode())
            file.flush()
            process = subprocess.Popen(task.command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        self.running.append(_Running(task, process, place, time.monotonic()))
        self.tell(f"{task.name}  (task {self.total - len(self.waiting)} of {self.total}{self._left()}; {log})")

    def _finish(self, one, code, cpu_s):
        one.process.returncode = code
        self.running.remove(one)
        task, wall_s = one.task, time.monotonic() - one.start
        is_done = code == 0 and task.product.exists()
        held = self._state_of(task)
        held |= {"wall_s": held["wall_s"] + wall_s, "cpu_s": held["cpu_s"] + cpu_s, "is_done": is_done}
        self.state[task.name] = held
        files.atomic_write_json(self.folder / STATE_FILE, self.state)
        if code == entry.EXIT_PREEMPTED:
            self.stop()
        if self.is_stopping and not is_done:
            return
        if is_done:
            self.ended[task.name] = self._ended(task, DONE)
            self.tell(f"{task.name}: {wall_s:.0f} s")
        else:
            detail = f"{_last_words(log_path(self.folder, task.name))} (exit code {code})"
            self.ended[task.name] = self._ended(task, FAILED, detail)
            self.tell(f"{task.name} failed: {detail}; log: {log_path(self.folder, task.name)}")

    def _is_finished(self, task):
        return self._state_of(task)["is_done"] and task.product.exists()

    def _state_of(self, task):
        held = self.state.get(task.name, {})
        fresh = {"identity": task.identity, "is_done": False, "wall_s": 0.0, "cpu_s": 0.0}
        return dict(held) if held.get("identity") == task.identity else fresh

    def _ended(self, task, status, detail=""):
        held = self._state_of(task)
        return Ended(status, detail, held["wall_s"], held["cpu_s"])

    def _left(self):
        """Guess the time left from the mean of finished tasks of each kind; nothing where a kind has none yet."""
        seconds: dict[str, list] = {}
        for name, ended in self.ended.items():
            if ended.status == DONE:
                seconds.setdefault(name.split()[0], []).append(ended.wall_s)
        open_tasks = [*self.waiting, *(one.task for one in self.running)]
        if any(task.kind not in seconds for task in open_tasks):
            return ""
        left = sum(sum(seconds[task.kind]) / len(seconds[task.kind]) for task in open_tasks) / self.num
        return f", about {max(1, round(left / 60))} min left"


def log_path(folder: str | pathlib.Path, name: str) -> pathlib.Path:
    """Return where a task's words go; appended to at every attempt."""
    return pathlib.Path(folder) / LOGS_DIR / f"{re.sub('[^A-Za-z0-9._+-]', '-', name)}.log"


def device_environment(place: int) -> dict[str, str]:
    """Return the variables that show a process one accelerator: the `place`-th of those this process may see. The CPU ignores them."""
    visible = [name for name in os.environ.get(DEVICES_VARIABLE, "").split(",") if name]
    shown = visible[place % len(visible)] if visible else str(place)
    return {DEVICES_VARIABLE: shown, TPU_VARIABLE: str(place), **TPU_ALONE}


def _read_state(path):
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        print(f"{path} is damaged; finished programs are asked again", file=sys.stderr)
        return {}


def _last_words(log):
    """Return the last line that begins with 'error:', else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error:")]
    return (told or lines)[-1]
