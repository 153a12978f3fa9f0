"""Launch scripts: clean under shellcheck, and doing what they say. The programs they start are tested elsewhere and
take minutes, so a stand-in interpreter records here what would have been run."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run"]
CONFIGS = ("digits.py", "digits.py:patch_ce", "digits.py:qat")
WORKDIRS = ("runs/digits", "runs/digits-patch_ce", "runs/digits-qat")
EVALUATE = f"-m triqdef_jax.evaluate --workdirs={','.join(WORKDIRS)}"

# Makes environments whose interpreter is itself, notes every other command, fails where $FAIL_AT is part of it, trains
# to a config and evaluates to a table. Version checks (-c) go to the real interpreter.
INTERPRETER = f"""#!/usr/bin/env bash
case "$*" in
  -c*|-V) exec {sys.executable} "$@" ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
esac
echo "$*" >>"$COMMANDS"
[[ -n "${{FAIL_AT:-}}" && "$*" == *"$FAIL_AT"* ]] && exit 1
case "$2" in
  triqdef_jax.train) workdir="${{4#--workdir=}}"; mkdir -p "$workdir"; : >>"$workdir/config.json" ;;
  triqdef_jax.evaluate) echo "table of $3" ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
    """Return a function that runs a script of a copy of the clone, and the file of the commands it gave."""
    clone, commands = tmp_path / "a clone", tmp_path / "commands"
    shutil.copytree(ROOT / "launch", clone / "launch")
    for name in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, clone / name)
    python = tmp_path / "python"
    python.write_text(INTERPRETER)
    python.chmod(0o755)

    def run(script, *args, **env):
        commands.write_text("")
        result = subprocess.run(
            ["bash", f"{clone}/launch/{script}", *args],
            cwd=clone,
            env={"PATH": os.environ["PATH"], "PYTHON": str(python), "COMMANDS": str(commands), **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return result, commands.read_text().splitlines()

    run.clone = clone
    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_every_script_is_clean_under_shellcheck():
    if shutil.which("shellcheck") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("shellcheck is missing on a CI machine, where .ci/run installs it")
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    result = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_programs_and_configs_of_the_quickstart_exist():
    text = (ROOT / "launch" / "quickstart.sh").read_text()
    programs = re.findall(r"-m triqdef_jax\.(\w+)", text)
    assert set(programs) == {"train", "evaluate"}
    for name in programs:
        source = (ROOT / "triqdef_jax" / f"{name}.py").read_text()
        assert "entry.run_program(main)" in source
        assert name == "train" or 'DEFINE_list("workdirs"' in source
    assert all((ROOT / "configs" / config.partition(":")[0]).is_file() for config in CONFIGS)


def test_quickstart_makes_an_environment_and_trains_and_evaluates_three_methods(launch):
    result, commands = launch("quickstart.sh", "--config.train.epochs=3")
    assert result.returncode == 0, result.stderr
    venv, install, *programs = commands
    assert venv == f"-m venv {launch.clone}/.venv"
    assert install.startswith("-m pip install") and install.endswith(f"{launch.clone}/requirements.txt")
    trainings = [
        f"-m triqdef_jax.train --config={launch.clone}/configs/{config} --workdir={workdir} --config.train.epochs=3"
        for config, workdir in zip(CONFIGS, WORKDIRS, strict=True)
    ]
    assert programs == [*trainings, EVALUATE]
    assert result.stdout == f"table of --workdirs={','.join(WORKDIRS)}\n"


def test_a_second_quickstart_installs_and_evaluates_nothing_but_prints_the_table(launch):
    first, _ = launch("quickstart.sh")
    second, commands = launch("quickstart.sh")
    assert second.returncode == 0
    assert [command.split()[1] for command in commands] == ["triqdef_jax.train"] * 3
    assert second.stdout == first.stdout != ""


def test_a_run_that_was_deleted_and_trained_anew_is_evaluated_again(launch):
    launch("quickstart.sh")
    shutil.rmtree(launch.clone / "runs/digits-qat")
    os.utime(launch.clone / "runs/quickstart.txt", (0, 0))  # long ago, whatever the clock's resolution
    _, commands = launch("quickstart.sh")
    assert commands[-1] == EVALUATE


@pytest.mark.parametrize("fail_at", ["pip install", "digits.py:patch_ce", "triqdef_jax.evaluate"])
def test_quickstart_stops_at_what_fails_and_later_continues_there(launch, fail_at):
    result, commands = launch("quickstart.sh", FAIL_AT=fail_at)
    assert result.returncode == 1 and fail_at in commands[-1]
    result, commands = launch("quickstart.sh")
    assert result.returncode == 0
    assert any(fail_at in command for command in commands) and commands[-1] == EVALUATE


def test_quickstart_puts_everything_it_makes_into_its_directory(launch, tmp_path):
    before = sorted(launch.clone.rglob("*"))
    result, commands = launch("quickstart.sh", QUICKSTART_DIR=str(tmp_path / "scratch" / "me"))
    assert result.returncode == 0, result.stderr
    assert commands[0] == f"-m venv {tmp_path}/scratch/me/.venv"
    assert (tmp_path / "scratch/me/runs/quickstart.txt").is_file()
    assert sorted(launch.clone.rglob("*")) == before


def test_changed_requirements_are_installed(launch):
    launch("quickstart.sh")
    with (launch.clone / "requirements.txt").open("a") as file:
        file.write("einops\n")
    _, commands = launch("quickstart.sh")
    assert commands[1].startswith("-m pip install")


def test_the_page_on_launchers_names_what_exists():
    text = (ROOT / "launch" / "README.md").read_text()
    assert {path.name for path in (ROOT / "launch").iterdir()} >= set(re.findall(r"launch/([\w.]+)", text))
    assert set(re.findall(r"-m triqdef_jax\.(\w+)", text)) == {"train", "doctor"}
    for file, variant in re.findall(r"--config=configs/(\w+\.py):?(\w*)", text):
        spec = importlib.util.spec_from_file_location("config", ROOT / "configs" / file)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        module.get_config(variant)  # raises where there is no such variant


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_an_old_or_missing_python_is_told_in_one_line(launch, tmp_path, script):
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.10.12 && exit 0\nexit 1\n')
    old.chmod(0o755)
    for python, said in ((str(old), "Python 3.11 or newer is needed"), ("no-such-python", "no no-such-python here")):
        result, commands = launch(script, PYTHON=python)
        assert result.returncode == 2 and commands == []
        assert said in result.stderr and result.stderr.count("\n") == 1


def test_the_test_script_lints_then_tests_with_the_callers_arguments(launch):
    result, commands = launch("test.sh", "tests/config_test.py", "-k", "refuses")
    assert result.returncode == 0, result.stderr
    assert commands[1].endswith(f"{launch.clone}/requirements-dev.txt")
    *lint, test = commands[2:]
    assert [command.split()[1] for command in lint] == ["ruff", "ruff"]
    assert test == "-m pytest -n 2 --dist loadfile tests/config_test.py -k refuses"


@pytest.mark.parametrize("fail_at", ["ruff check", "ruff format", "pytest"])
def test_the_test_script_fails_where_a_check_fails(launch, fail_at):
    result, commands = launch("test.sh", FAIL_AT=fail_at)
    assert result.returncode == 1 and fail_at in commands[-1]
