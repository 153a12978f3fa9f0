"""Compilation ahead of time: while one stage trains, a thread compiles the program of the next, from the shapes that the present one was called with.

Results are those of compiling in place, bit for bit: it is the same program. Tracing shares the interpreter with the loop, XLA itself gives it
free. A thread inside XLA cannot be stopped, and an interpreter that ends without it crashes: Python waits for it, and who cannot wait (a
preempted program) leaves by `os._exit`, see `entry`.
"""

import logging
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from triqdef_jax import train_step

_log = logging.getLogger(__name__)


class Compiler:
    """Jits functions like `train_step.jit`, and compiles those that have a static argument for its next value, in the background."""

    def __init__(self):
        self._programs, self._thread = [], None

    def jit(self, function: Callable, *, static_argnums: tuple[int, ...] = (), **options) -> Callable:
        """Return the jitted function; with one static argument it can be prepared. It has no keyword arguments."""
        jitted = train_step.jit(function, static_argnums=static_argnums, **options)
        if not static_argnums:
            return jitted
        self._programs.append(_Program(jitted, *static_argnums))
        return self._programs[-1]

    def prepare(self, static: Hashable, *following: Any) -> None:
        """Begin to compile what has been called so far for another static argument; returns at once.

        Args:
          static: the next value of the static argument. following: the next values of the arguments behind it; all others keep their shapes.
        """
        if self._programs and not self._thread:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile_ahead")
        for program in self._programs:
            program.prepare(self._thread.submit, static, following)

    def close(self) -> None:
        """Begin nothing more; the thread ends with what it compiles, and programs stay usable."""
        if self._thread:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None


class _Program:
    """One jitted function: runs what was compiled for its present static argument, or compiles in place."""

    def __init__(self, jitted, place):
        self._jitted, self._place = jitted, place
        self._static = self._shapes = self._compiled = None
        self._futures = {}

    def __call__(self, *args):
        if self._shapes is None:
            self._shapes = [arg if at == self._place else _shapes_of(arg) for at, arg in enumerate(args)]
        if args[self._place] != self._static:
            self._static = args[self._place]
            self._compiled = self._take()
        if self._compiled is None:
            return self._jitted(*args)
        try:
            return self._compiled(*args[: self._place], *args[self._place + 1 :])
        except (TypeError, ValueError) as error:  # other shapes or devices than foreseen; nothing has run yet
            return self._in_place(error, args)

    def prepare(self, submit, static, following):
        if self._shapes is None or static in self._futures:
            return
        args = list(self._shapes)
        args[self._place : self._place + 1 + len(following)] = static, *map(_shapes_of, following)
        self._futures[static] = submit(lambda: self._jitted.lower(*args).compile())

    def _take(self):
        """Return the executable for the present static argument, once its compilation has ended: that is sooner than to begin another."""
        future = self._futures.pop(self._static, None)
        if future is None:
            return None
        try:
            return future.result()
        except Exception as error:  # of tracing, lowering or XLA: in place it shows whether it is the program's own
            _tell(error)
            return None

    def _in_place(self, error, args):
        _tell(error)
        self._compiled = None
        return self._jitted(*args)


def _shapes_of(tree):
    """Return a tree of arrays as what `jax.jit` needs to know of them: shapes, types and places."""
    return jax.tree.map(_shape_of, tree)


def _shape_of(leaf):
    if not isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(np.shape(leaf), np.result_type(leaf))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding, weak_type=leaf.weak_type)


def _tell(error):
    text = " ".join(str(error).split())[:160]
    _log.warning("the next stage could not be compiled ahead (%s: %s); compiling in place", type(error).__name__, text)
