"""What Orbax and TensorStore say when they fail: the cause on one line, and nothing beside it."""

import contextlib
import functools
import logging
import os
import re
import sys
import threading
import warnings
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint._src.futures import future


def cause(error: BaseException) -> str:
    """Returns the shortest true reason of an error of Orbax or TensorStore on one line."""
    chain = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    system = next((e for e in chain if isinstance(e, OSError) and e.strerror), None)
    if system is not None:
        return f"{system.strerror}: {system.filename}" if system.filename else system.strerror
    text = " ".join(str(error).split())
    code = re.search(r"os_error_code='(\d+)'", text)  # TensorStore's way to say ENOSPC and the like
    return os.strerror(int(code[1])) if code else f"{type(error).__name__}: {text[:160]}"


@functools.cache
def quiet() -> None:
    """Keeps Orbax from talking over the one line a failure gets here; everything it reports is raised as well.

    It logs notes on every save and, when one of its tasks fails, drops the others and closes an event loop that
    TensorStore still calls: a traceback for each remaining array.
    """
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "OCDBT" not in record.getMessage())
    warnings.filterwarnings(
        "ignore", r"coroutine '(\w+Handler\.\w+|_create_paths|cancellable|\w*serialize\S*)' was never awaited"
    )
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        is_late_call = isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(unraisable.exc_value)
        dropped = getattr(unraisable.object, "cr_code", None)
        if not (is_late_call or (dropped and "orbax" in dropped.co_filename)):
            previous(unraisable)

    sys.unraisablehook = hook


def release() -> None:
    """Ends the threads of a failed save that still wait for a directory which nobody will make.

    Orbax leaves them waiting for five minutes, and the program does not end before they do. The signal that lets them go
    reaches those of other processes too; what they then cannot write fails there. One save at a time is assumed.
    """
    for thread in threading.enumerate():
        if isinstance(thread, future._SignalingThread):
            with contextlib.suppress(Exception):  # the thread may end, and another process be gone, at this very moment
                thread.cancel()
                future.set_signals(thread._receive_signals, operation_id=thread._operation_id)


def barrier(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier between processes, where one whose save has failed in a thread of Orbax raises instead of waiting.

    It would wait twenty minutes for others, which know of no failure and wait for its part of the save. Raised, it ends this
    process, and that ends the others.
    """
    failure = sys.exception()
    if failure is not None and threading.current_thread() is not threading.main_thread():
        raise failure
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)
