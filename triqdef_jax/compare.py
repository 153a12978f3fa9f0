"""Compare methods: `python -m triqdef_jax.compare --study=FILE[:variant] [--workdir=DIR]`, or `--preset=NAME` for configs/study_NAME.py.

A study names configs, seeds, an evaluation preset and inference-time defences (`studies/plan.py`). Every run is trained and evaluated by the very
programs `train` and `evaluate`, each in a process of its own; source networks and patches that all share are made first. The same command
continues where it stopped, and prints a finished study again. A run that fails is reported in one line and the others go on.

Writes `<workdir>/study.json`, `comparison.html`, `.md` and `.tex` with the paper's tables (ours, intervals, paired tests, the printed figures in
grey), and `report.html` with everything that was measured on each run. Exit codes: 0 done, 1 some run failed, 2 bad input, 42 preempted.

    python -m triqdef_jax.compare --preset=smoke          # does everything run? says nothing about the methods
    python -m triqdef_jax.compare --preset=digits --seeds=0,1,2
    python -m triqdef_jax.compare --study=mine.py --processes=4      # one per accelerator
"""

import dataclasses
import pathlib
import sys

from absl import flags

from triqdef_jax import entry

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
PREFIX = "study_"
RECORD, PAGE, REPORT = "study.json", "comparison.html", "report.html"


def main(argv):
    del argv
    from triqdef_jax.studies import plan, tasks

    options = flags.FLAGS
    with entry.user_errors():
        source = find_study(options.study, options.preset)
        study = plan.load(source)
        if options.seeds:
            study = dataclasses.replace(study, seeds=parse_seeds(options.seeds))
        if options.processes < 1:
            raise ValueError(f"--processes must be at least 1, got {options.processes}")
        root = pathlib.Path(options.workdir or default_workdir(source))
        runs = plan.make_runs(study, source, root)
    if options.only_patches:
        return make_patches(runs)
    try:
        planned = make_tasks(study, source, runs, root)
        ended = tasks.run(planned, root, num_processes=options.processes, environment=study.environment, tell=_tell)
    except tasks.PreemptedError as error:
        print(error, file=sys.stderr)
        return entry.EXIT_PREEMPTED
    bad = [name for name, end in ended.items() if end.status == tasks.FAILED]
    write(study, runs, ended, root)
    for name in bad:
        print(f"error: {name} failed: {ended[name].detail}", file=sys.stderr)
    return entry.EXIT_FAILED if bad else 0


def find_study(study: str, preset: str) -> str:
    """Return the study file that the flags name.

    Raises:
      ValueError: both or neither are given, or there is no such preset.
    """
    if bool(study) == bool(preset):
        raise ValueError("name one study: --study=FILE[:variant] or --preset=NAME")
    if study:
        return study
    name, _, variant = preset.partition(":")
    path = CONFIGS / f"{PREFIX}{name}.py"
    if not path.is_file():
        known = sorted(path.stem.removeprefix(PREFIX) for path in CONFIGS.glob(f"{PREFIX}*.py"))
        raise ValueError(f"--preset must be one of {', '.join(known)}, got {name!r}")
    return f"{path}:{variant}" if variant else str(path)


def default_workdir(source: str) -> pathlib.Path:
    """Return runs/studies/<name of the study file>[-<variant>]."""
    file, _, variant = source.partition(":")
    slug = "".join(c if c.isalnum() or c in "._" else "-" for c in variant)
    name = pathlib.Path(file).stem.removeprefix(PREFIX)
    return pathlib.Path("runs") / "studies" / (f"{name}-{slug}" if slug else name)


def parse_seeds(texts: list[str]) -> tuple[int, ...]:
    """Return --seeds as numbers.

    Raises:
      ValueError: one is no whole number of at least 0, or stands twice.
    """
    if not all(text.isdigit() for text in texts) or len(set(texts)) < len(texts):
        raise ValueError(f"--seeds takes different whole numbers, as in 0,1,2; got {','.join(texts)}")
    return tuple(int(text) for text in texts)


def make_patches(runs) -> int:
    """Make the source networks and patch pools that the runs of each seed share; returns the exit code."""
    from triqdef_jax import data, loop, sources

    try:
        for seed in dict.fromkeys(run.seed for run in runs):
            config = next(run.config for run in runs if run.seed == seed)
            with entry.user_errors():
                sources.eval_pools(config, data.load(config.data))
    except loop.PreemptedError as error:
        print(error, file=sys.stderr)
        return entry.EXIT_PREEMPTED
    except loop.NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return entry.EXIT_FAILED
    return 0


def make_tasks(study, source: str, runs, root: pathlib.Path) -> list:
    """Return the programs of a study: the shared patches, all trainings, all evaluations, and what its defences cost."""
    from triqdef_jax import files
    from triqdef_jax.studies import numbers
    from triqdef_jax.studies.tasks import Task

    program = lambda name, *args: (sys.executable, "-m", f"triqdef_jax.{name}", *args)
    hashes = {run.name: files.config_hash(run.config) for run in runs}
    made = [_patches_task(study, source, runs, root, program)]
    for run in runs:
        command = program("train", *run.flags, f"--workdir={run.workdir}")
        product = run.workdir / "checkpoints"
        made.append(Task(f"train {run.name}", "train", command, (made[0].name,), hashes[run.name], product))
    for run in runs:
        given = [f"--preset={study.preset}"]
        if run.entry.name in study.defended:
            given.append(f"--defenses={','.join(study.defenses)}")
        command = program("evaluate", f"--workdirs={run.workdir}", *given)
        identity, product = files.config_hash([hashes[run.name], given]), numbers.evaluation_path(run, study.preset)
        made.append(Task(f"evaluate {run.name}", "evaluate", command, (f"train {run.name}",), identity, product))
    if study.defenses:
        product = root / numbers.LATENCY_FILE
        command = program("benchmark", "--what=defenses", *runs[0].flags, f"--out={product}")
        identity = files.config_hash([hashes[runs[0].name], command[3]])
        made.append(Task(numbers.LATENCY_TASK, "latency", command, (), identity, product, is_alone=True))
    return made


def _patches_task(study, source, runs, root, program):
    """Return the task that makes what all runs share, so that no run's training time holds it."""
    from triqdef_jax import files, sources
    from triqdef_jax.studies.tasks import Task

    firsts = [next(run.config for run in runs if run.seed == seed) for seed in study.seeds]
    requests = [sources.request(c, 0, tuple(c.patches.sizes_px), c.patches.pool_size) for c in firsts]
    sizes = [[config.patches.eval_pool_size, config.patches.unseen_sizes_px] for config in firsts]
    identity = files.config_hash([[request.folder_name for request in requests], sizes])
    product = pathlib.Path(firsts[-1].patches.shared_dir) / requests[-1].folder_name
    seeds = ",".join(map(str, study.seeds))
    command = program("compare", f"--study={source}", f"--seeds={seeds}", f"--workdir={root}", "--only_patches")
    return Task("patches", "patches", command, (), identity, product)


def write(study, runs, ended, root: pathlib.Path) -> None:
    """Write the record and the pages of a study, and print its tables."""
    from triqdef_jax import files
    from triqdef_jax.report import page as report_page
    from triqdef_jax.report import records
    from triqdef_jax.studies import numbers, page

    record = numbers.build(study, runs, ended, root)
    files.atomic_write_json(root / RECORD, record)
    texts = {PAGE: page.to_html(record, REPORT), "comparison.md": page.to_markdown(record)}
    texts["comparison.tex"] = page.to_latex(record)
    done = [run["workdir"] for run in record["runs"] if run["status"] == "done"]
    if done:
        texts[REPORT] = report_page.render(records.read_runs(done))
    for name, text in texts.items():
        with files.atomic_open(root / name) as file:
            file.write(text.encode())
    print(page.to_text(record, is_colour=sys.stdout.isatty()))
    print(f"written to {root}: {', '.join((RECORD, *texts))}")


def _tell(line):
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("study", "", "Study file, FILE.py or FILE.py:variant.")
    flags.DEFINE_string("preset", "", "Study of this project by name: configs/study_NAME.py.")
    flags.DEFINE_string("workdir", "", "Directory of the study; default runs/studies/<its name>.")
    flags.DEFINE_list("seeds", [], "Train every entry with each of these seeds; default those of the study.")
    flags.DEFINE_integer("processes", 1, "Runs at the same time; process k sees accelerator k alone.")
    flags.DEFINE_bool("only_patches", False, "Make the source networks and patches that the runs share, and stop.")
    entry.run_program(main)
