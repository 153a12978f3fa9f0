"""The cache of compiled programs: on by itself, where the user wants it, and never in the way."""

import os
import pathlib
import subprocess
import sys

import pytest

from triqdef_jax import compile_cache

ROOT = pathlib.Path(__file__).resolve().parent.parent

PROGRAM = """
import sys
if sys.argv[1] == "early":
    import jax
from triqdef_jax import entry

def main(argv):
    import jax, jax.numpy as jnp
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("cache_hits")))
    results = []
    for _ in range(2):
        jax.clear_caches()
        results.append(float(jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((1, 3)))[0, 0]))
    print(sum(hits) > 0, results[0] == results[1])

entry.run_program(main, positional=True)
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Nothing chosen yet, and a home of the test's own."""
    for name in (compile_cache.VARIABLE, compile_cache.SWITCH, compile_cache.FROM_S, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_the_cache_lies_in_the_users_cache_directory_which_only_the_user_may_write(tmp_path, monkeypatch):
    folder = tmp_path / ".cache" / "triqdef_jax" / "compiled"
    assert compile_cache.choose() == {compile_cache.VARIABLE: str(folder), compile_cache.FROM_S: "0.1"}
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compile_cache.choose()[compile_cache.VARIABLE] == str(tmp_path / "xdg" / "triqdef_jax" / "compiled")


def test_what_the_user_set_stays(tmp_path, monkeypatch):
    monkeypatch.setenv(compile_cache.VARIABLE, "mine")
    monkeypatch.setenv(compile_cache.FROM_S, "5")
    assert compile_cache.choose() == {compile_cache.VARIABLE: "mine", compile_cache.FROM_S: "5"}
    assert not list(tmp_path.iterdir())


def test_turned_off_or_without_a_place_nothing_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv(compile_cache.SWITCH, "False")
    assert compile_cache.choose() == {} and not list(tmp_path.iterdir())
    monkeypatch.delenv(compile_cache.SWITCH)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compile_cache.choose() == {}


def test_other_programs_inherit_the_users_choice_and_not_the_default(monkeypatch):
    monkeypatch.setenv(compile_cache.VARIABLE, str(compile_cache.default_folder()))
    assert compile_cache.VARIABLE not in compile_cache.inherited()
    monkeypatch.setenv(compile_cache.VARIABLE, "mine")
    assert compile_cache.inherited()[compile_cache.VARIABLE] == "mine"


@pytest.mark.parametrize(
    "imported, cache_home, is_found", [("early", "", True), ("late", "", True), ("late", "file", False)]
)
def test_a_program_finds_what_it_compiled_before_and_runs_as_well_without_a_cache(
    tmp_path, imported, cache_home, is_found
):
    (tmp_path / "file").touch()
    (tmp_path / "program.py").write_text(PROGRAM)
    home = {"XDG_CACHE_HOME": str(tmp_path / cache_home)} if cache_home else {}
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), compile_cache.FROM_S: "0"}
    command = [sys.executable, str(tmp_path / "program.py"), imported]
    done = subprocess.run(command, env={**os.environ, **settings, **home}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{is_found} True\n", "")
