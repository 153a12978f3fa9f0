"""Micro-batches: a step's batch in parts that fit into memory one after the other, and the running mean of what they say.

A part takes every k-th row, so that each device keeps the rows it has. Arrays on devices in, arrays out.
"""

from typing import Any

import jax

Tree = Any


def split(inputs: Tree, index: jax.Array, *, num: int) -> Tree:
    """Return micro-batch `index` of `num`: rows index, index + num, ... of every array `[B, ...]`, B a multiple of `num`."""
    return jax.tree.map(lambda rows: rows.reshape(rows.shape[0] // num, num, *rows.shape[1:])[:, index], inputs)


def mean(done: Tree, new: Tree, num_done: jax.Array) -> Tree:
    """Return the mean of `num_done + 1` trees from the mean of the first `num_done` and the last one."""
    return jax.tree.map(lambda old, late: old + (late - old) / (num_done + 1).astype(old.dtype), done, new)
