"""`python -m triqdef_jax.train` as users start it: mistakes are one line and harm nothing, a run stops, continues and ends as told."""

import json
import pathlib
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from triqdef_jax import config as config_lib
from triqdef_jax import files, patch_pool, runs, sources
from triqdef_jax.patch_pool import PatchPool

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_CPU_S = 10  # CPU time, because a busy machine stretches the clock


def start(*flags):
    command = [sys.executable, "-m", "triqdef_jax.train", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """(exit code, stdout, stderr) at the end of the program."""
    out, error = process.communicate()
    return process.returncode, out, error


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def refusal(*flags):
    """Run to the refusal; returns its line."""
    before = cpu_seconds()
    code, out, error = finish(start(*flags))
    assert (code, out) == (2, ""), error
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert cpu_seconds() - before < MAX_CPU_S
    return error


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_unknown_field_is_refused(tmp_path):
    error = refusal("--config.optim.lrr=0.1", f"--workdir={tmp_path}/run")
    assert "lrr" in error and 'Did you mean "lr"' in error
    assert not (tmp_path / "run").exists()


def test_an_impossible_combination_is_refused_before_anything_is_written(tmp_path):
    error = refusal("--config.patches.sizes_px=(17,)", f"--workdir={tmp_path}/run")
    assert "patches.sizes_px: a patch of 17 px" in error and "16-px images of digits" in error
    assert not (tmp_path / "run").exists()


def test_steps_to_trace_that_the_run_does_not_have_are_refused_before_anything_is_written(tmp_path):
    error = refusal("--profile_steps=5:4000", f"--workdir={tmp_path}/run")
    assert "--profile_steps must be FIRST:LAST" in error and "got '5:4000'" in error
    assert not (tmp_path / "run").exists()


def test_missing_data_are_refused_with_the_command_that_prepares_them(tmp_path):
    flags = ("--config=configs/cifar10.py", f"--config.data.dir={tmp_path}/data", f"--workdir={tmp_path}/run")
    error = refusal(*flags)
    assert f"cifar10 is not prepared in {tmp_path}/data" in error
    assert "python -m triqdef_jax.prepare_data --dataset=cifar10" in error
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_config_is_refused_and_left_as_it_is(tmp_path):
    held = config_lib.default()
    held.optim.lr = 0.3
    runs.open_workdir(tmp_path, held)
    before = snapshot(tmp_path)
    error = refusal(f"--workdir={tmp_path}")
    assert f"{tmp_path} holds another config: optim.lr is 0.3 there and 0.1 here" in error
    assert snapshot(tmp_path) == before


def test_a_workdir_of_foreign_files_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("chapter one")
    error = refusal(f"--workdir={tmp_path}")
    assert f"{tmp_path} holds files but no config.json" in error
    assert snapshot(tmp_path) == {tmp_path / "thesis.tex": b"chapter one"}


def test_a_workdir_in_which_another_process_trains_is_refused(tmp_path):
    runs.open_workdir(tmp_path, config_lib.default())
    with files.exclusive(tmp_path / runs.LOCK_FILE):
        assert f"another process is at work in {tmp_path}" in refusal(f"--workdir={tmp_path}")


def test_a_damaged_pool_is_refused_and_left_as_it_is(tmp_path):
    config = config_lib.default()
    config.patches.shared_dir = str(tmp_path / "shared")
    request = sources.request(config, 0, config.patches.sizes_px, config.patches.pool_size)
    number, side = request.num_patches, request.canvas_px
    arrays = (np.zeros((number, side, side, 3), np.float32), np.ones((number, side, side), np.float32))
    pool = PatchPool(*arrays, np.full(number, side, np.int32), np.zeros(number, np.int32), digest="")
    folder = tmp_path / "shared" / request.folder_name
    patch_pool.save(folder, request, pool._replace(digest=patch_pool.digest(pool)), [])
    arrays_file = folder / patch_pool.ARRAYS_FILE
    content = bytearray(arrays_file.read_bytes())
    content[len(content) // 2] ^= 1
    arrays_file.write_bytes(content)
    before = snapshot(tmp_path / "shared")
    error = refusal(f"--config.patches.shared_dir={tmp_path}/shared", f"--workdir={tmp_path}/run")
    assert f"patch pool {folder}" in error and f"delete {folder} to have it built again" in error
    assert snapshot(tmp_path / "shared") == before


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("quant.bits", (32, 9), "bits must be 2..8 or 32, got 9"),
        ("quant.bits", (32, 1), "bits must be 2..8 or 32, got 1"),
        ("train.batch_size", 63, "train.batch_size must be divisible by 2"),
        ("patches.sizes_px", (16,), "does not fit into 16-px images"),  # 18 px with scale jitter
    ],
)
def test_other_impossible_values_are_refused_in_one_line(field, value, said):
    config = config_lib.default()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError) as refused:
        config_lib.validate(config)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def short_run(workdir, **changes):
    """Flags of a run of 64 steps on real digits."""
    fields = {
        "quant.bits": "(32,)",
        "bact.starts": "()",
        "model.width": "2",
        "data.image_size_px": "8",
        "patches.sizes_px": "(2,)",
        "patches.unseen_sizes_px": "(3,)",
        "data.train_images": "256",
        "train.batch_size": "32",
        "train.epochs": "8",
        "train.log_every_steps": "1",
    }
    flags = [f"--config.{name}={value}" for name, value in (fields | changes).items()]
    return ["--config=configs/digits.py:qat", f"--workdir={workdir}", *flags]


def test_a_preempted_run_says_where_it_is_and_the_same_command_ends_it_once(tmp_path):
    process = start(*short_run(tmp_path))
    assert any("step 3/64" in line for line in process.stderr)  # the progress, line by line
    process.send_signal(signal.SIGTERM)
    code, out, error = finish(process)
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert (code, out) == (42, "")
    assert error.endswith(f"preempted: step {saved} of 64 is saved in {tmp_path}; the same command continues\n")
    assert 3 <= saved < 64

    code, out, error = finish(start(*short_run(tmp_path)))
    assert (code, out) == (0, f"finished: 64 steps in {tmp_path}\n")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 65))

    before = snapshot(tmp_path)
    code, out, error = finish(start(*short_run(tmp_path)))
    assert (code, out, error) == (0, f"finished: 64 steps in {tmp_path}\n", "")
    assert snapshot(tmp_path) == before


def test_a_run_that_diverges_fails_in_one_line_that_names_step_and_checkpoint(tmp_path):
    code, out, error = finish(start(*short_run(tmp_path, **{"optim.lr": "1e30"})))
    assert (code, out) == (1, "")
    last = error.splitlines()[-1]
    assert last.startswith(
        "error: the loss or its gradient is not finite at step 2; the last good checkpoint is step 0"
    )
    assert "Traceback" not in error
