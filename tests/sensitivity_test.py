"""The grid: which points it has, that each is trained once and measured as evaluation measures, and that it continues where it stopped."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from triqdef_jax import config as config_lib
from triqdef_jax import data, grids, inference, loop, patch_pool, runs, sensitivity, sources, targets
from triqdef_jax.patch_pool import PatchPool

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIELDS = {
    "data.image_size_px": 8,
    "data.train_images": 136,
    "model.width": 2,
    "quant.bits": (4,),
    "bact.starts": (),
    "loss.method": "patch_ce",
    "loss.feature_layers": (),
    "train.batch_size": 34,
    "train.epochs": 2,
    "patches.sizes_px": (3,),
    "patches.unseen_sizes_px": (2,),
    "patches.pool_size": 8,
    "eval.images": 40,
    "eval.batch_size": 16,
}


def make_config(shared_dir="nowhere", **changes):
    config = config_lib.default()
    config.update_from_flattened_dict(FIELDS | {"model.name": "tiny", "patches.shared_dir": str(shared_dir)} | changes)
    return config


def put_pool(config):
    """Put a pool of random patches where the run looks for its own, so that no source network is trained for it."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (8, 3, 3, 3)).astype(np.float32) / 255
    pool = PatchPool(values, np.ones((8, 3, 3), np.float32), np.full(8, 3, np.int32), np.arange(8, dtype=np.int32), "")
    request = sources.request(config, 0, (3,), 8)
    folder = pathlib.Path(config.patches.shared_dir) / request.folder_name
    patch_pool.save(folder, request, pool._replace(digest=patch_pool.digest(pool)), [])


class InterruptedData:
    """Data that send SIGTERM to this process with the second batch."""

    def __init__(self, loaded):
        self.loaded = loaded

    def __getattr__(self, name):
        return getattr(self.loaded, name)

    def train_batches(self, *, start_step, **settings):
        for step, batch in enumerate(self.loaded.train_batches(start_step=start_step, **settings), start_step):
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, points, root, data, record) of a grid of two points whose first run was interrupted."""
    root = tmp_path_factory.mktemp("grid")
    config = make_config(root / "shared")
    put_pool(config)
    loaded = data.load(config.data)
    points = sensitivity.make_points(config, "lambda_adv=1.0:2.0")
    with pytest.raises(loop.PreemptedError, match=r"preempted: step 2 of 8 of base is saved in .*the same command"):
        sensitivity.run_grid(config, points, root, InterruptedData(loaded), is_quiet=True)
    assert not (root / "results" / sensitivity.FILE).exists()
    said = []
    record = sensitivity.run_grid(config, points, root, loaded, progress=said.append, is_quiet=True)
    assert said == ["point 1 of 2: base", "point 2 of 2: loss.lambda_adv 2.0"]
    return config, points, root, loaded, record


def test_every_point_is_a_run_of_its_own_that_differs_in_the_named_field(finished):
    _, points, root, _, record = finished
    assert record["num_planned"] == 2 and [p["changes"] for p in record["points"]] == [{}, {"loss.lambda_adv": 2.0}]
    held = [runs.read_config(point.workdir(root)) for point in points]
    assert [c.loss.lambda_adv for c in held] == [1.0, 2.0]
    assert [runs.load_trained(point.workdir(root)).step for point in points] == [8, 8]
    assert len({p["digest"] for p in record["points"]}) == 1  # both met the same patches


def test_the_record_on_disk_is_the_one_returned_and_the_table_shows_it(finished):
    _, _, root, _, record = finished
    assert json.loads((root / "results" / sensitivity.FILE).read_text()) == record
    text = sensitivity.table(record)
    for point in record["points"]:
        for field in ("clean_accuracy", "success"):
            assert f"{100 * point[field]['4']['rate']:.1f} [" in text
    assert "base " in text and "loss.lambda_adv 2.0 " in text
    assert record["against_seeds"] == {"num_seeds": 1} and text.startswith("No seed of the base stands beside the grid")
    three = [record["points"][0] | {"changes": changes} for changes in ({}, {"seed": 1}, {"seed": 2})]
    certain = {"rate": 1.0, "low": 1.0, "high": 1.0, "num": 1, "den": 1}
    points = [*three, record["points"][1] | {"clean_accuracy": {"4": certain}}]
    starred = sensitivity.table(record | {"points": points, "against_seeds": grids.against_seeds(points)})
    assert "100.0 [100.0, 100.0]*" in starred and starred.count("*") == 1


def test_rates_are_counts_of_the_networks_predictions_on_the_pasted_images(finished):
    config, points, root, loaded, record = finished
    trained = runs.load_trained(points[1].workdir(root))
    target = targets.make(trained, loaded, "4")
    images, labels = loaded.test.images[:40], loaded.test.labels[:40]
    pool = sources.train_pool(config, loaded).split()[1]
    right = target.predict(images) == labels
    num = den = 0
    for index, target_class in enumerate(pool.target):
        pasted = np.asarray(inference.make_paste(pool._asdict(), index, trained.config)(images, np.arange(40)))
        counts = right & (labels != target_class)
        num, den = num + (counts & (target.predict(pasted) != labels)).sum(), den + counts.sum()
    measured = record["points"][1]
    assert (measured["success"]["4"]["num"], measured["success"]["4"]["den"]) == (num, den)
    assert (measured["clean_accuracy"]["4"]["num"], measured["clean_accuracy"]["4"]["den"]) == (right.sum(), 40)


def test_a_finished_grid_is_read_and_not_trained_again(finished):
    config, points, root, loaded, record = finished
    before = {path: path.stat().st_mtime_ns for path in (root / "points").rglob("*")}
    assert sensitivity.run_grid(config, points, root, loaded, is_quiet=True) == record
    assert {path: path.stat().st_mtime_ns for path in (root / "points").rglob("*")} == before


def test_a_point_that_diverges_is_told_and_does_not_end_the_grid(finished, tmp_path):
    config, _, _, loaded, _ = finished
    points = sensitivity.make_points(config, "lambda_adv=1e38")[1:]
    record = sensitivity.run_grid(config, points, tmp_path, loaded, is_quiet=True)
    assert "the loss or its gradient is not finite at step" in record["points"][0]["failed"]
    assert record["points"][0]["success"] == {} and "not finite" in sensitivity.table(record)


def changes(grid, **fields):
    config = make_config(**{"loss.method": "triqdef", "loss.feature_layers": ("stage1",)} | fields)
    return [point.changes for point in sensitivity.make_points(config, grid)]


def test_axes_joined_by_a_star_are_crossed_and_others_stand_alone():
    found = changes("alpha=0.0:1.0,beta=2.0*reduction=mean:sum")
    assert found == [
        {},
        {"loss.alpha": 0.0},
        {"loss.alpha": 1.0},
        {"loss.beta": 2.0},
        {"loss.beta": 2.0, "loss.reduction": "sum"},
    ]


def test_values_equal_to_the_base_are_the_base_and_no_point_comes_twice():
    assert changes("alpha=0.5,beta=1.0,alpha=0.5:0.7,alpha=0.7*beta=1.0") == [{}, {"loss.alpha": 0.7}]


def test_the_whole_grid_changes_every_axis_alone():
    whole = {"train.batch_size": 32}  # divisible by 4, which a quarter of patched images asks for
    found = changes("all", **whole)
    assert all(len(change) <= 1 for change in found)
    fields = {field for change in found for field in change}
    assert fields == {field for field, _ in sensitivity.AXES.values()}
    assert len(found) == 1 + sum(len(values) - 1 for _, values in sensitivity.AXES.values())
    without = changes("all", **whole, **{"loss.method": "patch_ce"})
    assert {field for change in without for field in change} == {"loss.lambda_adv", "loss.patched_frac", "seed"}


@pytest.mark.parametrize(
    "grid, method, message",
    [
        ("gamma", "triqdef", "--grid: an axis is one of alpha, beta, .*, seed, got 'gamma'"),
        ("", "triqdef", "--grid: an axis is one of .* got ''"),
        ("alpha=much", "triqdef", "--grid: alpha takes values of type float joined by colons, got 'much'"),
        ("alpha*alpha=1.0", "triqdef", r"--grid: alpha\*alpha=1.0 names an axis twice"),
        ("reduction=median", "triqdef", "--grid: the point loss.reduction median: loss.reduction must be one of"),
        ("rho=0.25", "triqdef", "--grid: the point loss.patched_frac 0.25: train.batch_size must be divisible by 4"),
        ("alpha", "patch_ce", "--grid: alpha changes nothing under loss.method=patch_ce; leave it out"),
        ("rho", "qat", "--grid: rho changes nothing under loss.method=qat"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused_in_one_line(grid, method, message):
    with pytest.raises(ValueError, match=message) as error:
        changes(grid, **{"loss.method": method})
    assert "\n" not in str(error.value)


def program(*options):
    flags = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    command = [sys.executable, "-m", "triqdef_jax.sensitivity", "--config=configs/digits.py", *flags, *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_program_refuses_a_bad_grid_with_exit_code_2_and_writes_nothing(tmp_path):
    process = program("--grid=gamma", f"--workdir={tmp_path}/grid")
    out, error = process.communicate()
    assert (process.returncode, out, error.count("\n")) == (2, "", 1)
    assert error.startswith("error: --grid: an axis is one of") and not (tmp_path / "grid").exists()


@pytest.mark.parametrize("delay_s", [0.0, 1.5])  # at once, and while programs are compiled
def test_a_preempted_program_exits_with_42_and_says_how_to_continue(tmp_path, delay_s):
    put_pool(make_config(tmp_path / "shared", **{"model.name": "resnet8"}))
    options = ("--grid=lambda_adv", f"--workdir={tmp_path}/grid", f"--config.patches.shared_dir={tmp_path}/shared")
    process = program(*options)
    assert any("point 1 of 3: base" in line for line in process.stderr)
    time.sleep(delay_s)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate()
    assert (process.returncode, out) == (42, ""), error
    assert error.splitlines()[-1].endswith("the same command continues")
