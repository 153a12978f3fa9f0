"""Processes find one another, compute what one computes, fail together, and leave after the same step."""

import errno
import json
import os
import re
import signal

import jax
import numpy as np
import pytest
from several_processes import CONNECTED, ROOT, run_processes

from triqdef_jax import entry, processes

TWENTY_STEPS = """
def main(rank):
    import twenty_steps
    meshes = {1, jax.device_count()} if jax.process_count() == 1 else {jax.device_count()}
    print(json.dumps([twenty_steps.run_twice(sharding.data_mesh(num)) for num in sorted(meshes)]))
"""

AGREEMENT = """
def main(rank):
    try:
        with processes.together():
            if rank == 1:
                raise ValueError("no disk here")
    except Exception as error:
        print(type(error).__name__, error)
    with processes.together():
        pass
    assert processes.gathered(rank == 1) == [False, True]
    assert processes.as_lead_says(rank == 0) and not processes.as_lead_says(rank == 1)
    processes.say("one line")
"""

ONE_DIES = """
def main(rank):
    if rank == 1:
        raise RuntimeError("a bug of ours")
    processes.gathered(True)
"""

ONE_DISK_FAILS = """
def main(rank, folder, failing):
    import contextlib, faults_test
    from triqdef_jax import checkpoints
    state = sharding.replicate({"w": np.ones((100, 200), np.float32)}, sharding.data_mesh())
    saver = checkpoints.Checkpointer(folder)
    saver.save(1, state, {})
    saver.wait()
    with faults_test.largest_file(None, 100) if rank == int(failing) else contextlib.nullcontext():
        saver.save(2, state, {})
        saver.wait()
"""

TRAINING = """
def main(rank, workdir, terminated):
    import training_example as t
    from triqdef_jax import loop
    loaded = t.make_data()
    def interrupt():
        if rank == int(terminated):
            t.end(signal.SIGTERM)
        time.sleep(3)  # jax looks for the signal once a second; the rest of so short a run is dispatched within that
    if int(terminated) >= 0:
        loaded = t.InterruptedData(loaded, 9, interrupt)
    fields = {"loss.method": "qat", "quant.bits": (32,), "bact.starts": (), "train.keep_best": False}
    config = t.make_config(**fields, **{"train.checkpoint_every_steps": 8})
    run = loop.make_run(config, pathlib.Path(workdir), loaded.num_train)
    step = loop.train(run, loaded, None, is_quiet=True)
    print(json.dumps(step))
    return 0 if step == run.num_steps else entry.EXIT_PREEMPTED
"""


def test_one_device_eight_devices_and_two_processes_take_the_same_twenty_steps():
    found = []
    for num, num_devices in ((1, 8), (2, 1)):
        for code, out, err in run_processes(TWENTY_STEPS + CONNECTED, num=num, num_devices=num_devices):
            assert code == 0, err
            found += json.loads(out)
    (one, again), *others = found
    assert one == again and len(others) == 3 and one[-1] < 0.9 * one[0]
    for first, second in others:
        assert first == second  # bit for bit
        # Sums in another order: 4e-16 after the 20 steps when measured.
        np.testing.assert_allclose(first, one, rtol=1e-9)


def test_what_fails_in_one_process_fails_in_all():
    lead, other = run_processes(AGREEMENT + CONNECTED)
    assert (lead[0], other[0]) == (0, 0), lead[2] + other[2]
    assert lead[1] == "UserError process 1 failed here; its own message says why\none line\n"
    assert other[1] == "ValueError no disk here\n"


def test_a_process_that_dies_ends_the_others_with_a_line_that_says_so():
    lead, other = run_processes(ONE_DIES + CONNECTED, HEARTBEAT_TIMEOUT_S="4")
    assert other[0] == entry.EXIT_FAILED and "RuntimeError: a bug of ours" in other[2]
    assert lead[0] == -signal.SIGABRT
    assert "another task died" in lead[2] and "unhealthy (stopped sending heartbeats):\n1\n" in lead[2]


@pytest.mark.parametrize(
    "error, code, said",
    [
        (RuntimeError("a bug of ours"), entry.EXIT_FAILED, "Traceback"),
        (OSError(errno.ENOSPC, "No space left on device", "/full"), entry.EXIT_USER_ERROR, "error: No space left on"),
        (entry.LocalError("no image"), entry.EXIT_USER_ERROR, "error: no image\n"),
    ],
)
def test_what_one_of_several_processes_alone_knows_ends_it_at_once(monkeypatch, capsys, error, code, said):
    left = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", left.append)  # the real one does not return
    with processes.started(processes.Start()):
        raise error
    assert left == [code] and capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_disk_that_fails_one_process_ends_all_at_once_and_leaves_the_checkpoint_before(tmp_path, failing):
    ended = run_processes(ONE_DISK_FAILS + CONNECTED, tmp_path, failing, HEARTBEAT_TIMEOUT_S="4")
    code, _, said = ended[failing]
    assert code == entry.EXIT_USER_ERROR and ended[1 - failing][0], said
    assert re.search(
        r"^error: cannot write checkpoints to .*: File too large; intact steps: \[1\]; make room", said, re.M
    )
    assert [path.name for path in tmp_path.iterdir() if path.name.isdecimal()] == ["1"]


def test_sigterm_to_any_process_stops_all_after_the_same_step_and_one_alone_goes_on_from_there(tmp_path):
    stopped = run_processes(TRAINING + CONNECTED, tmp_path / "run", 1)
    assert [code for code, _, _ in stopped] == [entry.EXIT_PREEMPTED] * 2, stopped
    steps = {int(out) for _, out, _ in stopped}
    assert len(steps) == 1 and steps <= set(range(9, 32))
    assert str(*steps) in os.listdir(tmp_path / "run" / "checkpoints")
    ((code, out, error),) = run_processes(TRAINING + CONNECTED, tmp_path / "run", -1, num=1)
    assert (code, int(out)) == (0, 32), error
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(lines)) == lines and lines[-1] == 32


def start(**known):
    return processes.Start("on", **known)


@pytest.mark.parametrize(
    "known, message",
    [
        ({"num_processes": 2}, r"--distributed=on also needs --coordinator_address or \$JAX_COORDINATOR_ADDRESS"),
        ({"coordinator_address": "host"}, "--coordinator_address must be HOST:PORT, got 'host'"),
        (
            {"coordinator_address": "host:1", "num_processes": 2, "process_id": 2},
            r"--process_id must lie in 0\.\.1, got 2",
        ),
        ({"heartbeat_timeout_s": 0}, "--heartbeat_timeout_s must be at least 1 second, got 0"),
    ],
)
def test_what_cannot_start_is_refused_before_jax_is_asked(monkeypatch, known, message):
    for variable in processes.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(entry.UserError, match=message):
        processes.complete(start(**known))


def test_the_environment_fills_in_what_flags_leave_open(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    assert processes.complete(start(process_id=2)) == start(coordinator_address="host:1", num_processes=4, process_id=2)
    assert processes.complete(processes.Start()) == processes.Start()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "four")
    with pytest.raises(entry.UserError, match=r"\$JAX_NUM_PROCESSES must be a whole number, got 'four'"):
        processes.complete(start())


def test_one_process_is_no_cluster(monkeypatch):
    for variable in processes.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    with (
        pytest.raises(entry.UserError, match="--expect_processes=2, but the number is 1"),
        processes.started(processes.Start(expect_processes=2)),
    ):
        pass
    with processes.started(processes.Start(expect_processes=1)), processes.together():
        assert processes.as_lead_says(True) and processes.gathered(False) == [False]


def test_one_process_notices_sigterm_by_itself_and_gives_the_handler_back():
    before = signal.getsignal(signal.SIGTERM)
    with processes.Preemption() as preemption:
        assert not preemption.is_due()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.is_due() and preemption.is_due()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_program_refuses_half_an_address_in_one_line():
    script = "import runpy, sys; sys.argv[0] = 'train'; runpy.run_module('triqdef_jax.train', run_name='__main__')"
    absent = {"JAX_COORDINATOR_ADDRESS": "", "JAX_NUM_PROCESSES": "", "JAX_PROCESS_ID": ""}
    arguments = ("--distributed=on", "--num_processes=2", f"--config={ROOT}/configs/digits.py")
    ((code, _, stderr),) = run_processes(script, *arguments, num=1, **absent)
    assert code == entry.EXIT_USER_ERROR and stderr.count("\n") == 1
    assert "also needs --coordinator_address" in stderr
