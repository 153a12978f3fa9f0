"""The training loop: killed at any time it ends in the same state, it stops on NaN, it compiles once, its metrics have no gap.

Runs that get killed are processes of their own: `training_example.py`.
"""

import dataclasses
import json
import signal
import subprocess

import jax
import kill_and_resume
import numpy as np
import pytest
import training_example as example
from training_example import STAGES, make_config, make_data, make_pool

from triqdef_jax import checkpoints, loop


@pytest.fixture(scope="module")
def processes_environment(tmp_path_factory):
    """Environment of the processes of this module, which share what they compile."""
    return example.environment(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def train_process(processes_environment):
    """A function that trains in another process."""

    def run(workdir, event="", at=0):
        arguments = example.command(workdir, f"--event={event}", f"--at={at}")
        return subprocess.run(arguments, env=processes_environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def undisturbed(train_process, tmp_path_factory):
    """(workdir, compilations by program) of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = train_process(workdir)
    assert done.returncode == 0, done.stderr
    return workdir, json.loads(done.stdout.splitlines()[-1])


def state_of(workdir):
    with checkpoints.Checkpointer(workdir / loop.CHECKPOINTS) as checkpointer:
        return checkpointer.restore_raw()


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_is_preempted_and_killed_again_and_again_ends_bit_identical(
    undisturbed, train_process, processes_environment, tmp_path
):
    workdir = tmp_path / "run0"
    for event, at, code, steps in (
        ("terminate at step", 7, 42, {8}),  # in the last step of a stage: the next one is entered, then saved
        ("kill while saving stage", 2, -signal.SIGKILL, {15, 16}),  # right after calibration; may be committed or not
    ):
        done = train_process(workdir, event, at)
        assert done.returncode == code, done.stderr
        with checkpoints.Checkpointer(workdir / loop.CHECKPOINTS) as checkpointer:
            assert checkpointer.latest_step() in steps
    # Then twice from outside: at random, after the last save, and each time it resumes at the newest whole step.
    expected, expected_meta = state_of(undisturbed[0])
    digest = checkpoints.tree_digest(expected)
    tally = kill_and_resume.fault_test(tmp_path, processes_environment, 1, 2, seed=0, expected=digest)
    assert tally.is_sound and (tally.runs, tally.kills) == (1, 2), tally.lines()

    state, meta = state_of(workdir)
    assert meta == expected_meta and (meta["step"], meta["stage"]) == (32, 2)
    # The same best checkpoint is kept beside the newest, however often the run was interrupted.
    kept, expected_kept = ({p.name for p in (w / loop.CHECKPOINTS).iterdir()} for w in (workdir, undisturbed[0]))
    assert kept == expected_kept >= {"27", "30", "32"}
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    # The same lines too: none is missing, none is twice, and every mean is over the same steps.
    assert metrics_of(workdir) == metrics_of(undisturbed[0])


def test_one_run_compiles_forward_backward_and_penalties_once_for_all_stages(undisturbed):
    compiled = undisturbed[1]
    assert compiled["jit(calibrated)"] == 1
    assert compiled["jit(count)"] == 1  # which judges checkpoints
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
    assert {name.rsplit("/", 1)[1] for name in last if name.startswith("fdp/stem/")} == pairs
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
    assert "not finite at step 3; the last good checkpoint is step 0 in" in message and "\n" not in message
    assert [path.name for path in (tmp_path / loop.CHECKPOINTS).iterdir()] == ["0"]
    assert [line["step"] for line in metrics_of(tmp_path)] == [2]


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
