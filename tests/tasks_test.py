"""Programs of a study: real processes that end well, fail, are preempted, and are not started twice."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from triqdef_jax.studies import tasks
from triqdef_jax.studies.tasks import Task

MARK = "import pathlib, sys; open(sys.argv[1], 'a').write('x')"  # its product counts how often it ran


def program(folder, name, code=MARK, *, needs=(), identity="1"):
    command = (sys.executable, "-S", "-c", code, str(folder / name))
    return Task(name, name.split()[0], command, needs, identity, folder / name)


def fails(word):
    return f"import sys; print('error: {word}'); print('a later line'); sys.exit(3)"


def run(folder, *planned, **options):
    """Return (how all ended, what was said)."""
    said = []
    return tasks.run(planned, folder / "state", tell=said.append, **options), said


def test_a_failed_program_is_told_in_a_line_and_stops_only_what_needs_it(tmp_path):
    ended, said = run(
        tmp_path,
        program(tmp_path, "train a", fails("no luck")),
        program(tmp_path, "train b"),
        program(tmp_path, "evaluate a", needs=("train a",)),
        program(tmp_path, "evaluate b", needs=("train b",)),
    )
    assert {name: end.status for name, end in ended.items()} == {
        "train a": tasks.FAILED,
        "train b": tasks.DONE,
        "evaluate a": tasks.LEFT_OUT,
        "evaluate b": tasks.DONE,
    }
    assert ended["train a"].detail == "error: no luck (exit code 3)"
    assert ended["evaluate a"].detail == "train a failed"
    (line,) = [line for line in said if " failed: " in line]
    assert "error: no luck" in line and "\n" not in line and not (tmp_path / "evaluate a").exists()


def test_a_program_that_ends_well_without_its_product_has_failed(tmp_path):
    ended, _ = run(tmp_path, program(tmp_path, "train a", "print('nothing')"))
    assert ended["train a"].status == tasks.FAILED and ended["train a"].detail == "nothing (exit code 0)"


def test_what_is_finished_is_not_started_again_and_keeps_its_times(tmp_path):
    planned = (program(tmp_path, "train a"), program(tmp_path, "train b", fails("once")))
    first, _ = run(tmp_path, *planned)
    second, said = run(tmp_path, planned[0], program(tmp_path, "train b"))
    assert (tmp_path / "train a").read_text() == "x" and second["train a"] == first["train a"]
    assert first["train a"].wall_s > 0 and first["train a"].cpu_s > 0
    assert second["train b"].wall_s > first["train b"].wall_s  # both attempts count
    assert [line.split("  ")[0] for line in said if "task" in line] == ["train b"]
    run(tmp_path, program(tmp_path, "train a", identity="2"))  # another config under the same name
    assert (tmp_path / "train a").read_text() == "xx"
    (tmp_path / "train a").unlink()
    run(tmp_path, program(tmp_path, "train a", identity="2"))
    assert (tmp_path / "train a").read_text() == "x"


def test_a_program_that_must_be_alone_runs_beside_no_other(tmp_path):
    note = (
        "import sys, time; print(time.time(), flush=True); time.sleep(0.3); open(sys.argv[1], 'a'); print(time.time())"
    )
    alone = program(tmp_path, "latency", note)._replace(is_alone=True)
    others = [program(tmp_path, f"train {letter}", note) for letter in "abc"]
    run(tmp_path, others[0], alone, *others[1:], num_processes=2)
    times = lambda task: [
        float(line) for line in tasks.log_path(tmp_path / "state", task.name).read_text().split("\n")[1:3]
    ]
    start, stop = times(alone)
    spans = [times(task) for task in others]
    assert all(end <= start or stop <= begin for begin, end in spans)
    assert any(
        a[0] < b[1] and b[0] < a[1] for a in spans for b in spans if a is not b
    )  # the others ran at the same time


def test_a_damaged_state_starts_again(tmp_path, capsys):
    run(tmp_path, program(tmp_path, "train a"))
    (tmp_path / "state" / tasks.STATE_FILE).write_text("{")
    ended, _ = run(tmp_path, program(tmp_path, "train a"))
    assert ended["train a"].status == tasks.DONE and "is damaged" in capsys.readouterr().err


def test_the_time_left_is_told_once_every_kind_was_met(tmp_path):
    _, said = run(tmp_path, program(tmp_path, "train a"), program(tmp_path, "evaluate a"), program(tmp_path, "train b"))
    starts = [line for line in said if "(task" in line]
    assert "min left" not in starts[0] and "(task 3 of 3, about 1 min left; " in starts[2]


def test_programs_at_the_same_time_see_one_accelerator_each(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    code = "import os, sys, time; open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.5)"
    run(tmp_path, *(program(tmp_path, name, code) for name in ("train a", "train b")), num_processes=2)
    assert sorted((tmp_path / name).read_text() for name in ("train a", "train b")) == ["4", "7"]
    run(tmp_path, program(tmp_path, "train c", code))  # one after another, each sees all
    assert (tmp_path / "train c").read_text() == "4,7"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert (
        tasks.device_environment(1)["CUDA_VISIBLE_DEVICES"] == tasks.device_environment(1)["TPU_VISIBLE_CHIPS"] == "1"
    )


def test_a_preempted_program_ends_the_study_and_starts_nothing_more(tmp_path):
    with pytest.raises(tasks.PreemptedError, match="the same command continues"):
        run(tmp_path, program(tmp_path, "train a", "import sys; sys.exit(42)"), program(tmp_path, "train b"))
    assert not (tmp_path / "train b").exists()


def test_sigterm_reaches_the_running_program_which_saves_and_leaves(tmp_path):
    code = """if True:
        import signal, sys, time
        def leave(*_):
            open(sys.argv[1] + ".saved", "w").close()
            sys.exit(42)
        signal.signal(signal.SIGTERM, leave)
        open(sys.argv[1], "w").close()
        time.sleep(60)
    """

    def terminate():
        while not (tmp_path / "train a").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before, waiting = signal.getsignal(signal.SIGTERM), threading.Thread(target=terminate)
    waiting.start()
    with pytest.raises(tasks.PreemptedError):
        run(tmp_path, program(tmp_path, "train a", code))
    waiting.join()
    assert (tmp_path / "train a.saved").exists() and signal.getsignal(signal.SIGTERM) == before
    state = json.loads((tmp_path / "state" / tasks.STATE_FILE).read_text())
    assert not state["train a"]["is_done"] and state["train a"]["wall_s"] > 0


def test_programs_share_one_cache_of_compiled_programs_unless_there_is_one(tmp_path, monkeypatch):
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['JAX_COMPILATION_CACHE_DIR'])"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    run(tmp_path, program(tmp_path, "train a", code))
    assert (tmp_path / "train a").read_text() == str(tmp_path / "state" / tasks.COMPILED_DIR)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    run(tmp_path, program(tmp_path, "train b", code), environment={"JAX_COMPILATION_CACHE_DIR": "the study's"})
    assert (tmp_path / "train b").read_text() == "mine"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    run(tmp_path, program(tmp_path, "train c", code), environment={"JAX_COMPILATION_CACHE_DIR": "the study's"})
    assert (tmp_path / "train c").read_text() == "the study's"
