"""How every iterative attack is run: one jitted, donated step from the host on CPU, `lax.fori_loop` elsewhere.

On XLA's CPU backend convolution gradients inside a rolled loop are 15-100 times slower; on an accelerator the rolled
loop saves a dispatch per step. `is_rolled` is the only place that decides.
"""

import functools
from collections.abc import Callable

import jax
from jax import numpy as jnp
from jax.tree_util import Partial


def is_rolled() -> bool:
    """Tell whether loops are compiled as loops on this backend."""
    return jax.default_backend() != "cpu"


def as_partial(logits_fn: Callable) -> Partial:
    """Make a network an argument of jitted steps: ``jax.tree_util.Partial(fn, params)`` carries params as leaves.

    With such a Partial a step is traced once for a given `fn` object and met again for all params of equal shapes. A
    plain function works too, but what it closes over becomes a constant and each new closure is traced anew.
    """
    return logits_fn if isinstance(logits_fn, Partial) else Partial(logits_fn)


def run_loop(step: Callable, carry, args: tuple, start: int, stop: int):
    """Return the carry after ``carry = step(index, carry, *args)`` for index = start..stop-1.

    Args:
      step: pure function, the same object in every call (build it with a cached `make_*`), or it is traced again.
      carry: pytree of arrays; its buffers are donated, do not use it afterwards.
      args: pytree of arrays that stay as they are.
      start: first index.
      stop: index after the last one.
    """
    if is_rolled():
        return _rolled(step, carry, args, jnp.int32(start), jnp.int32(stop))
    for index in range(start, stop):
        carry = _single(step, carry, args, jnp.int32(index))
    return carry


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _single(step, carry, args, index):
    return step(index, carry, *args)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _rolled(step, carry, args, start, stop):
    return jax.lax.fori_loop(start, stop, lambda index, carry: step(index, carry, *args), carry)
