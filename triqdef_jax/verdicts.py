"""What the cells of one evaluation say together: worst cases, flags that warn of a number, and the checks that raised none.

Tests are McNemar's on images (`metrics.mcnemar`), p-values of one question adjusted by Holm. Nothing here predicts or attacks: records and outcomes
go in, JSON types come out. What several runs say together is `across_runs.py`.
"""

import numpy as np

from triqdef_jax import metrics, results
from triqdef_jax.results import HEADLINE, Cell, Outcomes

LEVEL = 0.05  # of the flags' and comparisons' adjusted p-values
CONTROL = "control"
STRONGEST = "patch_pgd"  # the attack that no other should beat
NOT_CONVERGED = "not converged"
COLLAPSED = "hardly right without a patch"
WHOLE_IMAGE = "whole image"  # ends the name of the cell whose patch is as large as the image: it probes the attack, never the network
WHOLE_RATE = 0.99  # of right images, at least, that such a patch fools
BEATS = {  # what the attacker knew -> flag
    "transfer": "transfer beats white-box",
    "query": "black-box beats white-box",
    "white-box": f"white-box beats {STRONGEST}",
    "adaptive": f"adaptive beats {STRONGEST}",
}


def worst(record: dict, *, access: str | None = None) -> dict[str, dict]:
    """Return per target the cell with the highest headline success, with its rate; controls and whole-image patches never count.

    Args:
      access: take cells of this access alone, for example 'transfer': the aggregated success of an attacker without the weights.
    """
    cells = [c for c in record["cells"] if _is_attack(c["name"], c) and access in (None, c["access"])]
    found = {}
    for target in record["targets"]:
        rates = [(cell["success"][target][HEADLINE], cell["name"]) for cell in cells]
        counted = [(rate, name) for rate, name in rates if rate["den"]]
        rate, name = max(counted, key=lambda pair: pair[0]["rate"], default=(_nothing(), None))
        found[target] = {"cell": name, **{k: v for k, v in rate.items() if k != "per_patch"}}
    return found


def _nothing():
    return results.wilson(0, 0)


def robust_all(outcomes: Outcomes) -> dict[str, dict]:
    """Return per target the share of images that are right under every patch of every cell that is no control and no whole image.

    Counted on the images that all these cells share: the mean of the worst case per image, which no single attack shows.
    """
    cells = [cell for cell in outcomes.cells if _is_attack(cell.name, cell.about)]
    shared = _shared_rows(outcomes, cells)
    right = outcomes.clean[:, shared] == outcomes.labels[shared]
    for cell in cells:
        place = {row: index for index, row in enumerate(cell.rows)}
        right &= outcomes.correct(cell)[:, [place[row] for row in shared]]
    return {target: results.wilson(right[i].sum(), len(shared)) for i, target in enumerate(outcomes.targets)}


def _is_attack(name, about):
    """Whether a cell says something about the network: controls and whole-image patches, before which any must fall, do not."""
    return about["access"] != CONTROL and not name.endswith(WHOLE_IMAGE)


def _shared_rows(outcomes, cells):
    rows = np.arange(len(outcomes.labels))
    for cell in cells:
        rows = np.intersect1d(rows, cell.rows)
    return rows


def collapse_flags(record: dict) -> list[dict]:
    """Return a flag for every target whose clean accuracy lies, interval and all, below half of the best one's: its training or calibration failed.

    What is wrong without a patch is not counted as fooled, and who says one class whatever he sees is never fooled at all: such a target's
    success of 0 % is no robustness.
    """
    accuracy = record["clean_accuracy"]
    best = max(accuracy.values(), key=lambda rate: rate["rate"])
    return [
        {
            "flag": COLLAPSED,
            "target": target,
            "detail": f"clean accuracy {results.cell(rate)}, {results.cell(best)} at best",
        }
        for target, rate in accuracy.items()
        if rate["high"] < best["rate"] / 2
    ]


def masking_flags(outcomes: Outcomes) -> list[dict]:
    """Return a flag for every cell that fools significantly more images than `patch_pgd` made on the very bit-width, target by target.

    An attacker who knows more cannot do worse: where a patch from elsewhere, a query attack or any other attack is stronger than the strongest
    attack with gradients, that one failed (masked gradients, too few steps) and its success says nothing about the defence.
    """
    pairs = _against_pgd(outcomes)
    tests = [_best_patch(outcomes, *pair) for pair in pairs]
    adjusted = metrics.holm([p_value for _, p_value in tests])
    flags = []
    for (target, _, cell), (test, _), p in zip(pairs, tests, adjusted, strict=True):
        if p < LEVEL:
            detail = (
                f"{cell.name} fools {test.only_a} images that {STRONGEST} on this bit-width does not, and misses {test.only_b}, "
                f"of {sum(test[:4])} (adjusted p = {p:.2g})"
            )
            flags.append({"flag": _beats(cell, target), "target": target, "cell": cell.name, "detail": detail})
    return flags


def _against_pgd(outcomes):
    """Return (target, cell of `patch_pgd` made on it, other cell of the same size) for every other cell but controls: all meet every target."""
    pairs = []
    for target in outcomes.targets:
        by_size = {c.about["size_px"]: c for c in reversed(outcomes.cells) if _is_plain_pgd_on(c, target)}
        for cell in outcomes.cells:
            own = by_size.get(cell.about["size_px"])
            if own and cell.about["access"] != CONTROL and not _is_pgd_on(cell, target):
                pairs.append((target, own, cell))
    return pairs


def _is_plain_pgd_on(cell, target):
    return _is_pgd_on(cell, target) and "doubles" not in cell.about


def _is_pgd_on(cell, target):
    return cell.about["attack"] == STRONGEST and cell.about["surrogate"] == f"self:{target}"


def _beats(cell, target):
    """Name the flag by what the attacker knew of this target: a patch made on another bit-width is a transferred one."""
    access = cell.about["access"]
    if access == "adaptive":
        return BEATS["adaptive"]
    return BEATS[access if cell.about["surrogate"] == f"self:{target}" else "transfer"]


def _best_patch(outcomes, target, own, cell):
    """Compare a cell's most successful patch; returns the test and its p-value times the patches it was chosen from (Bonferroni)."""
    row, shared = outcomes.targets.index(target), _shared_rows(outcomes, [own, cell])
    patched = _right(outcomes, cell, row, shared)
    best = patched[patched.sum(axis=1).argmin()]
    test = metrics.mcnemar(_right(outcomes, own, row, shared)[0], best)
    return test, min(1.0, len(patched) * test.p_value) if test.only_a > test.only_b else 1.0


def checks(outcomes: Outcomes, flags: list[dict]) -> list[str]:
    """Return in words what the functions that flag asked and what came out, so that their silence can be read.

    Args:
      flags: what `masking_flags` and `convergence_flags` returned, perhaps among others; what `sanity_flags` asks is asked again.
    """
    num = len(_against_pgd(outcomes))
    beaten = sum(flag["flag"] in BEATS.values() for flag in flags)
    doubled = [cell.about["doubles"] for cell in outcomes.cells if cell.about.get("doubles")]
    longer = [flag["cell"] for flag in flags if flag["flag"] == NOT_CONVERGED]
    pairs = f"{num} pairs of attack and bit-width, the same images, McNemar, Holm"
    words = f"an attack beats {STRONGEST} in {beaten} cases" if beaten else f"no attack beats {STRONGEST}"
    found = [f"{words} made on the attacked bit-width ({pairs})"] if num else []
    found += [
        f"twice the steps of {name} {'' if name in longer else 'do not '}fool significantly more" for name in doubled
    ]
    return found + _noise_lines(outcomes) + [_whole_line(*whole) for whole in _whole_images(outcomes)]


def sanity_flags(outcomes: Outcomes) -> list[dict]:
    """Return a flag for each attack that does not beat noise of its size on the widest bit-width, and for a whole image that resists.

    The 95 % Wilson interval of the attack's most successful patch, 5 % divided by the number of patches it was chosen from (Bonferroni), must
    lie above the 95 % interval of all noise patches, on the images that count for that patch. Where it does not, the patch does no more than
    cover pixels: the attack failed, or the defence holds. With a patch as large as the image the attacker replaces it; fewer than
    99 % of right images fooled mean a broken attack. Attacks made on other networks or bit-widths are not asked.
    """
    flags = [
        {"flag": "no better than noise", "target": target, "cell": cell.name, "detail": f"{words}: not above"}
        for target, cell, words, is_above in _against_noise(outcomes)
        if not is_above
    ]
    return flags + [
        {"flag": f"{WHOLE_IMAGE} resists", "target": whole[0], "cell": whole[1].name, "detail": _whole_line(*whole)}
        for whole in _whole_images(outcomes)
        if whole[2]["rate"] < WHOLE_RATE
    ]


def _against_noise(outcomes):
    """Return (target, cell, both rates in words, whether it lies above) for attacks on the widest bit-width that any cell was made on."""
    made_on = {cell.about["surrogate"] for cell in outcomes.cells}
    target = max((t for t in outcomes.targets if t.isdigit() and f"self:{t}" in made_on), key=int, default=None)
    noises = {cell.about["size_px"]: cell for cell in outcomes.cells if cell.about["attack"] == "noise"}
    found = []
    for cell in outcomes.cells:
        noise = noises.get(cell.about["size_px"])
        is_own = cell.about["surrogate"] == f"self:{target}" or cell.about["attack"] == "adaptive"
        if target and noise and is_own and _is_attack(cell.name, cell.about):
            shared = _shared_rows(outcomes, [cell, noise])
            rate, aim = _best_patch_rate(outcomes, cell, target, shared)
            if not rate["den"]:
                continue
            others = shared[outcomes.labels[shared] != aim]  # images of the class aimed at count for neither
            floor = _rate_of_all(outcomes, noise, target, others)
            words = f"{cell.name} {_counted(rate)} against {_counted(floor)}"
            found.append((target, cell, words, rate["low"] > floor["high"]))
    return found


def _noise_lines(outcomes):
    """Return a line of the attacks that beat noise and one of those that do not, each where there are any."""
    lines, found = [], _against_noise(outcomes)
    for is_above, said in ((True, "beat"), (False, "DO NOT beat")):
        words = [words for *_, words, is_so in found if is_so == is_above]
        if words:
            how = "best patch, its interval widened for the choice, against all noise patches on the same images"
            lines.append(f"{said} noise of the same size at {found[0][0]} bits ({how}): {', '.join(words)}")
    return lines


def _whole_images(outcomes):
    """Return (target, cell, rate) of the whole-image patches made on a target."""
    made = [(c.about["surrogate"].removeprefix("self:"), c) for c in outcomes.cells if c.name.endswith(WHOLE_IMAGE)]
    rated = [(t, c, _best_patch_rate(outcomes, c, t, c.rows)[0]) for t, c in made if t in outcomes.targets]
    return [entry for entry in rated if entry[2]["den"]]


def _whole_line(target, cell, rate):
    said = "at least" if rate["rate"] >= WHOLE_RATE else "LESS THAN"
    size = f"a patch as large as the image ({cell.about['size_px']} px)"
    return f"{size} fools {_counted(rate)} at {target} bits, {said} {100 * WHOLE_RATE:.0f} %"


def _counted(rate):
    return f"{rate['num']}/{rate['den']} = {results.cell(rate)}"


def _best_patch_rate(outcomes, cell, target, images):
    """Return the headline rate of a cell's best patch on some of its images, Wilson's interval widened for the choice, and the class aimed at."""
    row = outcomes.targets.index(target)
    clean, patched = outcomes.clean[row][images], _predicted(cell, row, images)
    counts = metrics.success_counts(clean, patched, outcomes.labels[images], cell.target)[HEADLINE]
    best = np.nan_to_num(counts.rate, nan=-1.0).argmax()
    num, den = int(counts.num[best]), int(counts.den[best])
    interval = metrics.wilson(num, den, level=1 - LEVEL / len(cell.target))
    return results.wilson(num, den) | {"low": interval.low, "high": interval.high}, cell.target[best]


def _rate_of_all(outcomes, cell, target, images):
    """Return the headline rate of all patches of a cell on some of its images, with the interval of records."""
    row, rows = outcomes.targets.index(target), np.arange(len(images))
    part = cell._replace(predictions=_predicted(cell, row, images)[None], rows=rows)
    clean = outcomes.clean[row : row + 1, images]
    few = Outcomes((target,), outcomes.labels[images], outcomes.ids[images], clean, (part,))
    return results.headlines(results.summarise(few, seed=0))[cell.name][target]


def _right(outcomes: Outcomes, cell: Cell, row: int, images: np.ndarray) -> np.ndarray:
    """Return bool `[P, images]`."""
    return _predicted(cell, row, images) == outcomes.labels[images]


def _predicted(cell, row, images):
    place = {image: index for index, image in enumerate(cell.rows)}
    return cell.predictions[row][:, [place[image] for image in images]]


def convergence_flags(outcomes: Outcomes) -> list[dict]:
    """Return a flag for each white-box cell that was repeated with twice the steps (`about['doubles']`) and then fooled significantly more."""
    by_name = {cell.name: cell for cell in outcomes.cells}
    flags = []
    for cell in outcomes.cells:
        single = by_name.get(cell.about.get("doubles"))
        target = cell.about["surrogate"].removeprefix("self:")
        if single is None or target not in outcomes.targets:
            continue
        row = outcomes.targets.index(target)
        shared = _shared_rows(outcomes, [single, cell])
        test = metrics.mcnemar(*(_right(outcomes, c, row, shared).all(axis=0) for c in (single, cell)))
        if test.p_value < LEVEL and test.only_a > test.only_b:
            detail = f"twice the steps of {single.name} fool {test.only_a} more images and {test.only_b} fewer (p = {test.p_value:.2g})"
            flags.append({"flag": NOT_CONVERGED, "target": target, "cell": single.name, "detail": detail})
    return flags
