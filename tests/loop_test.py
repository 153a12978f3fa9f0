"""The training loop: killed at any time it ends in the same state, it stops on NaN, it compiles once, its metrics have no gap.

Runs that get killed are processes of their own: this file, run as a script, trains a network of one block on synthetic images.
"""

import collections
import dataclasses
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from triqdef_jax import checkpoints, loop, models, writer
from triqdef_jax import config as config_lib
from triqdef_jax.data.memory import ImageData
from triqdef_jax.data.splits import Split
from triqdef_jax.models.resnet import ResNet, ResNetPlan
from triqdef_jax.patch_pool import PatchPool

ROOT = pathlib.Path(__file__).resolve().parent.parent
BITS = (32, 4, 2)
STAGES = ((0, 8), (8, 16), (16, 32))  # steps; 4 and 2 bits join at 8 and 16


def make_config(**changes):
    config = config_lib.default()
    config.update_from_flattened_dict(
        {
            "data.image_size_px": 8,
            "data.calibration_images": 8,
            "model.name": "tiny",
            "model.width": 2,
            "quant.bits": BITS,
            "bact.starts": (0.25, 0.5),
            "loss.feature_layers": ("stage1",),
            "train.batch_size": 8,
            "train.epochs": 8,
            "train.log_every_steps": 2,
            "train.checkpoint_every_steps": 3,
            "optim.lr": 0.02,
        }
        | changes
    )
    return config


def build_tiny(name, *, num_classes, width, options):
    """A network of one block, which compiles in a third of the time."""
    return ResNet(ResNetPlan((1,), width), num_classes, options)


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


class InterruptedData:
    """Data that call `interrupt` when the batch of step `at` is asked for."""

    def __init__(self, loaded, at, interrupt):
        self.loaded, self.at, self.interrupt = loaded, at, interrupt

    def __getattr__(self, name):
        return getattr(self.loaded, name)

    def train_batches(self, *, start_step, **settings):
        for step, batch in enumerate(self.loaded.train_batches(start_step=start_step, **settings), start_step):
            if step == self.at:
                self.interrupt()
            yield batch


def end(signal_number):
    os.kill(os.getpid(), signal_number)


def kill_soon():
    """SIGKILL at whatever the process is doing some milliseconds from now: a step, a log line, a checkpoint."""
    threading.Timer(0.05, end, [signal.SIGKILL]).start()


class KilledWhileSaving(checkpoints.Checkpointer):
    """SIGKILL while the checkpoint of the newly calibrated stage `stage` is being written."""

    stage = 0

    def save(self, step, state, meta):
        super().save(step, state, meta)
        if meta["stage"] == self.stage:
            end(signal.SIGKILL)


class TerminatedWhileLogging(writer.MetricWriter):
    """SIGTERM while the metrics of step `at` are being written."""

    at = 0

    def write(self, step, values):
        super().write(step, values)
        if step == self.at:
            end(signal.SIGTERM)


def train_as_a_script(workdir, event, at):
    """Train to the end or to the event; prints how often each program was compiled, exits like `train`."""
    models.MODELS["tiny"] = build_tiny
    compiled = collections.Counter()
    logger = logging.getLogger("jax._src.interpreters.pxla")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    handler = logging.Handler()
    handler.emit = lambda record: compiled.update([record.getMessage().split()[1]])
    logger.addHandler(handler)
    loaded = make_data()
    if event == "kill while saving stage":
        loop.Checkpointer = type("Killed", (KilledWhileSaving,), {"stage": at})
    elif event == "terminate while logging step":
        loop.MetricWriter = type("Terminated", (TerminatedWhileLogging,), {"at": at})
    elif event:
        interrupts = {"terminate at step": lambda: end(signal.SIGTERM), "kill after step": kill_soon}
        loaded = InterruptedData(loaded, at, interrupts[event])
    run = loop.make_run(make_config(), workdir, loaded.num_train)
    step = loop.train(run, loaded, make_pool(), is_quiet=True)
    print(json.dumps(compiled))
    return 0 if step == run.num_steps else 42


@pytest.fixture(scope="module", autouse=True)
def smallest_network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", build_tiny)
        yield


@pytest.fixture(scope="module")
def train_process(tmp_path_factory):
    """A function that trains in another process. They share what they compile, without optimisation, to save time."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(workdir, event="", at=0):
        arguments = [sys.executable, __file__, str(workdir), event, str(at)]
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def undisturbed(train_process, tmp_path_factory):
    """(workdir, compilations by program) of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = train_process(workdir)
    assert done.returncode == 0, done.stderr
    return workdir, json.loads(done.stdout)


def state_of(workdir):
    with checkpoints.Checkpointer(workdir / loop.CHECKPOINTS) as checkpointer:
        return checkpointer.restore_raw()


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_is_killed_and_preempted_again_and_again_ends_bit_identical(undisturbed, train_process, tmp_path):
    for event, at, code, steps in (
        ("terminate at step", 7, 42, {8}),  # in the last step of a stage: the next one is entered, then saved
        ("kill while saving stage", 2, -signal.SIGKILL, {15, 16}),  # right after calibration; may be committed or not
        ("kill after step", 17, -signal.SIGKILL, set(range(15, 32))),
        ("terminate while logging step", 26, 42, {27}),  # noticed in the step after it
        ("", 0, 0, {32}),
    ):
        done = train_process(tmp_path, event, at)
        assert done.returncode == code, done.stderr
        with checkpoints.Checkpointer(tmp_path / loop.CHECKPOINTS) as checkpointer:
            assert checkpointer.latest_step() in steps
    (state, meta), (expected, expected_meta) = state_of(tmp_path), state_of(undisturbed[0])
    assert meta == expected_meta == {"step": 32, "stage": 2}
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    # The same lines too: none is missing, none is twice, and every mean is over the same steps.
    assert metrics_of(tmp_path) == metrics_of(undisturbed[0])


def test_one_run_compiles_forward_backward_and_penalties_once_for_all_stages(undisturbed):
    compiled = undisturbed[1]
    assert compiled["jit(calibrated)"] == 1
    assert {name: compiled[f"jit({name})"] for name in ("bit_forward", "bit_backward", "penalties")} == {
        "bit_forward": 1,
        "bit_backward": 1,
        "penalties": 1,
    }


def test_metrics_tell_every_active_bit_pair_and_layer_of_their_stage(undisturbed):
    lines = metrics_of(undisturbed[0])
    steps = [line["step"] for line in lines]
    # Every two steps, and with each checkpoint, every three.
    assert steps == [step for step in range(1, 33) if step % 2 == 0 or step % 3 == 0]
    first, last = lines[0], lines[-1]
    assert "ce_clean/32" in first and "ce_clean/4" not in first and not any(name.startswith("fdp") for name in first)
    pairs = {"32-4", "32-2", "4-2"}
    assert {name.rsplit("/", 1)[1] for name in last if name.startswith("fdp/stage1/")} == pairs
    assert {name.rsplit("/", 1)[1] for name in last if name.startswith("gpdp_chance/")} == pairs
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert last["learning_rate"] == pytest.approx(0.02 * 0.01)  # both milestones passed
    assert last["ce_clean/32"] < first["ce_clean/32"]


def test_a_finished_run_is_left_as_it_is(undisturbed):
    workdir, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    run = loop.make_run(make_config(), workdir, 32)
    assert loop.train(run, make_data(), make_pool(), is_quiet=True) == 32
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_checkpoint(tmp_path):
    changes = {"loss.method": "qat", "quant.bits": (32,), "bact.starts": (), "optim.lr": 1e30, "optim.clip_norm": 0.0}
    run = loop.make_run(make_config(**changes), tmp_path, 32)
    with pytest.raises(loop.NonFiniteLossError) as stop:
        loop.train(run, make_data(), None, is_quiet=True)
    message = str(stop.value)
    assert "not finite at step 1; the last good checkpoint is step 0 in" in message and "\n" not in message
    assert [path.name for path in (tmp_path / loop.CHECKPOINTS).iterdir()] == ["0"]
    assert not metrics_of(tmp_path)


def test_a_drawn_network_is_one_of_the_active_bit_widths_chosen_by_the_key():
    run = loop.make_run(make_config(), "unused", 32)
    network, state = run.network, loop.init_state(run)
    active = (32, 2)
    scales = jax.tree.map(lambda x: 0.2 * x, state.weights.scales)
    weights = state.weights._replace(scales=scales)
    slots, specs = [network.slot(b) for b in active], [network.spec(b) for b in active]
    images = make_data().test.images / np.float32(255)
    drawn_fn = loop.drawn_bit_logits(network, weights, state.stats, slots, specs)
    call = jax.jit(lambda logits_fn, *args: logits_fn(*args))
    one_fns = [loop.bit_logits(network, weights, state.stats, b, network.spec(b)) for b in active]
    expected = [np.asarray(call(one_fn, images)) for one_fn in one_fns]
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    matches = []
    for number in range(8):
        drawn = np.asarray(call(drawn_fn, jax.random.key(number), images))
        # Two programs of the same network: float32 sums in another order; a flipped code would be 0.01.
        matches.append([np.allclose(drawn, logits, atol=1e-5) for logits in expected])
    assert all(sum(match) == 1 for match in matches)
    assert {match.index(True) for match in matches} == {0, 1}


def test_short_runs_on_one_cpu_use_the_plan_that_compiles_least():
    run = loop.make_run(make_config(), "unused", 32)
    assert run.plan == "per_bit"
    assert dataclasses.replace(run, num_steps=loop.FUSED_FROM_STEPS).plan == "fused"
    assert loop.make_run(make_config(**{"train.plan": "fused"}), "unused", 32).plan == "fused"


def test_stages_and_steps_follow_the_config():
    run = loop.make_run(make_config(), "unused", 35)  # 35 images: four whole batches of 8
    assert run.num_steps == 32
    assert tuple((stage.start, stage.stop) for stage in run.stages) == STAGES
    assert [stage.new_bits for stage in run.stages] == [(32,), (4,), (2,)]


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match=r"train\.batch_size must be at most the 32 training images, got 64"):
        loop.make_run(make_config(**{"train.batch_size": 64}), "unused", 32)


def test_streams_and_seeds_have_keys_of_their_own():
    keys = {
        tuple(jax.random.key_data(loop.stream_key(seed, name)).tolist())
        for seed in (0, 1)
        for name in ("init", "inputs", "input")
    }
    assert len(keys) == 6


if __name__ == "__main__":
    sys.exit(train_as_a_script(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
