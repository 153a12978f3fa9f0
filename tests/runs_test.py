"""Run directories: who may use one, what they are called, what is read back."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from triqdef_jax import runs
from triqdef_jax.models.multibit import take


def test_a_workdir_is_named_after_config_and_variant():
    assert str(runs.default_workdir("configs/digits.py", "", [])) == "runs/digits"
    name = runs.default_workdir("configs/ablations.py", "no_fdp,dataset=cifar10:resnet20", ["data.dir"])
    assert str(name) == "runs/ablations-no_fdp-dataset-cifar10-resnet20"


def test_an_override_that_changes_the_run_needs_a_name():
    with pytest.raises(ValueError, match=r"--config.optim.lr changes the run digits: name a directory .*--workdir"):
        runs.default_workdir("configs/digits.py", "", ["data.dir", "optim.lr"])


def test_a_workdir_opens_again_for_its_own_config_and_for_no_other(tmp_path, tiny_config):
    runs.open_workdir(tmp_path / "run", tiny_config())
    before = (tmp_path / "run" / runs.CONFIG_FILE).read_bytes()
    runs.open_workdir(tmp_path / "run", tiny_config(**{"data.dir": "elsewhere"}))  # where data lie is free
    with pytest.raises(ValueError, match="seed is 0 there and 3 here; name another --workdir"):
        runs.open_workdir(tmp_path / "run", tiny_config(seed=3))
    assert (tmp_path / "run" / runs.CONFIG_FILE).read_bytes() == before


def test_a_folder_with_foreign_files_is_not_taken(tmp_path, tiny_config):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files but no config.json"):
        runs.open_workdir(tmp_path, tiny_config())
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_config_reads_back_with_its_types(tmp_path, tiny_config):
    config = tiny_config()
    runs.open_workdir(tmp_path / "run", config)
    assert runs.read_config(tmp_path / "run").to_dict() == config.to_dict()


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"no_such_group": 1})])
def test_a_damaged_config_is_refused_in_one_line(tmp_path, text):
    (tmp_path / runs.CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError) as error:
        runs.read_config(tmp_path)
    assert "config.json cannot be read" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run in .*; train first"):
        runs.load_trained(tmp_path)


def test_a_run_without_a_checkpoint_is_refused(tmp_path, tiny_config):
    runs.open_workdir(tmp_path, tiny_config())
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        runs.load_trained(tmp_path)


def test_a_trained_network_answers_at_trained_and_at_other_bit_widths(tiny_run):
    trained = runs.load_trained(tiny_run[0])
    images = np.random.default_rng(0).uniform(size=(8, 8, 8, 3)).astype(np.float32)
    assert trained.step == 8
    logits = trained.logits_fn(4)(images)
    assert logits.shape == (8, 10) and np.isfinite(logits).all()
    mine = trained.variables(4)
    np.testing.assert_array_equal(
        jax.tree.leaves(mine["affine"])[0], jax.tree.leaves(take(trained.weights.affine, 1))[0]
    )
    other = trained.variables(3, images)
    assert jax.tree.structure(other) == jax.tree.structure(mine)


def test_a_checkpoint_is_found_by_name_or_step_and_its_results_lie_apart(tiny_run, tmp_path, tiny_config):
    workdir, _ = tiny_run
    assert runs.find_step(workdir, "last") is None and runs.load_trained(workdir).results == "results"
    best, earlier = runs.load_trained(workdir, "best"), runs.load_trained(workdir, "4")
    assert (best.step, best.results) == (
        8,
        "results/step8",
    )  # the only one that was judged: 4 is the entry of the last stage
    assert (earlier.step, earlier.results) == (4, "results/step4")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 in .*steps there: \[8, 4, 0\]"):
        runs.load_trained(workdir, "5")
    for wrong in ("newest", "-1", ""):
        with pytest.raises(ValueError, match="checkpoint must be last, best or a step, got "):
            runs.find_step(workdir, wrong)
    runs.open_workdir(tmp_path / "run", tiny_config())
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint in .* was judged on held-out images.*use last or a step"
    ):
        runs.load_trained(tmp_path / "run", "best")


def test_a_checkpoint_of_one_process_is_read_by_another(tiny_run):
    script = (
        "import sys, numpy as np, small_networks; from triqdef_jax import runs; small_networks.register(); "
        "t = runs.load_trained(sys.argv[1]); print(float(t.logits_fn(32)(np.zeros((1, 8, 8, 3), np.float32)).sum()))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tiny_run[0])]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    mine = float(runs.load_trained(tiny_run[0]).logits_fn(32)(np.zeros((1, 8, 8, 3), np.float32)).sum())
    assert float(out.stdout) == mine
