"""Evaluation records: outcomes per image, success rates with counts and intervals, text tables, files.

A cell is one attack from one surrogate: P patches (or one patch per image: P = 1) on n images, predicted by every target. A record holds every
printed number as JSON types; `<name>_outcomes.npz` beside it holds the predictions from which each can be recomputed. NumPy only.
"""

import functools
import importlib.metadata
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from triqdef_jax import files, metrics

HEADLINE = "asr_correct"
PACKAGES = ("jax", "jaxlib", "flax", "numpy")
DEFINITIONS = {
    "asr_correct": "wrong with patch / right without, images of the target class excluded",
    "robust_acc": "right with patch / all",
    "asr_all": "prediction changed / all",
    "tsr": "target predicted with patch / label differs from target",
    "tsr_clean": "target predicted without patch / label differs from target",
    "worst": "the cell with the highest asr_correct against a target, controls left out",
    "worst_transfer": "the same among cells of an attacker without the weights",
    "robust_all": "right under every patch of every cell / images that all cells share",
    "interval": "95 %: Wilson where one patch meets independent images, else bootstrap over patches and images (all or none succeed: Wilson)",
}


class Cell(NamedTuple):
    """What one attack from one surrogate achieved.

    Attributes:
      name: unique in its record. about: JSON types, see `cells.describe`; at least attack, surrogate, access ('transfer', 'white-box',
        'query', 'adaptive' or 'control').
      predictions: int32 `[T, P, n]` of all targets. target: int32 `[P]`, -1 untargeted. rows: int32 `[n]`, which of the record's images.
      digest: SHA-256 of the patches or of the patched images.
    """

    name: str
    about: dict[str, Any]
    predictions: np.ndarray
    target: np.ndarray
    rows: np.ndarray
    digest: str


class Outcomes(NamedTuple):
    """Everything that was predicted: names of the T targets, labels and image ids `[N]`, clean predictions int32 `[T, N]`, cells."""

    targets: tuple[str, ...]
    labels: np.ndarray
    ids: np.ndarray
    clean: np.ndarray
    cells: tuple[Cell, ...]

    def correct(self, cell: Cell) -> np.ndarray:
        """Return bool `[T, n]`: right under every patch of the cell."""
        return (cell.predictions == self.labels[cell.rows]).all(axis=1)


def summarise(outcomes: Outcomes, *, seed: int) -> dict:
    """Return clean accuracy and all success rates per target, with counts and 95 % intervals; `seed` is the bootstrap's."""
    right = (outcomes.clean == outcomes.labels).sum(axis=1)
    return {
        "num_images": len(outcomes.labels),
        "image_ids_sha256": files.sha256_of_arrays({"ids": outcomes.ids}),
        "targets": list(outcomes.targets),
        "clean_accuracy": {t: wilson(right[i], len(outcomes.labels)) for i, t in enumerate(outcomes.targets)},
        "cells": [_summarise_cell(outcomes, cell, seed) for cell in outcomes.cells],
    }


def _summarise_cell(outcomes, cell, seed):
    labels, clean = outcomes.labels[cell.rows], outcomes.clean[:, cell.rows]
    pairs = zip(clean, cell.predictions, strict=True)
    masks = [metrics.success_masks(one, patched, labels, cell.target) for one, patched in pairs]
    num, den = (np.stack([[mask[side] for mask in of_target.values()] for of_target in masks]) for side in range(2))
    if len(cell.target) == 1:
        rate_of = lambda place: wilson(num[place].sum(), den[place].sum())
    else:
        intervals = metrics.cluster_bootstrap(num, den, seed=seed)
        rate_of = lambda place: _clustered(num[place], den[place], metrics.Interval(*(end[place] for end in intervals)))
    success = {
        target: {name: rate_of((row, column)) for column, name in enumerate(of_target)}
        for row, (target, of_target) in enumerate(zip(outcomes.targets, masks, strict=True))
    }
    counts = {"num_patches": len(cell.target), "num_images": len(cell.rows), "digest": cell.digest}
    return {"name": cell.name, **cell.about, **counts, "success": success}


def _clustered(num, den, interval):
    """Summarise bool `[P, n]`: patches that share images."""
    per_patch = [{"num": int(n), "den": int(d)} for n, d in zip(num.sum(1), den.sum(1), strict=True)]
    return _rate(num.sum(), den.sum(), interval) | {"per_patch": per_patch}


def wilson(num, den) -> dict:
    """Return a rate of independent images as JSON types, with Wilson's interval."""
    return _rate(num, den, metrics.wilson(int(num), int(den)))


def _rate(num, den, interval):
    ends = {"low": float(interval.low), "high": float(interval.high)}
    return {"num": int(num), "den": int(den), "rate": float(num / den) if den else float("nan"), **ends}


def describe(config: ConfigDict, *, workdir, step: int, deployed: bool) -> dict:
    """Return what was measured and how: run, forward, threat model, definitions, versions."""
    patches = config.patches
    return {
        "kind": "evaluation",
        "name": pathlib.Path(workdir).name,
        "forward": "integer (32 bits: float)" if deployed else "fake-quant",
        "step": step,
        "config_hash": files.config_hash(config),
        "method": config.loss.method,
        "data": config.data.name,
        "model": f"{config.model.name}, width {config.model.width or 'published'}",
        "seed": config.seed,
        "quant": config.quant,
        "threat_model": {
            "attacker": "by cell: transfer knows training data and architecture; white-box and adaptive know weights and method; query sees logits",
            "patch": f"one {patches.shape} per image, values in [0, 1] on the uint8 grid",
            "rotation_deg": patches.rotation_deg,
            "scale_jitter": patches.scale_jitter,
            "goal": "by cell: a target class or any wrong prediction; the headline counts any wrong prediction",
        },
        "definitions": DEFINITIONS,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that figures may depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def save(folder: str | pathlib.Path, name: str, record: dict, outcomes: Outcomes) -> pathlib.Path:
    """Write `<name>_outcomes.npz`, then `<name>.json`; returns the path of the record."""
    arrays = {"labels": outcomes.labels, "ids": outcomes.ids, "clean": outcomes.clean}
    for cell in outcomes.cells:
        fields = {"predictions": cell.predictions, "target": cell.target, "rows": cell.rows}
        arrays |= {f"{field}:{cell.name}": values for field, values in fields.items()}
    path = pathlib.Path(folder) / f"{name}.json"
    files.atomic_savez(path.with_name(f"{name}_outcomes.npz"), **arrays)
    files.atomic_write_json(path, record)
    return path


def load(path: str | pathlib.Path) -> tuple[dict, Outcomes]:
    """Read a record and its outcomes.

    Raises:
      FileNotFoundError: no such record. ValueError: its outcomes are missing or damaged.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no record {path}; make it with python -m triqdef_jax.evaluate")
    try:
        record = json.loads(path.read_text())
        with open(path.with_name(f"{path.stem}_outcomes.npz"), "rb") as file, np.load(file) as arrays:
            read = functools.partial(_read_cell, arrays)
            cells = tuple(read(cell) for cell in record["cells"])
            fields = (arrays["labels"], arrays["ids"], arrays["clean"])
    except Exception as error:  # NumPy, zip and JSON readers each fail in their own ways on damaged bytes
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); evaluate again") from error
    return record, Outcomes(tuple(record["targets"]), *fields, cells)


def _read_cell(arrays, about):
    fields = (arrays[f"{field}:{about['name']}"] for field in ("predictions", "target", "rows"))
    kept = {key: value for key, value in about.items() if key not in ("name", "success", "digest")}
    return Cell(about["name"], kept, *fields, about["digest"])


def headlines(record: dict) -> dict[str, dict[str, dict]]:
    """Return {cell: {target: headline rate}}."""
    return {
        cell["name"]: {target: rates[HEADLINE] for target, rates in cell["success"].items()} for cell in record["cells"]
    }


def table(record: dict) -> str:
    """Return one record as text: a line per cell with the headline success against each target, clean accuracy first.

    Records of a few cells have a line per target instead; those of many leave out targets that were not trained, which the record has.
    """
    rows = {"clean accuracy": record["clean_accuracy"]}
    rows |= {f"asr: {name}": rates for name, rates in headlines(record).items()}
    if "worst" in record:
        rows["worst asr"] = record["worst"]
        rows["worst transfer"] = record["worst_transfer"]
        rows["right under all"] = record["robust_all"]
    if len(rows) <= len(record["targets"]) + 1:
        return _table(rows)
    trained = [target for target in record["targets"] if target in map(str, record["quant"]["bits"])]
    return _transposed(rows, trained)


def side_by_side(records: list[dict], cell: str) -> str:
    """Return several records as text: clean accuracy and the headline success of one cell, run by run.

    Raises:
      ValueError: the records met different patches or images.
    """
    cells = [next(c for c in record["cells"] if c["name"] == cell) for record in records]
    if len({(c["digest"], r["image_ids_sha256"]) for c, r in zip(cells, records, strict=True)}) > 1:
        raise ValueError(
            f"the runs met different patches or images under {cell!r}; compare runs of one data set and patch config"
        )
    columns = {}
    for record in records:
        columns |= {
            f"{record['name']}: clean": record["clean_accuracy"],
            f"{record['name']}: asr": headlines(record)[cell],
        }
    return _table(columns)


def _table(columns):
    """A line per target, a column per name."""
    widths = [max(24, len(name)) for name in columns]
    targets = list(next(iter(columns.values())))
    first = max(4, *map(len, targets))
    header = (f"{name:>{width}}" for name, width in zip(columns, widths, strict=True))
    lines = [f"{'bits':>{first}}  " + "  ".join(header)]
    for target in targets:
        cells = [f"{cell(column[target]):>{width}}" for column, width in zip(columns.values(), widths, strict=True)]
        lines.append(f"{target:>{first}}  " + "  ".join(cells))
    return "\n".join(lines)


def _transposed(rows, targets):
    """A line per name, a column per target."""
    first = max(map(len, rows))
    lines = [f"{'bits':<{first}}" + "".join(f"  {target:>20}" for target in targets)]
    lines += [f"{name:<{first}}" + "".join(f"  {cell(row[t]):>20}" for t in targets) for name, row in rows.items()]
    return "\n".join(lines)


def cell(rate: dict) -> str:
    """Return '12.3 % [10.0, 14.9]', or '-' where nothing was counted."""
    if not rate["den"]:
        return "-"
    return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
