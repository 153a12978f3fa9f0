"""Evaluate trained runs: `python -m triqdef_jax.evaluate --workdirs=runs/digits[,runs/OTHER] [--preset=quick] [--deployed] [--compare=OTHER]`.

Presets: 'pools' (default) meets patches that training never met, made on full-precision networks; 'quick', 'standard' and 'full' add surrogates,
white-box, adaptive and query attacks, controls, untrained and re-quantized bit-widths; 'curves' asks how success grows with size, steps and restarts,
'sanity' whether every attack beats noise on the widest bit-width.
`--defenses=median,jedi` puts defences at inference around the widest and the lowest bit-width: rows like jedi:2, attacked through the defence.
`--surrogates=fp@deit_tiny_cifar` lets the attacker train that network too, and shows its patches to every row.
`--checkpoint=best` (on held-out images) or a step measures another checkpoint than the newest; its results lie in `<workdir>/results/step<step>/`.
Every rate comes with its count and a 95 % interval. The same command continues where it was stopped, cell by cell, and reads a finished record.
Writes `<workdir>/results/<name>.json` and `<name>_outcomes.npz`; `report.py` turns them into a page.
"""

import functools
import pathlib
import subprocess
import sys
import time
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from triqdef_jax import entry, processes

SCREEN = 100  # columns of the progress line


class _Evaluated(NamedTuple):
    """One run's record, its outcomes (None for curves), and the folder of its results."""

    record: dict
    outcomes: Any
    folder: pathlib.Path


def main(argv):
    del argv
    with processes.started(processes.from_flags()):
        return _evaluate(flags.FLAGS)


def _evaluate(options):
    from triqdef_jax import loop, presets, quantize, results

    if not options.workdirs:
        raise entry.UserError("--workdirs=DIR[,DIR] is needed: the directories of trained runs")
    with entry.user_errors():
        presets.check(options.preset)
        extra = tuple(quantize.check_bits(int(b)) for b in options.extra_bits)
        _check_runs(options)
        presets.check_further(options.preset, options.surrogates)
    try:
        evaluated = [_evaluate_run(workdir, extra, options) for workdir in options.workdirs]
        other = _evaluate_run(options.compare, extra, options) if options.compare else None
    except loop.PreemptedError as error:  # while a surrogate was trained
        processes.say(str(error), file=sys.stderr)
        return entry.EXIT_PREEMPTED
    records = [one.record for one in evaluated]
    with entry.user_errors():
        if len(records) > 1 and records[0].get("cells"):
            if len({record["seed"] for record in records}) == len(records):
                _summarise_seeds(evaluated)  # runs of other seeds met patches of their own
            else:
                cell = records[0]["cells"][0]["name"]
                table = results.side_by_side(records, cell)
                processes.say(f"\nside by side, success (asr_correct) of the {cell} patches:\n{table}")
        for one in evaluated if other else ():
            _compare(one, other)
    return 0


def _check_runs(options):
    """Refuse at once what would otherwise show after minutes: a directory without a run, a comparison that cannot be made."""
    from triqdef_jax import defenses, runs

    for name in options.defenses:
        defenses.get(name)
    configs = [runs.read_config(workdir) for workdir in options.workdirs]
    for workdir in [*options.workdirs, *filter(None, [options.compare])]:
        runs.find_step(workdir, options.checkpoint)
    if options.compare:
        if options.preset == "curves" or options.clean_only:
            raise ValueError("--compare needs a preset with attacks other than curves: pools, quick, standard or full")
        other = runs.read_config(options.compare)
        for workdir, config in zip(options.workdirs, configs, strict=True):
            if config.data.name != other.data.name:
                raise ValueError(
                    f"{workdir} is on {config.data.name} and {options.compare} on {other.data.name}; compare runs of one data set"
                )


def _evaluate_run(workdir, extra_bits, options):
    """Evaluate one run under the preset of the command line and write what came out."""
    from triqdef_jax import results, runs, sharding

    with entry.user_errors():
        trained = runs.load_trained(workdir, options.checkpoint)
        identity = _identity(trained, extra_bits, options)
        name = "evaluation" if options.preset == "pools" else options.preset
        name = "_".join(["clean" if options.clean_only else name, *["deployed"] * options.deployed])
        folder = pathlib.Path(workdir) / trained.results
        finished = _finished(folder / f"{name}.json", identity)
        if processes.as_lead_says(finished is not None):
            processes.say(_text(finished[0], folder / f"{name}.json"))
            return _Evaluated(*finished, folder)
        rows = dict(deployed=options.deployed, defenses=tuple(options.defenses))
        subject = make_subject(trained, workdir, options.preset, extra_bits, **rows)
        if options.preset == "curves":
            return _Evaluated(measure_curves(subject, progress=_Progress()), None, subject.results)
        asked = dict(with_pools=not options.clean_only, surrogates=tuple(options.surrogates))
        record, outcomes = evaluate(subject, options.preset, **asked, progress=_Progress())
    record |= {"identity": identity}
    with processes.together():
        if sharding.is_lead():
            print(_text(record, results.save(subject.results, name, record, outcomes)))
    return _Evaluated(record, outcomes, subject.results)


def _identity(trained, extra_bits, options):
    """Return what determines a record: the run, what was asked, the code and its packages; results of equal identity are not computed twice."""
    from triqdef_jax import files, results

    root = pathlib.Path(__file__).resolve().parent
    code = {str(path.relative_to(root)): np.frombuffer(path.read_bytes(), np.uint8) for path in root.rglob("*.py")}
    asked = [options.preset, list(extra_bits), options.deployed, options.clean_only, list(options.defenses)]
    asked += [list(options.surrogates)] * bool(options.surrogates)
    facts = [files.config_hash(trained.config), trained.step, *asked, results.versions(), files.sha256_of_arrays(code)]
    return files.config_hash(facts)


def _finished(path, identity):
    """Return (record, outcomes) of a finished evaluation of this identity, None where it has yet to be made."""
    from triqdef_jax import results

    try:
        found = results.load(path)
    except (FileNotFoundError, ValueError):  # absent or damaged
        return None
    return found if found[0].get("identity") == identity else None


def make_subject(trained, workdir, preset: str, extra_bits=(), *, deployed=False, defenses=()):
    """Return the `cells.Subject` of a trained run: its targets under a preset, those behind defences too, and its test images."""
    from triqdef_jax import cells, data, presets, targets

    loaded = data.load(trained.config.data)
    names = presets.target_names(preset, trained.config, tuple(extra_bits), tuple(defenses))
    rows = tuple(targets.make(trained, loaded, name, deployed=deployed) for name in names)
    arrays = data.test_arrays(loaded, trained.config.eval.batch_size, trained.config.eval.images)
    return cells.Subject(trained, loaded, rows, *arrays, pathlib.Path(workdir), deployed)


def evaluate(subject, preset: str, *, with_pools: bool = True, surrogates: tuple[str, ...] = (), progress=None):
    """Run all cells of a preset on one run.

    Args:
      subject: from `make_subject`. with_pools: False measures clean accuracy alone. surrogates: beside the preset's.
      progress: called with (cell number, number of cells, text).

    Returns:
      (record of kind 'evaluation', `results.Outcomes`).
    """
    from triqdef_jax import inference, presets, results, sources, targets, verdicts

    config, tell = subject.config, progress or (lambda *_: None)
    defended = tuple(target.name for target in subject.targets if targets.parse(target.name).defense)
    clean = inference.predict(subject.targets, subject.images, config.eval.batch_size)
    found = []
    if with_pools:
        pools = sources.eval_pools(config, subject.data) if presets.meets_pools(preset) else {}
        plans = presets.plans(preset, config, defended, surrogates)
        found = _make_cells(subject, pools, plans, tell)
    outcomes = results.Outcomes(
        tuple(target.name for target in subject.targets), subject.labels, subject.ids, clean, tuple(found)
    )
    record = _describe(subject, preset) | results.summarise(outcomes, seed=config.seed)
    record |= {"flags": verdicts.collapse_flags(record)}
    if defended:
        record |= {"defended": list(defended), "certified": certify(subject)}
    if presets.plans(preset, config) and with_pools:
        health = health_flags(subject)
        asked = (verdicts.masking_flags, verdicts.convergence_flags, verdicts.sanity_flags)
        found = [flag for ask in asked for flag in ask(outcomes)]
        sound = [f"logits repeat and every image has a gradient ({len(subject.targets)} targets)"] if not health else []
        record |= {
            "worst": verdicts.worst(record),
            "worst_transfer": verdicts.worst(record, access="transfer"),
            "robust_all": verdicts.robust_all(outcomes),
            "flags": [*record["flags"], *health, *found],
            "checks": [*verdicts.checks(outcomes, found), *sound],
        }
    return record, outcomes


def _make_cells(subject, pools, plans, tell):
    """Return the cells of pools and plans, in this order; the networks that attackers need are trained first, by all processes together."""
    from triqdef_jax import cells, spread, surrogates

    needed = dict.fromkeys(plan.surrogate for plan in plans if plan.surrogate)
    foreign = [name for name in needed if surrogates.parse(name)[0] != cells.SELF]
    subject = subject._replace(networks={name: surrogates.get(subject.config, name, subject.data) for name in foreign})
    jobs = [functools.partial(cells.pool_cell, name, pool) for name, pool in pools.items()]
    jobs += [functools.partial(cells.run, plan) for plan in plans]
    now = lambda number: functools.partial(tell, number, len(jobs))
    with processes.leaving_at_once("cells"):
        found = spread.shared([functools.partial(job, subject, progress=now(n)) for n, job in enumerate(jobs)])
    now(len(jobs))("")
    return found


def certify(subject) -> dict[str, dict]:
    """Return per target with a certificate the share of test images that are proven right under any one patch of its size, with counts."""
    from triqdef_jax import results

    size = subject.config.eval.batch_size
    found = {}
    for target in (target for target in subject.targets if target.certify):
        proven = 0
        for start in range(0, len(subject.images), size):
            rows = np.resize(np.arange(start, min(start + size, len(subject.images))), size)  # one shape for all
            right = target.certify(subject.images[rows], subject.labels[rows])
            proven += int(right[: len(subject.images) - start].sum())
        found[target.name] = results.wilson(proven, len(subject.images))
    return found


def _describe(subject, preset):
    import jax

    from triqdef_jax import presets, results

    described = results.describe(
        subject.config, workdir=subject.workdir, step=subject.trained.step, deployed=subject.deployed
    )
    device = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    return described | {"preset": preset, "device": device, "commit": _commit(), "not_run": presets.not_run(preset)}


def _commit():
    """Return the commit of the source tree, with '+' where it was changed since, or None outside a repository."""
    root = pathlib.Path(__file__).resolve().parent
    git = lambda *args: subprocess.run(["git", "-C", root, *args], capture_output=True, text=True, check=False).stdout
    try:
        return git("rev-parse", "HEAD").strip() + "+" * bool(git("status", "--porcelain", "--", ".").strip()) or None
    except OSError:  # no git here
        return None


def health_flags(subject) -> list[dict]:
    """Return flags of the network itself: logits that differ between two calls, images without any gradient."""
    import jax
    import jax.numpy as jnp

    from triqdef_jax.attacks import eot
    from triqdef_jax.attacks.losses import cross_entropy

    images, labels = subject.images[:64], subject.labels[:64]
    floats = jnp.asarray(images, jnp.float32) / 255.0

    @jax.jit
    def gradient(logits_fn, images, labels):
        return jax.grad(lambda x: cross_entropy(logits_fn(x), labels).sum())(images)

    def attacked(target):
        return eot.fixed(target.logits_fn, jax.random.key(0)) if target.is_random else target.logits_fn

    flags_found = []
    for target in subject.targets:
        if not np.array_equal(target.query(images), target.query(images)):
            detail = (
                "two calls on the same images gave different logits: attacks need the expectation over its randomness"
            )
            flags_found.append({"flag": "non-deterministic logits", "target": target.name, "detail": detail})
        share = float((np.abs(gradient(attacked(target), floats, labels)).max(axis=(1, 2, 3)) == 0).mean())
        if share > 0:
            detail = f"{100 * share:.0f} % of {len(images)} images have no gradient at all: attacks with gradients cannot start there"
            flags_found.append({"flag": "zero gradients", "target": target.name, "detail": detail})
    return flags_found


def measure_curves(subject, *, progress=None) -> dict:
    """Return the record of kind 'curves', success against patch size, steps and restarts, and write it with its outcomes."""
    from triqdef_jax import inference, presets, results, sharding

    planned = presets.curve_plans(subject.config, subject.data.image_size_px)
    plans = [plan for points in planned.values() for _, plan in points]
    found = _make_cells(subject, {}, plans, progress or (lambda *_: None))
    clean = inference.predict(subject.targets, subject.images, subject.config.eval.batch_size)
    names = tuple(target.name for target in subject.targets)
    outcomes = results.Outcomes(names, subject.labels, subject.ids, clean, tuple(found))
    rates = results.headlines(results.summarise(outcomes, seed=subject.config.seed))
    curves = [
        {
            "title": f"success against {what}",
            "x": what,
            "attacked": points[0][1].surrogate,
            "points": [{"x": x, "cell": plan.name, "success": rates[plan.name]} for x, plan in points],
        }
        for what, points in planned.items()
    ]
    record = _describe(subject, "curves") | {"kind": "curves", "num_images": len(found[0].rows), "curves": curves}
    with processes.together():
        if sharding.is_lead():
            path = results.save(subject.results, "curves", record, outcomes)
            print(f"\n{_curves_text(record)}\nwritten to {path}")
    return record


def _curves_text(record):
    from triqdef_jax import results

    lines = [f"{record['name']}: patch PGD, {record['num_images']} test images, asr_correct on the attacked bit-width"]
    for curve in record["curves"]:
        bits = curve["attacked"].removeprefix("self:")
        lines.append(f"{curve['title']} ({bits} bits)")
        lines += [f"  {point['x']:>5}  {results.cell(point['success'][bits])}" for point in curve["points"]]
    return "\n".join(lines)


def _text(record, path):
    from triqdef_jax import results

    head = f"{record['name']}: {record['method']} on {record['data']}, {record['num_images']} test images, {record['forward']} forward"
    lines = [f"\n{head}", results.table(record)]
    lines += [_defended_text(record, target) for target in record.get("defended", ())]
    lines += [f"flag: {flag['flag']} at {flag['target']}: {flag['detail']}" for flag in record.get("flags", ())]
    lines += [f"checks: {'; '.join(record['checks'])}"] if record.get("checks") else []
    return "\n".join([*lines, f"written to {path}"])


def _defended_text(record, target):
    """One row behind a defence: clean accuracy, the worst of all attacks, and what is certified."""
    from triqdef_jax import results

    said = [f"clean accuracy {results.cell(record['clean_accuracy'][target])}"]
    if "worst" in record:
        said.append(f"worst asr {results.cell(record['worst'][target])} by {record['worst'][target]['cell']}")
    if target in record["certified"]:
        said.append(f"certified {results.cell(record['certified'][target])}")
    return f"{target:<18} {'; '.join(said)}"


def _compare(one, other):
    """Print and write the paired tests of a run against another."""
    from triqdef_jax import across_runs, files, sharding

    record = across_runs.compare(one.record, one.outcomes, other.record, other.outcomes)
    if sharding.is_lead():
        files.atomic_write_json(one.folder / f"comparison-{other.record['name']}.json", record)
    trained = [str(b) for b in one.record["quant"]["bits"]]
    processes.say(f"\n{across_runs.comparison_table(record, trained)}")


def _summarise_seeds(evaluated):
    """Print and write what runs that differ in their seed alone have in common."""
    from triqdef_jax import across_runs, files, sharding

    summary = across_runs.seeds([one.record for one in evaluated])
    if sharding.is_lead():
        files.atomic_write_json(evaluated[0].folder / "seeds.json", summary)
    processes.say(f"\n{across_runs.seeds_table(summary)}")


class _Progress:
    """One line on a terminal: cell, share, time left by the mean cost so far; one line per cell in a log."""

    def __init__(self):
        self.start, self.last = time.monotonic(), -1

    def __call__(self, number, total, text):
        left = (time.monotonic() - self.start) / number * (total - number) if number else None
        line = f"cell {min(number + 1, total)}/{total}  {text}{f'  {left / 60:.0f} min left' if left else ''}"
        if sys.stderr.isatty():
            print(f"\r{line:<{SCREEN}}", end="" if number < total else "\n", file=sys.stderr, flush=True)
        elif number != self.last and number < total and text:
            print(line, file=sys.stderr, flush=True)
        self.last = number


if __name__ == "__main__":
    flags.DEFINE_list("workdirs", [], "Directories of trained runs.")
    flags.DEFINE_string("preset", "pools", "How much evidence: pools, smoke, quick, standard, full, sanity, or curves.")
    flags.DEFINE_string("compare", "", "Directory of another run: paired tests of each run of --workdirs against it.")
    flags.DEFINE_string("checkpoint", "last", "Which checkpoint: last, best (on held-out images), or a step.")
    flags.DEFINE_bool("deployed", False, "Measure the integer forward that ships instead of the fake-quant graph.")
    flags.DEFINE_bool("clean_only", False, "Measure clean accuracy alone, without patches.")
    flags.DEFINE_list("surrogates", [], "Surrogates beside the preset's, such as fp@deit_tiny_cifar or qat:4.")
    flags.DEFINE_list("defenses", [], "Defences to measure too: median, gaussian, tv, jedi, diffpure, patchcleanser.")
    flags.DEFINE_list("extra_bits", [], "Bit-widths that were not trained, calibrated for this evaluation (3,6).")
    processes.define_flags()
    entry.run_program(main)
