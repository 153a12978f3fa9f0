"""The program: one line and 2 for mistakes, a finished study printed again without training, a failing run that stops no other."""

import os
import pathlib
import subprocess
import sys
import types

import pytest
import study_example as example

from triqdef_jax import compare, entry, files, loop, runs, sources
from triqdef_jax.studies import plan, tasks

ROOT = pathlib.Path(__file__).resolve().parent.parent
OPTIONS = {"study": "", "preset": "", "workdir": "", "seeds": [], "processes": 1, "only_patches": False}


def start(monkeypatch, **options):
    """Run the program in this process; returns its exit code."""
    monkeypatch.setattr(compare.flags, "FLAGS", types.SimpleNamespace(**(OPTIONS | options)))
    return compare.main([])


def prepare(folder, fields=example.ENTRIES):
    """Write a study whose every program but those of `broken` has ended; returns (path, directory, plans)."""
    source, root = example.write_study(folder, fields), folder / "work"
    study = plan.load(source)
    plans = plan.make_runs(study, source, root)
    planned = compare.make_tasks(study, source, plans, root)
    planned[0].product.mkdir(parents=True)
    for one in plans:
        if one.name != "broken":
            example.write_run(one)
            runs_config = one.workdir / runs.CONFIG_FILE
            files.atomic_write_json(runs_config, one.config)
    done = [task for task in planned if not task.name.endswith("broken")]
    state = {task.name: {"identity": task.identity, "is_done": True, "wall_s": 60.0, "cpu_s": 50.0} for task in done}
    files.atomic_write_json(root / tasks.STATE_FILE, state)
    return source, root, plans


def test_a_finished_study_is_printed_again_without_starting_a_program(tmp_path, monkeypatch, capsys):
    source, root, _ = prepare(tmp_path)
    monkeypatch.setattr(tasks.subprocess, "Popen", None)  # a start would fail
    assert start(monkeypatch, study=source, workdir=str(root)) == 0
    first = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
    printed = capsys.readouterr().out
    assert "Table 4: clean accuracy" in printed and "triqdef" in printed and "written to" in printed
    assert {"study.json", "comparison.html", "comparison.md", "comparison.tex", "report.html"} <= first.keys()
    assert start(monkeypatch, study=source, workdir=str(root)) == 0
    assert {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()} == first
    assert capsys.readouterr().out == printed


def test_a_run_that_fails_is_told_in_one_line_and_the_others_are_compared(tmp_path, monkeypatch, capsys):
    fields = example.ENTRIES[:-1] + ', Entry(name="broken", config="conf.py:patch_ce"))'
    source, root, plans = prepare(tmp_path, fields)
    plans[-1].workdir.mkdir()
    (plans[-1].workdir / "thesis.tex").write_text("chapter one")  # which `train` refuses to write into
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert start(monkeypatch, study=source, workdir=str(root)) == entry.EXIT_FAILED
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("error:")]
    assert line.startswith("error: train broken failed: error: ") and "holds files but no config.json" in line
    assert "Table 4: clean accuracy" in said.out and "broken has no figures: train: failed" in said.out
    assert "triqdef_jax.train" in tasks.log_path(root, "train broken").read_text()


def test_the_study_of_the_documentation_is_one(tmp_path):
    text = (compare.CONFIGS.parent / "docs" / "studies.md").read_text()
    for config in compare.CONFIGS.glob("*.py"):
        (tmp_path / config.name).symlink_to(config)
    (tmp_path / "mine.py").write_text(text.partition("```python\n")[2].partition("```")[0])
    study = plan.load(str(tmp_path / "mine.py"))
    runs = plan.make_runs(study, str(tmp_path / "mine.py"), tmp_path / "work")
    assert [(run.name, run.config.loss.method) for run in runs] == [
        ("triqdef", "triqdef"),
        ("qat", "qat"),
        ("no_fdp", "triqdef"),
    ]
    assert all(tuple(run.config.quant.bits) == (32, 4) for run in runs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "name one study"),
        ({"study": "a.py", "preset": "smoke"}, "name one study"),
        ({"study": "none.py"}, "no such study file: none.py"),
        ({"preset": "none"}, "--preset must be one of cifar10, digits, smoke, got 'none'"),
        ({"study": "{study}", "seeds": ["1", "x"]}, "--seeds takes different whole numbers"),
        ({"study": "{study}", "seeds": ["1", "1"]}, "--seeds takes different whole numbers"),
        ({"study": "{study}", "processes": 0}, "--processes must be at least 1"),
    ],
)
def test_bad_flags_are_refused_and_nothing_is_written(tmp_path, monkeypatch, options, words):
    source = example.write_study(tmp_path / "study")
    options = {k: v.format(study=source) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(entry.UserError) as error:
        start(monkeypatch, workdir=str(tmp_path / "work"), **options)
    assert words in str(error.value) and not (tmp_path / "work").exists()


def test_the_shell_gets_one_line_and_exit_code_two(tmp_path):
    command = [sys.executable, "-m", "triqdef_jax.compare", "--study=none.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: no such study file: none.py\n")


def test_a_study_lies_where_its_name_says():
    assert compare.default_workdir("configs/study_digits.py:pools") == pathlib.Path("runs/studies/digits-pools")
    assert compare.default_workdir("mine.py") == pathlib.Path("runs/studies/mine")
    assert compare.find_study("", "digits:pools") == f"{ROOT}/configs/study_digits.py:pools"


def test_programs_are_those_that_a_user_would_start(tmp_path):
    fields = f'{example.ENTRIES}, seeds=(0, 2), defenses=("median", "tv"), defended=("other",)'
    source = example.write_study(tmp_path, fields)
    study = plan.load(source)
    planned = compare.make_tasks(study, source, plan.make_runs(study, source, tmp_path / "study"), tmp_path / "study")
    assert [task.name for task in planned[:3]] == ["patches", "train triqdef", "train other"] and len(planned) == 10
    by_name = {task.name: task for task in planned}
    assert by_name["patches"].command[3:] == (
        f"--study={source}",
        "--seeds=0,2",
        f"--workdir={tmp_path}/study",
        "--only_patches",
    )
    train = by_name["train other-seed2"]
    assert train.command[2:4] == ("triqdef_jax.train", f"--config={tmp_path}/conf.py:qat")
    assert train.command[4:] == ("--config.seed=2", f"--workdir={tmp_path}/study/runs/other-seed2")
    assert by_name["evaluate other"].command[-2:] == ("--preset=quick", "--defenses=median,tv")
    assert by_name["evaluate triqdef"].command[-1] == "--preset=quick"
    assert by_name["evaluate triqdef"].needs == ("train triqdef",) and train.needs == ("patches",)
    timed = by_name["latency"]
    assert timed.command[2:] == (
        "triqdef_jax.benchmark",
        "--what=defenses",
        f"--config={tmp_path}/conf.py",
        "--config.seed=0",
        f"--out={timed.product}",
    )


def test_shared_patches_are_made_once_per_seed_and_their_failures_keep_their_codes(tmp_path, monkeypatch, capsys):
    source = example.write_study(tmp_path, f"{example.ENTRIES}, seeds=(0, 2)")
    made = []
    monkeypatch.setattr(sources, "eval_pools", lambda config, data: made.append((config.seed, data.num_train)))
    assert start(monkeypatch, study=source, only_patches=True) == 0 and made == [(0, 256), (2, 256)]
    for error, code in ((loop.PreemptedError, 42), (loop.NonFiniteLossError, 1)):

        def fail(config, data, error=error):
            raise error("so it went")

        monkeypatch.setattr(sources, "eval_pools", fail)
        assert start(monkeypatch, study=source, only_patches=True) == code
        assert "so it went" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["smoke", "digits", "cifar10"])
def test_the_studies_of_this_project_are_fair_and_of_all_methods(tmp_path, name):
    from triqdef_jax.objectives.methods import METHODS

    source = compare.find_study("", name)
    study = plan.load(source)
    plans = plan.make_runs(study, source, tmp_path)
    assert {one.config.loss.method for one in plans} == set(METHODS)
    assert bool(study.label) == (name == "smoke")
    assert {one.config.data.name for one in plans} == {"digits" if name == "smoke" else name}
