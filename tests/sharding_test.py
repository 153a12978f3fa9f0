"""Batches are split by rows, in order, over devices and processes."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from several_processes import run_processes

from triqdef_jax import sharding

TWO_PROCESSES = """
import jax, numpy as np
from triqdef_jax import processes, sharding
connected = processes.started(processes.complete(processes.Start("on")))
connected.__enter__()
rank = jax.process_index()
mesh = sharding.data_mesh()
local = np.arange(4)[:, None] + 4 * rank
batch = sharding.put_batch({"rows": local.astype(np.uint8)}, mesh)["rows"]
assert batch.shape == (8, 1) and batch.dtype == np.uint8, batch
for shard in batch.addressable_shards:
    np.testing.assert_array_equal(np.asarray(shard.data)[:, 0], np.arange(8)[shard.index[0]])
assert {s.device.process_index for s in batch.addressable_shards} == {rank}
total = jax.jit(lambda x: x.sum(dtype=np.int32), out_shardings=sharding.replicated(mesh))(batch)
assert int(total) == 28
assert sharding.is_lead() == (rank == 0)
key = jax.random.key(3)
tree = sharding.replicate({"key": key, "host": np.arange(3), "device": jax.numpy.ones(2), "whole": total}, mesh)
assert all(leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 4 for leaf in tree.values())
assert bool(jax.random.key_data(tree["key"])[1] == 3) and np.array_equal(tree["host"], np.arange(3))
try:
    sharding.data_mesh(2)
except ValueError as error:
    print(error)
connected.__exit__(None, None, None)
"""


def test_two_processes_with_two_devices_each_hold_one_global_batch_in_row_order():
    for code, out, err in run_processes(TWO_PROCESSES, num_devices=2):
        assert code == 0, err
        assert "2 processes must use all 4 devices; got 2" in out


def test_the_mesh_has_one_auto_axis_over_all_devices():
    mesh = sharding.data_mesh()
    assert mesh.axis_names == ("data",) and mesh.size == jax.device_count()
    assert mesh.axis_types == (AxisType.Auto,)


@pytest.mark.parametrize("num_devices", [0, 10_000])
def test_devices_that_are_not_there_are_refused(num_devices):
    with pytest.raises(ValueError, match=rf"num_devices must lie in 1\.\.{jax.device_count()}.*got {num_devices}"):
        sharding.data_mesh(num_devices)


def test_a_placed_batch_keeps_structure_values_and_dtypes():
    mesh = sharding.data_mesh(1)
    batch = {"images": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), "labels": np.array([3, 1], np.int32)}
    placed = sharding.put_batch(batch, mesh)
    assert all(np.array_equal(placed[name], batch[name]) and placed[name].dtype == batch[name].dtype for name in batch)
    assert all(leaf.sharding == sharding.batch_sharding(mesh) for leaf in jax.tree.leaves(placed))


def test_a_scalar_leaf_is_refused():
    with pytest.raises(ValueError, match="needs a leading batch axis"):
        sharding.put_batch({"step": np.int32(1)}, sharding.data_mesh(1))


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does():
    mesh = AbstractMesh((8,), ("data",))
    sharding.check_batch(64, mesh)
    with pytest.raises(ValueError, match=r"positive multiple of the 8 devices; got 100: use 96 or"):
        sharding.check_batch(100, mesh)
    with pytest.raises(ValueError, match="got 0: use 8"):
        sharding.check_batch(0, mesh)


def test_this_process_leads():
    assert sharding.is_lead()
