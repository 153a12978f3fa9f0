"""Result records: success rates with counts and intervals from predictions, as JSON types, text tables and files.

Predictions are int32 `[bits, N]` clean and `[bits, P, N]` under the P patches of a pool; everything here is NumPy and the standard library. A record
holds every printed number; `<name>_outcomes.npz` beside it holds the predictions from which each can be recomputed.
"""

import importlib.metadata
import pathlib
from typing import NamedTuple

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
    "interval": "95 %: Wilson for clean accuracy, bootstrap over patches and images for the rest",
}


class PoolOutcomes(NamedTuple):
    """Predictions int32 `[bits, P, N]` under one pool, its targets int32 `[P]`, its digest."""

    predictions: np.ndarray
    target: np.ndarray
    digest: str


class Outcomes(NamedTuple):
    """Everything that was predicted: labels, image ids int `[N]`, clean predictions int32 `[bits, N]`, `PoolOutcomes` by name."""

    labels: np.ndarray
    ids: np.ndarray
    clean: np.ndarray
    pools: dict[str, PoolOutcomes]


def summarise(outcomes: Outcomes, bits: tuple[int, ...], *, seed: int) -> dict:
    """Return clean accuracy and all success rates per bit-width, with counts and 95 % intervals.

    Args:
      bits: the bit-widths behind the leading axis of the predictions. seed: of the bootstrap.
    """
    summary = {"num_images": len(outcomes.labels), "clean_accuracy": {}, "pools": {}}
    for row, b in enumerate(bits):
        right = int((outcomes.clean[row] == outcomes.labels).sum())
        interval = metrics.wilson(right, len(outcomes.labels))
        summary["clean_accuracy"][str(b)] = _rate(right, len(outcomes.labels), interval)
    for name, pool in outcomes.pools.items():
        per_bit = {}
        for row, b in enumerate(bits):
            masks = metrics.success_masks(outcomes.clean[row], pool.predictions[row], outcomes.labels, pool.target)
            per_bit[str(b)] = {rate: _pooled(*masks[rate], seed) for rate in masks}
        summary["pools"][name] = {"num_patches": len(pool.target), "digest": pool.digest, "bits": per_bit}
    return summary


def _pooled(num, den, seed):
    """Summarise bool `[P, N]`: pooled rate with interval, and the counts of every patch."""
    interval = metrics.cluster_bootstrap(num, den, seed=seed)
    per_patch = [{"num": int(n), "den": int(d)} for n, d in zip(num.sum(1), den.sum(1), strict=True)]
    return _rate(int(num.sum()), int(den.sum()), interval) | {"per_patch": per_patch}


def _rate(num, den, interval):
    rate = num / den if den else float("nan")
    return {"num": num, "den": den, "rate": rate, "low": float(interval.low), "high": float(interval.high)}


def describe(config: ConfigDict, summary: dict, *, workdir, step: int, deployed: bool) -> dict:
    """Return the whole record: what was attacked and how, definitions, versions, and the summary."""
    patches = config.patches
    return {
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
            "attacker": "knows training data and architecture, not the attacked weights (transfer from full-precision networks)",
            "patch": f"one universal {patches.shape} at a random place, values in [0, 1]",
            "rotation_deg": patches.rotation_deg,
            "scale_jitter": patches.scale_jitter,
            "goal": "made for a target class; the headline counts any wrong prediction",
        },
        "definitions": DEFINITIONS,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        **summary,
    }


def save(folder: str | pathlib.Path, name: str, record: dict, outcomes: Outcomes) -> pathlib.Path:
    """Write `<name>.json` and `<name>_outcomes.npz`; returns the path of the record."""
    arrays = {"labels": outcomes.labels, "ids": outcomes.ids, "clean": outcomes.clean}
    for pool, outcome in outcomes.pools.items():
        arrays |= {f"predictions:{pool}": outcome.predictions, f"target:{pool}": outcome.target}
    path = pathlib.Path(folder) / f"{name}.json"
    files.atomic_savez(path.with_name(f"{name}_outcomes.npz"), **arrays)
    files.atomic_write_json(path, record)
    return path


def table(record: dict) -> str:
    """Return one record as text: a line per bit-width with clean accuracy and the headline success under each pool."""
    columns = {"clean accuracy": record["clean_accuracy"]}
    columns |= {f"asr: {name}": _headline(pool) for name, pool in record["pools"].items()}
    return _table(columns)


def side_by_side(records: list[dict], pool: str) -> str:
    """Return several records as text: clean accuracy and the headline success under one pool, method by method.

    Raises:
      ValueError: the records met different patches or images.
    """
    if len({(r["pools"][pool]["digest"], r["num_images"]) for r in records}) > 1:
        raise ValueError(
            f"the runs met different patches or images under {pool!r}; compare runs of one data set and patch config"
        )
    columns = {}
    for record in records:
        columns |= {
            f"{record['name']}: clean": record["clean_accuracy"],
            f"{record['name']}: asr": _headline(record["pools"][pool]),
        }
    return _table(columns)


def _headline(pool):
    return {b: rates[HEADLINE] for b, rates in pool["bits"].items()}


def _table(columns):
    widths = [max(24, len(name)) for name in columns]
    lines = ["bits  " + "  ".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True))]
    for b in next(iter(columns.values())):
        cells = [f"{_cell(column[b]):>{width}}" for column, width in zip(columns.values(), widths, strict=True)]
        lines.append(f"{b:>4}  " + "  ".join(cells))
    return "\n".join(lines)


def _cell(rate):
    return "  ".join([f"{100 * rate['rate']:.1f} %", f"[{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"])
