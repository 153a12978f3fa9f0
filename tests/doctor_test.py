"""The doctor reports once for all processes, and its exit code says whether training would start."""

import os
import pathlib
import subprocess
import sys

import pytest

from triqdef_jax import checks, doctor
from triqdef_jax.checks import FIX, OK, WARN, Finding

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(command, cwd):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


def two_processes(*command, cwd):
    """Run a Python program in two processes, each in a folder of its own below `cwd`."""
    for rank in range(2):
        (cwd / str(rank)).mkdir(exist_ok=True)
    own_folder = ["bash", "-c", 'cd "$JAX_PROCESS_ID" && exec "$0" "$@"', sys.executable]
    return run(["bash", ROOT / "launch" / "local.sh", "-n", "2", "-d", "1", "--", *own_folder, *command], cwd)


def lines(stdout):
    """Return {topic: (level, text)} of a report; what Gloo prints is no part of it."""
    rows = [line.removeprefix("[0] ") for line in stdout.splitlines()]
    return {row[5:19].strip(): (row[:5].strip(), row[19:]) for row in rows if row[:5].strip() in checks.LEVELS}


def test_a_machine_that_can_train_digits_is_ready_and_left_as_it_was(tmp_path):
    config = f"--config={ROOT / 'configs' / 'digits.py'}"
    done = run([sys.executable, "-m", "triqdef_jax.doctor", config, "--min_free_gb=0.001"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("\nready to train\n")
    found = lines(done.stdout)
    assert {"python", "packages", "devices", "memory", "collective", "data", "run", "workers", "disk"} <= found.keys()
    assert found["processes"] == ("ok", "1 on 1 machine") and found["run"] == (
        "ok",
        "570 steps of 64 images, 64 per device",
    )
    assert list(tmp_path.iterdir()) == []


def test_two_processes_report_once_and_end_alike_where_something_is_missing(tmp_path):
    config = [f"--config={ROOT / 'configs' / 'cifar10.py'}", "--config.data.dir=/nowhere", "--min_free_gb=0.001"]
    done = two_processes("-m", "triqdef_jax.doctor", *config, f"--workdir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.count("cifar10 is not prepared in /nowhere; run: python -m triqdef_jax.prepare_data") == 1
    assert "[0] not ready: 1 to fix\n" in done.stdout
    found = lines(done.stdout)
    assert found["processes"] == ("ok", "2 on 1 machine") and found["devices"][1].startswith("2 x cpu")
    assert found["collective"][1].startswith("4 MiB over 2 devices summed in")
    assert found["shared disk"] == ("ok", f"all processes see {tmp_path}")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0", "1"]


BLIND = """
import pathlib
from absl import app
from triqdef_jax import doctor, processes
processes.define_flags()
def main(argv):
    with processes.started(processes.from_flags()):
        print(tuple(doctor.shared_disk(pathlib.Path("runs/one"))))
app.run(main)
"""


def test_a_disk_that_only_one_process_sees_is_found_out(tmp_path):
    done = two_processes("-c", BLIND, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = f"process 1 does not see what process 0 writes in {tmp_path / '0'}: put --workdir on a file system that all"
    assert f"[0] ('fix', 'shared disk', '{said}" in done.stdout
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0", "1"]


LEAD = [Finding(OK, "packages", "jax 1"), Finding(WARN, "memory", "little"), Finding(OK, "data", "here")]


def test_of_other_processes_only_what_differs_is_told(capsys):
    same = [Finding(OK, "packages", "jax 1"), Finding(WARN, "memory", "little"), Finding(OK, "data", "there")]
    assert doctor.report([LEAD, same]) == 0
    assert "process 1" not in capsys.readouterr().out
    worse = [Finding(OK, "packages", "jax 2"), Finding(OK, "memory", "much"), Finding(FIX, "data", "missing")]
    assert doctor.report([LEAD, same, worse]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[3:] == [
        "fix  data          process 2: missing",
        "fix  packages      process 2: jax 2; all processes need the same",
        "not ready: 2 to fix",
    ]


def test_other_processes_end_like_the_lead_and_print_nothing(capsys):
    assert doctor.report([[Finding(FIX, "data", "missing")], LEAD], is_quiet=True) == 1
    assert capsys.readouterr().out == ""


def test_without_its_packages_the_doctor_says_so_and_tries_nothing_else(monkeypatch, tmp_path, capsys):
    (tmp_path / "requirements.txt").write_text("no-such-package>=1,<2\n")
    monkeypatch.setattr(doctor, "REQUIREMENTS", tmp_path / "requirements.txt")
    assert doctor.main([]) == 1
    assert "missing: pip install 'no-such-package>=1,<2'" in capsys.readouterr().out


@pytest.mark.parametrize("name, level", [("json", OK), ("no_such_module", WARN)])
def test_optional_packages_are_only_warned_of(monkeypatch, name, level):
    monkeypatch.setattr(doctor, "OPTIONAL", {name: "less comfort"})
    found = doctor.optional()
    assert found.level == level and ("pip install" in found.text) == (level == WARN)


def test_bad_input_is_one_line_and_2(tmp_path):
    done = run([sys.executable, "-m", "triqdef_jax.doctor", "--config=nowhere.py"], tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no such config file: nowhere.py") and done.stderr.count("\n") == 1
