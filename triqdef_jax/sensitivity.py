"""Do the method's own numbers matter? `python -m triqdef_jax.sensitivity --config=configs/digits.py [--grid=GRID] --workdir=runs/sensitivity`.

Trains the config, the base, and the config with fields changed, each point as an ordinary run in `<workdir>/points`, and measures clean accuracy
and the success of held-out pool patches per trained bit-width, on the same images. GRID is SWEEP[,SWEEP...]; a sweep is one axis, changed alone, or
axes joined by `*`, all combinations; an axis is NAME or NAME=VALUE[:VALUE...]:

    --grid=all                                     the default: every axis with its own values, one at a time
    --grid=lambda_fdp,reduction*lambda_gpdp=0.5:5.0

The axis `seed` trains the base with other seeds, source networks and patches included: differences between points that are no larger than those
between seeds say nothing. The whole grid of digits has 24 points of 3.5 minutes each on one core of an x86 CPU. Finished points are kept, so the
same command continues. Exit codes as of `train`. Writes `<workdir>/results/sensitivity.json` after every point, and `sensitivity.txt`, the
table it prints.
"""

import contextlib
import importlib.metadata
import itertools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from triqdef_jax import config as config_lib
from triqdef_jax import data as data_lib
from triqdef_jax import entry, files, grids, inference, loop, probes, processes, results, runs, sources, targets

FILE, TABLE_FILE, POINT_FILE = "sensitivity.json", "sensitivity.txt", "point.json"
ALL, POOL = "all", "held-out"
AXES: dict[str, tuple[str, tuple]] = {
    "alpha": ("loss.alpha", (0.0, 0.25, 0.5, 1.0)),
    "beta": ("loss.beta", (0.0, 0.5, 1.0, 2.0)),
    "lambda_adv": ("loss.lambda_adv", (0.5, 1.0, 2.0)),
    "lambda_fdp": ("loss.lambda_fdp", (0.0, 0.4, 0.8, 1.6, 8.0)),
    "lambda_gpdp": ("loss.lambda_gpdp", (0.0, 0.25, 0.5, 1.0, 5.0)),
    "rho": ("loss.patched_frac", (0.25, 0.5, 0.75)),
    "reduction": ("loss.reduction", ("mean", "sum")),
    "map_reduction": ("loss.map_reduction", ("mean", "max", "per_channel")),
    "seed": ("seed", (0, 1, 2)),
}
OF_PENALTIES = ("alpha", "beta", "lambda_fdp", "lambda_gpdp", "reduction", "map_reduction")
PATCHED = ("rho", "lambda_adv")  # axes without meaning for a method that trains on clean images


class Point(NamedTuple):
    """One run of the grid: the fields in which it differs from the base, by dotted name, and its config."""

    changes: dict[str, Any]
    config: ConfigDict

    @property
    def name(self) -> str:
        return grids.point_name(self.changes)

    def workdir(self, root: pathlib.Path) -> pathlib.Path:
        return root / "points" / files.config_hash(self.config)


def make_points(config: ConfigDict, grid: str) -> tuple[Point, ...]:
    """Return the base and every other point of a grid once, in the order of the grid.

    Args:
      config: the base. grid: as in the module's docstring.

    Raises:
      ValueError: an unknown axis, an axis that the base's method does not read, or values that cannot run.
    """
    points = {}
    for changes in [{}, *itertools.chain.from_iterable(_sweep(config, text) for text in _sweeps(config, grid))]:
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        try:
            config_lib.validate(changed)
        except ValueError as error:
            raise ValueError(f"--grid: the point {Point(changes, changed).name}: {error}") from None
        kept = {field: value for field, value in changes.items() if value != _value(config, field)}
        points.setdefault(files.config_hash(changed), Point(kept, changed))
    return tuple(points.values())


def _sweeps(config, grid):
    """Return the sweeps of a grid; of 'all' those that the base's method reads."""
    return [name for name in AXES if _is_read(config, name)] if grid == ALL else grid.split(",")


def _sweep(config, text):
    """Return the changes of one sweep, {field: value} for each combination of its axes' values."""
    axes = [_axis(config, axis) for axis in text.split("*")]
    fields = [field for field, _ in axes]
    if len(set(fields)) < len(fields):
        raise ValueError(f"--grid: {text} names an axis twice; list its values as NAME=VALUE:VALUE")
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*(values for _, values in axes))]


def _axis(config, text):
    """Return (field, values) of one axis, values in the type of the field."""
    name, _, listed = text.partition("=")
    if name not in AXES:
        raise ValueError(f"--grid: an axis is one of {', '.join(AXES)}, got {name!r}")
    if not _is_read(config, name):
        raise ValueError(f"--grid: {name} changes nothing under loss.method={config.loss.method}; leave it out")
    field, values = AXES[name]
    kind = type(_value(config, field))
    try:
        return field, tuple(kind(value) for value in listed.split(":")) if listed else values
    except ValueError:
        raise ValueError(
            f"--grid: {name} takes values of type {kind.__name__} joined by colons, got {listed!r}"
        ) from None


def _is_read(config, name):
    method = config.loss.method
    if name in OF_PENALTIES:
        return method == "triqdef"
    return name not in PATCHED or method != "qat"


def _value(config, field):
    for name in field.split("."):
        config = config[name]
    return config


def measure_point(point: Point, root: pathlib.Path, data, *, is_quiet: bool = False) -> dict:
    """Train one point, or finish its training, and measure it; what is finished is read from disk.

    Args:
      root: directory of the grid. data: the base's.

    Returns:
      JSON types: changes, config_hash, workdir, step, digest (of the patches), clean_accuracy and success (asr_correct) per bit-width, rates as
      of `results`; for a run whose loss became infinite, `failed` says so and the rates are empty.

    Raises:
      loop.PreemptedError: SIGTERM arrived first; what is trained so far is saved. loop.NonFiniteLossError: of the pool's source network.
    """
    workdir = point.workdir(root)
    path = workdir / POINT_FILE
    if path.is_file():
        return json.loads(path.read_text())
    run = loop.make_run(point.config, workdir, data.num_train)
    training, held_out = sources.train_pool(point.config, data).split()
    about = {"changes": point.changes, "config_hash": files.config_hash(point.config), "digest": held_out.digest}
    about |= {"workdir": str(workdir), "step": run.num_steps}
    try:
        trained = sources.train_to_end(
            run, data, title=point.name, pool=training if run.method.needs_pool else None, is_quiet=is_quiet
        )
        measured = about | _rates(trained, data, held_out)
    except loop.NonFiniteLossError as error:
        measured = about | {"failed": str(error), "clean_accuracy": {}, "success": {}}
    files.atomic_write_json(path, measured)
    return json.loads(path.read_text())


def _rates(trained, data, pool):
    """Return clean accuracy and success under the pool, per trained bit-width, on the run's test images."""
    config = trained.config
    rows = [targets.make(trained, data, str(bits)) for bits in trained.network.bits]
    images, labels = probes.first_test_images(data, config.eval.images)
    arrays, size = pool._asdict(), config.eval.batch_size
    predictions = [
        inference.predict(rows, images, size, inference.make_paste(arrays, index, config))
        for index in range(len(pool.values))
    ]
    numbers = np.arange(len(labels))
    cell = results.Cell(POOL, {}, np.stack(predictions, axis=1), pool.target, numbers, pool.digest)
    clean = inference.predict(rows, images, size)
    outcomes = results.Outcomes(tuple(row.name for row in rows), labels, numbers, clean, (cell,))
    summary = results.summarise(outcomes, seed=config.seed)
    success = summary["cells"][0]["success"]
    short = lambda rate: {name: value for name, value in rate.items() if name != "per_patch"}
    return {
        "clean_accuracy": summary["clean_accuracy"],
        "success": {target: short(rates[results.HEADLINE]) for target, rates in success.items()},
    }


def run_grid(
    config: ConfigDict,
    points: tuple[Point, ...],
    root: pathlib.Path,
    data,
    *,
    progress: Callable | None = None,
    is_quiet=False,
) -> dict:
    """Measure all points; the record on disk grows with each.

    Args:
      config: the base. points: from `make_points`. progress: called with a line of text before each point.

    Returns:
      The record of kind 'sensitivity'. Raises as `measure_point`.
    """
    record = describe(config, root, len(points))
    for number, point in enumerate(points, start=1):
        if progress:
            progress(f"point {number} of {len(points)}: {point.name}")
        record["points"].append(measure_point(point, root, data, is_quiet=is_quiet))
        record["against_seeds"] = grids.against_seeds(record["points"])
        files.atomic_write_json(root / "results" / FILE, record)
    return files.plain(record)


def describe(config: ConfigDict, root: pathlib.Path, num_planned: int) -> dict:
    """Return the record of a grid without its points."""
    return {
        "kind": "sensitivity",
        "name": pathlib.Path(root).name,
        "data": config.data.name,
        "method": config.loss.method,
        "base_hash": files.config_hash(config),
        "seed": config.seed,
        "num_planned": num_planned,
        "patches": f"{POOL} quarter of each point's pool; points of one seed meet the same patches at the same places",
        "definitions": {name: results.DEFINITIONS[name] for name in (results.HEADLINE, "interval")},
        "versions": {name: importlib.metadata.version(name) for name in results.PACKAGES},
        "points": [],
    }


def table(record: dict) -> str:
    """Return a record as text: per point clean accuracy and success of held-out patches at every bit-width, in per cent with intervals.

    First what differs from the base by more than its seeds do; those rates end in a star.
    """
    names = [grids.point_name(point["changes"]) for point in record["points"]]
    beyond = grids.beyond_rates(record["against_seeds"])
    width = max(len(name) for name in names)
    lines = [grids.sentence(record["against_seeds"]), ""]
    for title, field in (
        ("clean accuracy, %", "clean_accuracy"),
        ("success of held-out patches (asr_correct), %", "success"),
    ):
        bits = list(dict.fromkeys(b for point in record["points"] for b in point[field]))
        lines += [f"{title:<{width}}", f"{'':<{width}}" + "".join(f"{b + ' bits':>20}" for b in bits)]
        for name, point in zip(names, record["points"], strict=True):
            marks = {b: "*" * ((name, field, b) in beyond) for b in bits}
            cells_ = "".join(f"{_cell(point[field][b]) + marks[b]:>20}" for b in bits if b in point[field])
            lines.append(f"{name:<{width}}{cells_ or '  ' + point.get('failed', '')}")
        lines.append("")
    return "\n".join(lines)


def _cell(rate):
    if not rate["den"]:
        return "none counted"
    return f"{100 * rate['rate']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def main(argv):
    del argv
    config = _CONFIG.value
    root = pathlib.Path(_WORKDIR.value or "runs/sensitivity")
    with contextlib.ExitStack() as held:
        with entry.user_errors():
            config_lib.validate(config)
            points = make_points(config, flags.FLAGS.grid)
            loaded = data_lib.load(config.data)
            runs.open_workdir(root, config)
            held.enter_context(files.exclusive(root / runs.LOCK_FILE))
        held.enter_context(processes.leaving_at_once("runs of the grid"))
        try:
            say = lambda text: print(text, file=sys.stderr, flush=True)
            record = run_grid(config, points, root, loaded, progress=say)
        except loop.PreemptedError as error:
            print(error, file=sys.stderr)
            return entry.EXIT_PREEMPTED
        except loop.NonFiniteLossError as error:  # of a source network, so of every point
            print(f"error: {error}", file=sys.stderr)
            return entry.EXIT_FAILED
    text = table(record)
    with files.atomic_open(root / "results" / TABLE_FILE) as file:
        file.write(text.encode())
    print(f"{text}written to {root / 'results' / FILE}")
    return 0


if __name__ == "__main__":
    _CONFIG, _WORKDIR = entry.define_config_flags(default="configs/digits.py")
    flags.DEFINE_string("grid", ALL, "Which fields to change, see the module's docstring; 'all' or SWEEP[,SWEEP...].")
    entry.run_program(main)
