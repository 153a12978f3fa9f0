"""Programs end as they should: one line and 2 for the user's mistakes, a traceback and 1 for ours."""

import pathlib
import subprocess
import sys

import pytest

from triqdef_jax import entry

ROOT = pathlib.Path(__file__).resolve().parent.parent

PROGRAM = '''
"""A program."""
import sys
import threading
from absl import flags
from triqdef_jax import entry

CONFIG, WORKDIR = entry.define_config_flags("conf.py")
MODE = flags.DEFINE_string("mode", "", "What to do.")

def main(argv):
    if MODE.value == "validation":
        with entry.user_errors():
            raise ValueError("bits must lie\\n   in 2..8")
    if MODE.value == "missing data":
        raise FileNotFoundError("no data: run prepare_data")
    if MODE.value == "bug":
        raise ValueError("from the depth")
    if MODE.value == "system":
        open("/does/not/exist")
    if MODE.value == "full disk":
        open("/dev/full", "wb", buffering=0).write(b"x")
    if MODE.value == "interrupt":
        raise KeyboardInterrupt
    if MODE.value == "exit":
        sys.exit(7)
    if MODE.value == "preempted":
        threading.Thread(target=threading.Event().wait).start()  # which never ends
        return 42
    print(CONFIG.value.optim.lr, entry.config_overrides(CONFIG), entry.config_source(CONFIG), "jax" in sys.modules)

if __name__ == "__main__":
    entry.run_program(main)
'''

CONFIG = """
from ml_collections import ConfigDict

def get_config(variant=""):
    if variant == "broken":
        return undefined_name
    if variant not in ("", "small"):
        raise ValueError(f"unknown variant {variant!r}; known: small")
    return ConfigDict({"optim": {"lr": 0.1}, "epochs": 3})
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("program")
    (folder / "prog.py").write_text(PROGRAM)
    (folder / "conf.py").write_text(CONFIG)

    def run(*args):
        return subprocess.run(
            [sys.executable, "prog.py", *args],
            cwd=folder,
            env={"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.mark.parametrize(
    "args, said",
    [
        (["--config.optim.lrr=1"], ["lrr", 'Did you mean "lr"']),
        (["--config.epochs=1.5"], ["--config.epochs=1.5", "int()"]),
        (["--config=nowhere.py"], ["no such config file: nowhere.py"]),
        (["--config=nowhere.py", "--config.epochs=1"], ["no such config file: nowhere.py"]),
        (["--config=conf.py:huge"], ["unknown variant 'huge'; known: small"]),
        (["--config=conf.py:broken"], ["NameError", "undefined_name", "conf.py line 6"]),
        (["--config.epochs=1", "--config=conf.py"], ["before a value for --config"]),
        (["--config.optim={'lr': 1.0}"], ["--config.optim is a group of fields"]),
        (["--confg=conf.py"], ["'confg'", "Did you mean"]),
        (["config.epochs=1"], ["unexpected argument 'config.epochs=1'"]),
        (["--mode=validation"], ["bits must lie in 2..8"]),
        (["--mode=missing data"], ["no data: run prepare_data"]),
        (["--mode=full disk"], ["No space left on device; make room or access, then run the same command again"]),
    ],
)
def test_a_mistake_of_the_user_is_one_line_and_exit_code_2(program, args, said):
    result = program(*args)
    assert result.returncode == entry.EXIT_USER_ERROR
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in said), result.stderr


@pytest.mark.parametrize(
    "mode, said",
    [
        ("bug", "ValueError: from the depth"),
        ("system", "FileNotFoundError: [Errno 2]"),
    ],
)
def test_a_bug_keeps_its_traceback_and_exits_1(program, mode, said):
    result = program(f"--mode={mode}")
    assert result.returncode == entry.EXIT_FAILED
    assert "Traceback" in result.stderr and said in result.stderr


@pytest.mark.parametrize("mode, code", [("interrupt", 130), ("exit", 7), ("preempted", 42)])
def test_exit_codes_reach_the_shell(program, mode, code):
    result = program(f"--mode={mode}")
    assert result.returncode == code
    assert "Traceback" not in result.stderr


def test_the_default_config_takes_overrides_and_nothing_heavy_is_imported(program):
    result = program("--config.optim.lr=1")
    assert result.returncode == 0
    assert result.stdout == "1.0 ['optim.lr'] ('conf.py', '') False\n"


def test_the_variant_and_a_flag_given_as_two_words_are_understood(program):
    result = program("--config", "conf.py:small", "--config.epochs", "5")
    assert result.stdout == "0.1 ['epochs'] ('conf.py', 'small') False\n"


def test_help_lists_the_flags_under_the_program_and_exits_0(program):
    result = program("--help")
    assert result.returncode == 0
    assert "prog.py:" in result.stdout and "--workdir" in result.stdout and "--mode" in result.stdout


def test_user_errors_say_which_file_an_operating_system_error_is_about():
    with pytest.raises(entry.UserError, match=r"^No such file or directory: /does/not/exist$"), entry.user_errors():
        open("/does/not/exist")


def test_user_errors_leave_bugs_of_other_kinds_alone():
    with pytest.raises(KeyError), entry.user_errors():
        raise KeyError("x")
