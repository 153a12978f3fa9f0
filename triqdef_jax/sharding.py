"""Where arrays live: one mesh axis, 'data'; batches are split over it by rows, everything else is replicated.

Axes are Auto: the compiler places the collectives, models name no axis. Everything works for one process and for
several that know each other (`processes`). Parameter sharding is left out.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def data_mesh(num_devices: int | None = None) -> Mesh:
    """Returns a mesh over the devices of all processes with the single Auto axis 'data'.

    Args:
      num_devices: how many devices to use, the first ones; None means all. Several processes always use all.

    Raises:
      ValueError: more devices are asked for than there are, fewer than one, or only some of several processes'.
    """
    available = jax.device_count()
    num_devices = available if num_devices is None else num_devices
    if not 1 <= num_devices <= available:
        raise ValueError(f"num_devices must lie in 1..{available}, the devices JAX sees; got {num_devices}")
    if jax.process_count() > 1 and num_devices != available:
        raise ValueError(f"{jax.process_count()} processes must use all {available} devices; got {num_devices}")
    return jax.make_mesh((num_devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_devices])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis over the devices, contiguous rows to each."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Places a whole copy of a tree of arrays on every device of the mesh.

    Every process brings its own copy, all equal, so nothing is sent between them and nothing is compared. Leaves that
    lie on the whole mesh already are taken as they are.
    """
    everywhere = replicated(mesh)
    if everywhere.is_fully_addressable:
        return jax.device_put(tree, everywhere)
    return jax.tree.map(lambda leaf: _replicate_leaf(leaf, everywhere), tree)


def _replicate_leaf(leaf: Any, everywhere: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_replicate_leaf(jax.random.key_data(leaf), everywhere))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, everywhere)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, everywhere, lambda index: whole[index])


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Places this process's rows of a global batch on its devices.

    Args:
      batch: tree of NumPy arrays ``[B / processes, ...]``: the rows of this process, in the order of its devices.
      mesh: from `data_mesh`.

    Returns:
      The same tree of global arrays ``[B, ...]`` under `batch_sharding`; dtypes are kept.

    Raises:
      ValueError: a leaf has no leading axis, or the rows do not divide evenly among the devices.
    """
    for leaf in jax.tree.leaves(batch):
        if not np.ndim(leaf):
            raise ValueError("every leaf of a batch needs a leading batch axis; got a scalar")
        check_batch(np.shape(leaf)[0] * jax.process_count(), mesh)
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch)


def is_lead() -> bool:
    """Whether this process is the one that writes logs and reports."""
    return jax.process_index() == 0


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Checks that a global batch splits evenly.

    Raises:
      ValueError: ``batch_size`` is not a positive multiple of the number of devices of the mesh.
    """
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(
            f"batch size must be a positive multiple of the {mesh.size} devices; got {batch_size}: "
            f"use {max(1, batch_size // mesh.size) * mesh.size} or change the number of devices"
        )
