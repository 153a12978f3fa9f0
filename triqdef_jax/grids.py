"""What a grid of settings says: which of its points differ from the base by more than the base's own seeds differ from one another.

Points are those of a record of kind 'sensitivity': `changes`, the fields in which a point differs from the base, and per bit-width `clean_accuracy`
and `success` as rates with 95 % intervals, empty where training failed. JSON types and text come out.
"""

import numpy as np
from scipy import stats

FIELDS = ("clean_accuracy", "success")
LEVEL = 0.05  # share of one more seed's rates that would lie outside by chance


def against_seeds(points: list[dict]) -> dict:
    """Hold every point that is no seed of the base against the base and its seeds.

    A rate is beyond the seeds where it lies outside of what one more seed of the base would give (`one_more_seed`) and its own 95 % interval
    does not meet that of the base: three seeds that happen to agree prove nothing alone. Points share the seed and so the patches of the base,
    its seeds have patches of their own: the range of seeds is wider than training alone makes it, and what lies inside may still differ.

    Returns:
      `num_seeds`, the base's own included; where they are two or more, also `seeds`, {field: {bit-width: mean, low, high}}, `num_rates`, how
      many were asked, and `beyond`, [{changes, field, target, is_above}].
    """
    measured = [point for point in points if point["success"]]
    of_base = [point for point in measured if not point["changes"].keys() - {"seed"}]
    base = next((point for point in of_base if not point["changes"]), None)
    if base is None or len(of_base) < 2:
        return {"num_seeds": len(of_base)}
    others = [point for point in measured if point not in of_base]
    found = {"num_seeds": len(of_base), "seeds": {field: {} for field in FIELDS}, "num_rates": 0, "beyond": []}
    for field, target in [(f, target) for f in FIELDS for target in base[f]]:
        of_seeds = [point[field][target]["rate"] for point in of_base]
        if None in of_seeds:  # nothing was counted
            continue
        expected = found["seeds"][field][target] = one_more_seed(of_seeds)
        asked = [(point["changes"], point[field][target]) for point in others if point[field][target]["den"]]
        found["num_rates"] += len(asked)
        found["beyond"] += [
            {"changes": changes, "field": field, "target": target, "is_above": rate["rate"] > expected["high"]}
            for changes, rate in asked
            if not expected["low"] <= rate["rate"] <= expected["high"] and _are_apart(rate, base[field][target])
        ]
    return found


def one_more_seed(rates) -> dict:
    """Return where the rate of one more seed would lie: Student's 95 % prediction interval from those of two or more, cut at 0 and 1."""
    mean, sd, num = float(np.mean(rates)), float(np.std(rates, ddof=1)), len(rates)
    half = float(stats.t.ppf(1 - LEVEL / 2, num - 1) * sd * np.sqrt(1 + 1 / num))
    return {"mean": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}


def sentence(found: dict) -> str:
    """Return what `against_seeds` found in a line: which points differ from the base by more than its seeds do, and how many would by chance."""
    if "beyond" not in found:
        missing = "No seed of the base stands beside the grid"
        return f"{missing}: no difference here can be told from chance. Add the axis seed."
    names = list(dict.fromkeys(name for name, *_ in beyond_rates(found)))
    num, num_rates = len(found["beyond"]), found["num_rates"]
    head = f"Of {num_rates} rates {num} differ from the base by more than its {found['num_seeds']} seeds do"
    return f"{head} (by chance alone up to {LEVEL * num_rates:.0f} may){': ' * bool(names)}{'; '.join(names)}."


def beyond_rates(found: dict) -> list[tuple[str, str, str]]:
    """Return the rates that `against_seeds` named, as (name of the point, field, target)."""
    return [(point_name(one["changes"]), one["field"], one["target"]) for one in found.get("beyond", ())]


def point_name(changes: dict) -> str:
    """Return the fields in which a point differs from the base: `loss.alpha 0.0, loss.beta 2.0`, or `base`."""
    return ", ".join(f"{field} {value}" for field, value in changes.items()) or "base"


def _are_apart(one, other):
    return one["low"] > other["high"] or one["high"] < other["low"]
