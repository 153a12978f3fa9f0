"""What evaluations of several runs say together: paired tests of two runs, the spread over runs of different seeds.

Tests are McNemar's on the same images under the same patches, adjusted by Holm over all pairs of attack and target; seeds are summarised by
Student's t. Records and outcomes go in, JSON types and text come out. What one run's cells say is `verdicts.py`.
"""

import numpy as np
from scipy import stats

from triqdef_jax import metrics, results
from triqdef_jax.results import Outcomes


def compare(record_a: dict, outcomes_a: Outcomes, record_b: dict, outcomes_b: Outcomes) -> dict:
    """Compare two runs, cell by cell and target by target, on the same images: right under every patch of the cell, McNemar, Holm.

    Cells of transferred, control and pool patches must be the very same patches; attacks on the defended network itself differ by nature and
    are compared when they have the same name and settings.

    Returns:
      A record of kind 'comparison'; `p_adjusted` is over all its pairs. 'clean' is compared first.

    Raises:
      ValueError: another data set, other images, other patches, or no cell in common.
    """
    if (record_a["data"], record_a["image_ids_sha256"]) != (record_b["data"], record_b["image_ids_sha256"]):
        raise ValueError(
            f"{record_a['name']} and {record_b['name']} met different images ({record_a['data']}, {record_a['num_images']} images; "
            f"{record_b['data']}, {record_b['num_images']}); compare runs of one data set and eval.images"
        )
    targets = [target for target in outcomes_a.targets if target in outcomes_b.targets]
    pairs = _paired(outcomes_a, outcomes_b, targets)
    adjusted = metrics.holm([pair["p_value"] for pair in pairs])
    pairs = [pair | {"p_adjusted": float(p)} for pair, p in zip(pairs, adjusted, strict=True)]
    return {"kind": "comparison", "name_a": record_a["name"], "name_b": record_b["name"], "pairs": pairs}


def _paired(a, b, targets):
    others = {cell.name: cell for cell in b.cells}
    common = [(cell, others[cell.name]) for cell in a.cells if cell.name in others]
    if not common:
        raise ValueError("the two evaluations have no cell in common; evaluate both with the same --preset")
    pairs = [_pair("clean", t, *(o.clean[o.targets.index(t)] == o.labels for o in (a, b))) for t in targets]
    for one, other in common:
        _check_same_attack(one, other)
        rights = a.correct(one), b.correct(other)
        pairs += [
            _pair(one.name, t, *(r[o.targets.index(t)] for r, o in zip(rights, (a, b), strict=True))) for t in targets
        ]
    return pairs


def _check_same_attack(one, other):
    is_own = one.about["surrogate"].startswith("self:")
    same = np.array_equal(one.rows, other.rows) and (
        one.about.get("settings") == other.about.get("settings") if is_own else one.digest == other.digest
    )
    if not same:
        what = "settings or images" if is_own else "patches"
        raise ValueError(
            f"{one.name}: the two runs met different {what}; evaluate both with the same config and preset"
        )


def _pair(cell, target, right_a, right_b):
    test = metrics.mcnemar(right_a, right_b)
    return {"cell": cell, "target": target, **test._asdict()}


def comparison_table(record: dict, targets: list[str]) -> str:
    """Return a comparison as text, a line per cell: images right under run a alone, under b alone, and the adjusted p-value, per target."""
    pairs = {(pair["cell"], pair["target"]): pair for pair in record["pairs"]}
    cells = list(dict.fromkeys(cell for cell, _ in pairs))
    shown = [target for target in targets if (cells[0], target) in pairs]
    width = max(len("bits"), *map(len, cells))
    head = f"right under every patch: images of {record['name_a']} alone : of {record['name_b']} alone, p by McNemar and Holm"
    lines = [head, f"{'bits':<{width}}" + "".join(f"  {target:>18}" for target in shown)]
    for cell in cells:
        texts = (_pair_text(pairs[cell, target]) for target in shown)
        lines.append(f"{cell:<{width}}" + "".join(f"  {text:>18}" for text in texts))
    return "\n".join(lines)


def _pair_text(pair):
    return f"{pair['only_a']} : {pair['only_b']}  p {pair['p_adjusted']:.2g}"


def seeds(records: list[dict]) -> dict:
    """Summarise runs that differ in their seed alone: mean and standard deviation over seeds, and the t interval of the mean.

    Raises:
      ValueError: fewer than two records, or records of different methods, data, networks or presets.
    """
    kinds = {(r["method"], r["data"], r["model"], r["forward"], r["preset"]) for r in records}
    if len(records) < 2 or len(kinds) > 1:
        raise ValueError(
            f"seeds: expected at least two runs of one method, data set, network and preset, got {len(records)} of {sorted(kinds)}"
        )
    cells = set.intersection(*({c["name"] for c in r["cells"]} for r in records))
    rates = [results.headlines(record) for record in records]
    targets = records[0]["targets"]
    return {
        "kind": "seeds",
        "names": [record["name"] for record in records],
        "seeds": [record["seed"] for record in records],
        "method": records[0]["method"],
        "clean_accuracy": {t: over_seeds([r["clean_accuracy"][t] for r in records]) for t in targets},
        "success": {
            name: {t: over_seeds([rate[name][t] for rate in rates]) for t in targets}
            for name in (c["name"] for c in records[0]["cells"])
            if name in cells
        },
    }


def over_seeds(rates: list[dict]) -> dict:
    """Summarise a rate of two or more seeds: mean, standard deviation, and Student's 95 % interval of the mean, cut at 0 and 1.

    Where all seeds agree, as few of them near 0 or 1 may, Student's has no width, and the widest interval of a single seed is taken.

    Args:
      rates: per seed 'rate', and the ends 'low' and 'high' of its own interval.
    """
    values = np.array([rate["rate"] for rate in rates], float)
    mean, sd, num = float(values.mean()), float(values.std(ddof=1)), len(values)
    half = float(stats.t.ppf(0.975, num - 1) * sd / np.sqrt(num))
    low, high = max(0.0, mean - half), min(1.0, mean + half)
    if np.ptp(values) == 0:
        low, high = min(rate["low"] for rate in rates), max(rate["high"] for rate in rates)
    return {"mean": mean, "sd": sd, "low": low, "high": high, "num_seeds": num}


def seeds_table(summary: dict) -> str:
    """Return a seeds summary as text: mean over seeds and the t interval of the mean, a line per cell."""
    rows = {"clean accuracy": summary["clean_accuracy"]}
    rows |= {f"asr: {name}": rates for name, rates in summary["success"].items()}
    width = max(map(len, rows))
    targets = list(summary["clean_accuracy"])
    head = f"{len(summary['names'])} seeds of {summary['method']}: mean [95 % t interval]"
    lines = [head, f"{'bits':<{width}}" + "".join(f"  {target:>20}" for target in targets)]
    for name, rates in rows.items():
        cells = (
            f"{100 * r['mean']:.1f} % [{100 * r['low']:.1f}, {100 * r['high']:.1f}]" for r in map(rates.get, targets)
        )
        lines.append(f"{name:<{width}}" + "".join(f"  {cell:>20}" for cell in cells))
    return "\n".join(lines)
