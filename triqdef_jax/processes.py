"""The processes of a program: how they start, fail together, notice preemption, and end.

One process is the rule, and then nothing here does anything but listen for SIGTERM. Several start by `jax.distributed`, run the same code on
shards of the same arrays, and share a file system; process 0, the lead, alone writes. Where arrays lie is in `sharding.py`. jax is imported
when processes start, so that mistakes in flags show early.
"""

import contextlib
import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

from absl import flags

from triqdef_jax import entry

OFF, ON, AUTO = MODES = ("off", "on", "auto")
HEARTBEAT_TIMEOUT_S = 100  # jax's own default
VARIABLES = {  # environment in place of flags; jax itself reads the first alone
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
_asked = itertools.count()  # how often `Preemption.is_due` was asked, the same number in every process


class Start(NamedTuple):
    """How processes find one another.

    Attributes:
      mode: 'off' is one process; 'on' fails where there are no others; 'auto' takes what it finds.
      coordinator_address: HOST:PORT of process 0. num_processes, process_id: how many, and which this is. All three, or none: then jax asks
        the cluster (TPU, Slurm, OpenMPI, GKE).
      expect_processes: the only number to run with, or None. heartbeat_timeout_s: silence after which a process counts as dead.
    """

    mode: str = OFF
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    expect_processes: int | None = None
    heartbeat_timeout_s: int = HEARTBEAT_TIMEOUT_S

    @property
    def is_explicit(self) -> bool:
        return self.num_processes is not None


def define_flags() -> None:
    """Define the flags of `from_flags`."""
    flags.DEFINE_enum("distributed", OFF, MODES, "Several processes: off, on (fail where there are none), auto.")
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0; else $JAX_COORDINATOR_ADDRESS, or detected."
    )
    flags.DEFINE_integer("num_processes", None, "How many processes; else $JAX_NUM_PROCESSES, or detected.")
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0; else $JAX_PROCESS_ID, or detected.")
    flags.DEFINE_integer("expect_processes", None, "Refuse to run with another number of processes.")
    flags.DEFINE_integer("heartbeat_timeout_s", HEARTBEAT_TIMEOUT_S, "Silence after which a process counts as dead.")


def from_flags() -> Start:
    """Return what the flags say, completed by the environment where they are not given; raises as `complete`."""
    options = flags.FLAGS
    given = {name: getattr(options, name) for name in Start._fields[1:]}
    return complete(Start(options.distributed, **given))


def complete(start: Start) -> Start:
    """Return a start with what it leaves open taken from the environment, checked.

    Raises:
      UserError: only some of address, number and id are known; a variable is no number; a number is out of range.
    """
    if start.mode == OFF:
        return start
    for name, variable in VARIABLES.items():
        text = os.environ.get(variable)
        if getattr(start, name) is None and text:
            if name != "coordinator_address" and not text.isdigit():
                raise entry.UserError(f"${variable} must be a whole number, got {text!r}")
            start = start._replace(**{name: text if name == "coordinator_address" else int(text)})
    _check(start)
    return start


def _check(start):
    missing = [name for name in VARIABLES if getattr(start, name) is None]
    if start.coordinator_address is not None and ":" not in start.coordinator_address:
        raise entry.UserError(f"--coordinator_address must be HOST:PORT, got {start.coordinator_address!r}")
    if missing and len(missing) < len(VARIABLES):
        flag, variable = missing[0], VARIABLES[missing[0]]
        raise entry.UserError(f"--distributed={start.mode} also needs --{flag} or ${variable}: give all three or none")
    if start.is_explicit and not 0 <= start.process_id < start.num_processes:
        raise entry.UserError(f"--process_id must lie in 0..{start.num_processes - 1}, got {start.process_id}")
    if start.heartbeat_timeout_s < 1:
        raise entry.UserError(f"--heartbeat_timeout_s must be at least 1 second, got {start.heartbeat_timeout_s}")


@contextlib.contextmanager
def started(start: Start) -> Iterator[None]:
    """Runs the block with all processes connected; a process whose block fails in its own way ends at once.

    It cannot say goodbye, because the others wait for it inside a collective; they end by its missing heartbeat.

    Raises:
      UserError: there are no other processes under 'on', or another number than expected.
    """
    import jax

    if start.mode != OFF:
        _connect(start)
    try:
        if start.expect_processes not in (None, jax.process_count()):
            raise entry.UserError(
                f"--expect_processes={start.expect_processes}, but the number is {jax.process_count()}: start all with "
                "--distributed=on and the same --coordinator_address and --num_processes"
            )
        yield
    except SystemExit:
        raise
    except Exception as error:
        is_shared = isinstance(error, entry.UserError) and not isinstance(error, entry.LocalError)
        if is_shared or jax.process_count() == 1:
            raise
        code = entry.told(error)
        if code is None:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code or entry.EXIT_FAILED)
    finally:
        jax.distributed.shutdown()


def _connect(start):
    """Connect to the other processes; one that never comes ends this one after five minutes (jax's own words)."""
    import jax

    patience = {name: start.heartbeat_timeout_s for name in ("heartbeat_timeout_seconds", "shutdown_timeout_seconds")}
    arguments: dict = dict(patience)
    if start.is_explicit:
        arguments |= {name: getattr(start, name) for name in VARIABLES} | {"cluster_detection_method": "deactivate"}
        if start.process_id == 0:
            print(f"waiting for {start.num_processes} processes at {start.coordinator_address}", file=sys.stderr)
    try:
        jax.distributed.initialize(**arguments)
    except ValueError as error:  # jax found no cluster
        if start.mode == ON:
            raise entry.UserError(
                f"--distributed=on found no cluster ({error}): give --coordinator_address, --num_processes and "
                "--process_id, or their variables"
            ) from error


def say(text: str, *, file: TextIO | None = None) -> None:
    """Print a line, from the lead process alone; errors are printed by every process that meets them."""
    import jax

    if jax.process_index() == 0:
        print(text, file=file, flush=True)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Lets all processes fail where one of them fails; in the block they must not talk to each other.

    Raises:
      UserError: in the processes that went well, naming the one that did not. What went wrong, in that one, a `LocalError` as
        a UserError, for now all know.
    """
    failure = None
    try:
        yield
    except entry.LocalError as error:
        failure = entry.UserError(str(error))
    except Exception as error:
        failure = error
    failed = [rank for rank, has_failed in enumerate(gathered(failure is not None)) if has_failed]
    if failure is not None:
        raise failure
    if failed:
        raise entry.UserError(f"process {failed[0]} failed here; its own message says why")


def gathered(value: Any) -> list[Any]:
    """Return what each process says, in the order of their numbers; value: anything JSON can hold. All of them have to ask."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [json.loads(json.dumps(value))]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    rows = multihost_utils.process_allgather(np.pad(text, (0, max(sizes) - len(text))))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def as_lead_says(value: bool) -> bool:
    """Return the lead's answer, for what a file system may show to one process earlier than to another."""
    return gathered(value)[0]


class Preemption:
    """Notices SIGTERM, to any process: the loop then saves and leaves, in all of them after the same step.

    With several processes jax's own service catches the signal, whose handler must not be replaced.
    """

    def __enter__(self) -> "Preemption":
        import jax

        self._is_alone = jax.process_count() == 1
        self._is_requested = False
        if self._is_alone:
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def _request(self, *_: object) -> None:
        self._is_requested = True

    def __exit__(self, *_: object) -> None:
        if self._is_alone:
            signal.signal(signal.SIGTERM, self._previous)

    def is_due(self) -> bool:
        """Whether to leave now; every process has to ask equally often."""
        from jax.experimental import multihost_utils

        if not self._is_alone and multihost_utils.reached_preemption_sync_point(next(_asked)):
            self._is_requested = True
        return self._is_requested


@contextlib.contextmanager
def leaving_at_once(what: str) -> Iterator[None]:
    """Lets SIGTERM end this process with exit code 42 and a line, for work of which every piece is whole or absent on disk.

    At once, because an exception thrown into XLA while it compiles may crash the interpreter. What has a handler of its own inside the block,
    such as training, is left to that.

    Args:
      what: the pieces, 'cells' say.
    """

    def leave(*_: object) -> None:
        said = f"preempted between two {what}; what is finished is kept, the same command continues"
        print(said, file=sys.stderr, flush=True)
        os._exit(entry.EXIT_PREEMPTED)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)  # None: jax's own, which cannot be put back
