"""The figures of a study: what each run's evaluation says under the names of the paper's tables, paired tests, budgets, as one record.

The record, of kind 'study', holds JSON types and every figure that a table shows. Success is `asr_correct` and robust accuracy `robust_acc` of
`results.DEFINITIONS`; the columns are those of `measure`. Nothing is attacked or predicted here.
"""

import json
import pathlib
import shlex
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from triqdef_jax import across_runs, curriculum, files, results, sources, verdicts
from triqdef_jax import config as config_lib
from triqdef_jax.results import HEADLINE, Outcomes
from triqdef_jax.studies import published
from triqdef_jax.studies.plan import RunPlan, Study, is_recompressed
from triqdef_jax.studies.tasks import DONE, Ended

CLEAN, WORST, RIGHT, WHITE_BOX = "clean accuracy", "worst", "right under all", "white-box"
CERTIFIED = "certified"
HELD_OUT = "held-out"
ROBUST = "robust accuracy"
NOMINAL_STEPS = 10_000  # that stages are laid out on, so that their shares are exact to 0.01 %
QUERY_ATTACKS = ("patchattack", "sparse_rs")
LATENCY_TASK, LATENCY_FILE = "latency", "latency.json"  # in the study's directory, of `benchmark --what=defenses`


class Evaluated(NamedTuple):
    """A run's record of kind 'evaluation' and its outcomes."""

    record: dict
    outcomes: Outcomes


def unseen(size_px: int) -> str:
    """Return what patches of a side that training never met are called: the name of their pool."""
    return f"unseen size {size_px} px"


def column(attack: str, patches: str) -> str:
    """Return the name of a column: 'lavan, held-out', 'gap, unseen size 6 px'."""
    return f"{attack}, {patches}"


def measure(evaluated: Evaluated, config: ConfigDict) -> dict[str, dict[str, dict]]:
    """Return {column: {target: rate}} of one run.

    Columns: clean accuracy; success of the LaVAN and of the GAP half of every evaluation pool (patches made on full-precision networks, which
    training never met), and robust accuracy under the held-out ones; success of query attacks on the target itself; of white-box patch PGD on the
    target itself; the worst of all attacks; images right under all of them; images that a defence proves right under any patch. The last six only
    where the evaluation has them.
    """
    record, outcomes = evaluated
    columns = {CLEAN: record["clean_accuracy"]}
    pools = [_split(cell, config) for cell in outcomes.cells if cell.about["surrogate"] == "source network"]
    halves = [half for split in pools for half in split]
    if halves:
        summary = results.summarise(outcomes._replace(cells=tuple(halves)), seed=config.seed)
        for cell in summary["cells"]:
            columns[cell["name"]] = {target: rates[HEADLINE] for target, rates in cell["success"].items()}
            if cell["name"].endswith(HELD_OUT):
                name = f"{cell['name']}: {ROBUST}"
                columns[name] = {target: rates["robust_acc"] for target, rates in cell["success"].items()}
    for attack in QUERY_ATTACKS:
        columns[attack] = _own(record, attack)
    columns[WHITE_BOX] = _own(record, "patch_pgd")
    columns |= {WORST: record.get("worst", {}), RIGHT: record.get("robust_all", {})}
    columns[CERTIFIED] = record.get("certified", {})
    return {name: {t: _short(rate) for t, rate in rates.items()} for name, rates in columns.items() if rates}


def _split(cell, config):
    """Return a pool's cell once per family that made its patches."""
    held_out = cell.name == HELD_OUT
    sizes = config.patches.sizes_px if cell.about["size_px"] in config.patches.sizes_px else (cell.about["size_px"],)
    number = config.patches.pool_size if held_out else len(cell.target)
    made = sources.request(config, 0 if held_out else 1, tuple(sizes), number).patch_list()[-len(cell.target) :]
    for family in dict.fromkeys(config.patches.families):
        rows = np.array([index for index, (name, _, _) in enumerate(made) if name == family], int)
        if len(rows):
            name = column(family, cell.name)
            yield cell._replace(name=name, predictions=cell.predictions[:, rows], target=cell.target[rows])


def _own(record, attack):
    """Return the success of an attack on each target itself: {target: rate}; the plain cell, of the seen side and with single steps."""
    cells = {cell["name"]: cell for cell in record["cells"]}
    found = {target: cells.get(f"{attack}|self:{target}") for target in record["targets"]}
    return {target: cell["success"][target][HEADLINE] for target, cell in found.items() if cell}


def _short(rate):
    return {name: value for name, value in rate.items() if name != "per_patch"}


def paired(one: Evaluated, baseline: Evaluated) -> dict:
    """Return the paired tests of a run, as a, against the baseline of its seed, by `across_runs`; `refused` says why there are none."""
    try:
        return across_runs.compare(one.record, one.outcomes, baseline.record, baseline.outcomes)
    except ValueError as error:
        return {"refused": str(error)}


def tally(comparison: dict, targets: list[str]) -> dict[str, dict[str, int]]:
    """Return {target: {'better', 'worse', 'undecided'}}, numbers of attacks on which the run a beats b, by adjusted p-values; clean left out."""
    counts = {}
    for target in targets:
        pairs = [p for p in comparison.get("pairs", ()) if p["target"] == target and p["cell"] != "clean"]
        decided = [p for p in pairs if p["p_adjusted"] < verdicts.LEVEL]
        better = sum(p["only_a"] > p["only_b"] for p in decided)
        if pairs:
            counts[target] = {
                "better": better,
                "worse": len(decided) - better,
                "undecided": len(pairs) - len(decided),
            }
    return counts


def evaluation_path(plan: RunPlan, preset: str) -> pathlib.Path:
    """Return the file that `evaluate` writes under a preset."""
    return plan.workdir / "results" / f"{'evaluation' if preset == 'pools' else preset}.json"


def build(study: Study, plans: list[RunPlan], ended: dict[str, Ended], root: str | pathlib.Path) -> dict:
    """Return the record of a study from what its runs left on disk; runs that failed have a status and no figures."""
    baselines: dict[int, Evaluated] = {}
    rows = []
    for plan in plans:  # the baseline of each seed first
        row, evaluated = _row(plan, study, ended)
        if evaluated and plan.entry.name == study.baseline:
            baselines[plan.seed] = evaluated
        elif evaluated and plan.seed in baselines:
            comparison = paired(evaluated, baselines[plan.seed])
            row["paired"] = _paired_row(comparison, row["bits"])
            _write_comparison(plan, comparison)
        rows.append(row)
    order = [entry.name for entry in study.entries]
    places = {plan.name: (study.seeds.index(plan.seed), order.index(plan.entry.name)) for plan in plans}
    rows.sort(key=lambda row: places[row["name"]])
    return files.plain(_describe(study, plans[0].config, root) | {"runs": rows, "latency": _latency(ended, root)})


def _latency(ended, root):
    """Return what the program that times the study's defences has found; {} where it failed, or where there are none."""
    end = ended.get(LATENCY_TASK)
    return read(pathlib.Path(root) / LATENCY_FILE) if end and end.status == DONE else {}


def _row(plan, study, ended):
    """Return a run's row, and its evaluation where it has one."""
    phases = {kind: ended[f"{kind} {plan.name}"] for kind in ("train", "evaluate")}
    open_phases = [f"{kind}: {end.status}, {end.detail}" for kind, end in phases.items() if end.status != DONE]
    times = {f"{kind}_{unit}": getattr(end, unit) for kind, end in phases.items() for unit in ("wall_s", "cpu_s")}
    given = {"epochs": plan.config.train.epochs, "batch_size": plan.config.train.batch_size}
    given["forward_equivalents"] = forward_equivalents(plan.config)
    row = {
        "name": plan.name,
        "row": plan.entry.row or plan.entry.name,
        "seed": plan.seed,
        "method": plan.config.loss.method,
        "bits": [str(b) for b in plan.config.quant.bits],
        "is_ablation": plan.entry.is_ablation,
        "workdir": str(plan.workdir),
        "config_hash": files.config_hash(plan.config),
        "command": shlex.join(("python", "-m", "triqdef_jax.train", *plan.flags, f"--workdir={plan.workdir}")),
        "status": open_phases[0] if open_phases else DONE,
        "budget": given | times,
    }
    if open_phases:
        return row, None
    evaluated = Evaluated(*results.load(evaluation_path(plan, study.preset)))
    record = evaluated.record
    row |= {name: record[name] for name in ("targets", "device", "forward", "num_images", "step")}
    row["flags"] = [f"{flag['flag']} at {flag['target']}" for flag in record.get("flags", ())]
    row["columns"] = measure(evaluated, plan.config)
    return row, evaluated


def forward_equivalents(config: ConfigDict) -> float:
    """Return what one image of the batch costs in a step, averaged over the stages of a run: a forward of one bit-width is 1, its backward 2.

    As `Method.cost` counts: attacks in training included, source networks and pools left out.
    """
    method, bact = config_lib.make_training_method(config), config.bact
    stages = curriculum.make_stages(tuple(config.quant.bits), NOMINAL_STEPS, tuple(bact.starts), enabled=bact.enabled)
    return sum((stage.stop - stage.start) * method.cost(len(stage.bits)) for stage in stages) / NOMINAL_STEPS


def _write_comparison(plan, comparison):
    """Write the paired tests where `evaluate --compare` would, for the report of the run."""
    if "pairs" in comparison:
        files.atomic_write_json(plan.workdir / "results" / f"comparison-{comparison['name_b']}.json", comparison)


def _paired_row(comparison, targets):
    pairs = comparison.get("pairs", ())
    kept = [pair for pair in pairs if pair["cell"] in (HELD_OUT, *(f"patch_pgd|self:{t}" for t in targets))]
    refused = {"refused": comparison["refused"]} if "refused" in comparison else {}
    return {"tally": tally(comparison, targets), "pairs": kept, **refused}


def _describe(study, config, root):
    facts = published.Facts(
        data=config.data.name,
        network=config.model.name,
        epochs=config.train.epochs,
        size_px=config.patches.sizes_px[0],
        is_whole=not (config.model.width or config.data.train_images or config.data.image_size_px),
        is_copy=is_recompressed(config),
        label=study.label,
    )
    return {
        "kind": "study",
        "name": pathlib.Path(root).name,
        "title": study.title,
        "label": study.label,
        "baseline": study.baseline,
        "preset": study.preset,
        "seeds": list(study.seeds),
        "defenses": list(study.defenses),
        "bits": [str(b) for b in config.quant.bits],
        "unseen_px": list(config.patches.unseen_sizes_px),
        "facts": facts._asdict(),
        "definitions": results.DEFINITIONS,
    }


def over_seeds(rates: list[dict]) -> dict:
    """Summarise a rate over seeds as `across_runs.over_seeds` does; the rate itself where there is one seed."""
    if len(rates) == 1:
        return rates[0]
    spread = across_runs.over_seeds(rates)
    return {"rate": spread.pop("mean")} | spread


def read(path: str | pathlib.Path) -> dict[str, Any]:
    """Return a study's record from its file."""
    return json.loads(pathlib.Path(path).read_text())
