"""A run of seconds for tests that kill, starve or resume one: the smallest network on synthetic images of 8 px, 32 steps in three stages.

As a script it is one process of such a run: `python tests/training_example.py WORKDIR [--event=EVENT --at=N] [--rank=R --port=P]`. It prints where it
resumes, every step and every save that it begins, then how often each program was compiled, and exits like the train program. EVENT
is one of `EVENTS`, which ends the process at a place that a test chooses; with a port it is rank R of two processes.
"""

import argparse
import collections
import json
import logging
import os
import pathlib
import signal
import sys

import compiling
import numpy as np
import small_networks

from triqdef_jax import checkpoints, loop, processes
from triqdef_jax import config as config_lib
from triqdef_jax.data.memory import ImageData
from triqdef_jax.data.splits import Split
from triqdef_jax.patch_pool import PatchPool

small_networks.register()  # a script has no conftest.py

ROOT = pathlib.Path(__file__).resolve().parent.parent
BITS = (32, 4, 2)
NUM_STEPS = 32
STAGES = ((0, 8), (8, 16), (16, 32))  # steps; 4 and 2 bits join at 8 and 16


def make_config(**changes):
    config = config_lib.default()
    config.update_from_flattened_dict(
        {
            "data.image_size_px": 8,
            "data.calibration_images": 8,
            "model.name": "stem",
            "model.width": 2,
            "quant.bits": BITS,
            "bact.starts": (0.25, 0.5),
            "loss.feature_layers": ("stem",),
            "train.batch_size": 8,
            "train.epochs": 8,
            "train.log_every_steps": 2,
            "train.checkpoint_every_steps": 3,
            "optim.lr": 0.02,
        }
        | changes
    )
    return config


def make_data():
    rng = np.random.default_rng(0)

    def split(num):
        labels = rng.integers(0, 10, num).astype(np.int32)
        images = np.clip(rng.normal(25.0 * labels[:, None, None, None], 40.0, (num, 8, 8, 3)), 0, 255)
        return Split(images.astype(np.uint8), labels, np.arange(num))

    return ImageData("digits", 10, 8, split(32), split(8), split(8), augment="shift")


def make_pool():
    rng = np.random.default_rng(1)
    masks, sizes = np.ones((4, 2, 2), np.float32), np.full(4, 2, np.int32)
    return PatchPool(rng.random((4, 2, 2, 3), np.float32), masks, sizes, np.zeros(4, np.int32), "digest")


def environment(cache):
    """Environment of the processes of a test: they share what they compile, in the folder `cache`."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": compiling.XLA_FLAGS,
        **compiling.cache_in(cache),
    }


def command(workdir, *flags):
    """Arguments that start this file as a script."""
    return [sys.executable, __file__, str(workdir), *flags]


class InterruptedData:
    """Data that call `interrupt` when the batch of step `at` is asked for."""

    def __init__(self, loaded, at, interrupt):
        self.loaded, self.at, self.interrupt = loaded, at, interrupt

    def __getattr__(self, name):
        return getattr(self.loaded, name)

    def train_batches(self, *, start_step, **settings):
        for step, batch in enumerate(self.loaded.train_batches(start_step=start_step, **settings), start_step):
            self.tell(step)
            if step == self.at:
                self.interrupt()
            yield batch

    def tell(self, step):
        """Say which step begins; here nothing."""


class ToldData(InterruptedData):
    """The same, but every step is printed."""

    def tell(self, step):
        print(f"step {step}", flush=True)


class ToldCheckpointer(checkpoints.Checkpointer):
    """Prints the step of what is restored, every step whose save begins, and that the last save is on the disk."""

    def restore(self, abstract_state):
        found = super().restore(abstract_state)
        print(f"resumes from {found[1]['step']}", flush=True)
        return found

    def save(self, step, state, meta):
        print(f"saves {step}", flush=True)
        return super().save(step, state, meta)

    def __exit__(self, *exc):
        super().__exit__(*exc)
        print("closed", flush=True)


def end(signal_number):
    os.kill(os.getpid(), signal_number)


class KilledWhileSaving(ToldCheckpointer):
    """SIGKILL while the checkpoint of the newly calibrated stage `stage` is being written."""

    stage = 0

    def save(self, step, state, meta):
        super().save(step, state, meta)
        if meta["stage"] == self.stage:
            end(signal.SIGKILL)


INTERRUPTS = {"": lambda: None, "terminate at step": lambda: end(signal.SIGTERM)}
EVENTS = (*INTERRUPTS, "kill while saving stage")


def train_as_a_script(workdir, event, at):
    """Train to the end or to the event; prints how often each program was compiled, exits like `train`."""
    compiled = count_compilations()
    loop.Checkpointer = ToldCheckpointer
    if event == "kill while saving stage":
        loop.Checkpointer = type("Killed", (KilledWhileSaving,), {"stage": at})
    loaded = ToldData(make_data(), at, INTERRUPTS.get(event, INTERRUPTS[""]))
    run = loop.make_run(make_config(), workdir, loaded.num_train)
    step = loop.train(run, loaded, make_pool(), is_quiet=True)
    print(json.dumps(compiled))
    return 0 if step == run.num_steps else 42


def count_compilations():
    """Return a counter that will hold how often each program was compiled."""
    compiled = collections.Counter()
    logger = logging.getLogger("jax._src.interpreters.pxla")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    handler = logging.Handler()
    handler.emit = lambda record: compiled.update([record.getMessage().split()[1]])
    logger.addHandler(handler)
    return compiled


def main(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--event", default="", choices=EVENTS)
    parser.add_argument("--at", type=int, default=0)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--port", type=int)
    asked = parser.parse_args(arguments)
    start = processes.Start()
    if asked.port:
        start = processes.Start("on", f"localhost:{asked.port}", 2, asked.rank, heartbeat_timeout_s=10)
    with processes.started(start):
        return train_as_a_script(asked.workdir, asked.event, asked.at)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
