"""The host waits for the devices to log, to save and at stage ends, never in between: reading an array anywhere else fails here.

On CPU no transfer guard sees a read of a device's array, so what reads and waits is trapped where JAX implements it; elsewhere the guard is on too.
"""

import contextlib
import functools
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import api
from jax._src.array import ArrayImpl

from triqdef_jax import data, loop


class HostSyncError(AssertionError):
    """The host asked for the value of an array on a device."""


class Trap:
    """While set, raises in the thread that set it when an array is read or waited for."""

    def __init__(self, patch):
        self.is_set = threading.local()
        read, wait = ArrayImpl._value, ArrayImpl.block_until_ready
        patch.setattr(ArrayImpl, "_value", property(lambda array: self.check(read.fget, array)))
        patch.setattr(ArrayImpl, "block_until_ready", lambda array: self.check(wait, array))
        wait_for_all = api.xc.batched_block_until_ready
        patch.setattr(api.xc, "batched_block_until_ready", lambda arrays: self.check(wait_for_all, arrays))
        for name in ("asarray", "array", "stack"):  # NumPy reads a CPU's buffers without asking JAX
            patch.setattr(np, name, functools.partial(self.convert, getattr(np, name)))

    def check(self, function, *args, **kwargs):
        if getattr(self.is_set, "value", False):
            raise HostSyncError
        return function(*args, **kwargs)

    def convert(self, function, *args, **kwargs):
        is_read = any(isinstance(leaf, ArrayImpl) for leaf in jax.tree.leaves(args))
        return self.check(function, *args, **kwargs) if is_read else function(*args, **kwargs)

    @contextlib.contextmanager
    def hold(self, value):
        before, self.is_set.value = getattr(self.is_set, "value", False), value
        guard = "disallow" if value else "allow"
        try:
            with jax.transfer_guard_device_to_host(guard):
                yield
        finally:
            self.is_set.value = before

    def lifted(self, function):
        """The function, allowed to read arrays."""

        def call(*args, **kwargs):
            with self.hold(False):
                return function(*args, **kwargs)

        return call


@pytest.fixture
def trap():
    with pytest.MonkeyPatch.context() as patch:
        yield Trap(patch)


READS = {
    "float": float,
    "bool": bool,
    "item": lambda x: x.item(),
    "numpy": lambda x: np.asarray(x),
    "numpy of several": lambda x: np.stack([x, x]),
    "device_get": lambda x: jax.device_get({"loss": x}),
    "format": lambda x: f"{x:.3f}",
    "wait": jax.block_until_ready,
    "wait for several": lambda x: jax.block_until_ready((x, x)),
    "method": lambda x: x.block_until_ready(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_the_trap_catches_every_way_to_read_or_to_wait(trap, read):
    value = jnp.float32(1) + 1
    with trap.hold(True), pytest.raises(HostSyncError):
        read(value)
    with trap.hold(True), trap.hold(False):
        read(value)


class Begun:
    """Data whose first batch, for which a key is read once per run, is there before the first step."""

    def __init__(self, loaded):
        self.heldout, self._loaded = loaded.heldout, loaded

    def train_batches(self, **settings):
        batches = self._loaded.train_batches(**settings)
        return itertools.chain([next(batches)], batches)


@pytest.fixture
def train(trap, tiny_config, tmp_path, monkeypatch):
    """A function that trains six steps of two stages, each step's dispatch and bookkeeping under the trap, but not compilation or logging."""

    def run(plan, method, disturb=lambda metrics: None):
        fields = {"data.train_images": 96, "train.batch_size": 16, "train.epochs": 1, "train.log_every_steps": 2}
        fields["train.keep_best"] = False  # which waits, at checkpoints
        config = tiny_config(
            **fields, **{"model.name": "stem", "train.plan": plan, "loss.method": method, "baselines.dwq_steps": 1}
        )
        loaded = data.load(config.data)
        made = loop.make_run(config, tmp_path, loaded.num_train)
        add = loop.metric_window.add

        def add_disturbed(window, metrics, step):
            disturb(metrics)
            return add(window, metrics, step)

        monkeypatch.setattr(loop.metric_window, "add", add_disturbed)
        for name in ("_log", "_enter"):
            monkeypatch.setattr(loop._Trainer, name, trap.lifted(getattr(loop._Trainer, name)))
        monkeypatch.setattr(loop.Checkpointer, "save", trap.lifted(loop.Checkpointer.save))
        run_stage = loop._Trainer._run_stage

        def run_trapped(*args):
            with trap.hold(True):
                return run_stage(*args)

        monkeypatch.setattr(loop._Trainer, "_run_stage", run_trapped)
        return loop.train(made, Begun(loaded), None, is_quiet=True)

    return run


@pytest.mark.parametrize("plan, method", [("per_bit", "dwq"), ("fused", "qat")])
def test_no_step_waits_for_the_devices_between_log_lines(train, plan, method):
    assert train(plan, method) == 6


def test_a_loss_that_is_read_in_the_loop_fails_the_same_run(train):
    with pytest.raises(HostSyncError):
        train("per_bit", "qat", disturb=lambda metrics: float(metrics["loss"]))
