"""Result files of runs as the report reads them: which kinds there are, what each must hold, how it is made.

A record is the parsed JSON of `<workdir>/results/<name>.json` and says its own `kind`. Shares are floats in [0, 1]; a rate is
`{"num", "den", "rate", "low", "high"}`, its share None where nothing was counted. Nothing is computed anew here.
"""

import json
import pathlib
from typing import Any, NamedTuple

from triqdef_jax.writer import METRICS_FILE

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
RESULTS_DIR = "results"
EVALUATE = "python -m triqdef_jax.evaluate --workdirs={workdirs}"


class Kind(NamedTuple):
    """What records of a kind show, the fields they must have, the command that makes them, whether each run has its own."""

    shows: str
    fields: tuple[str, ...]
    command: str
    is_per_run: bool = True


KINDS = {
    "evaluation": Kind(
        "success of attacks", ("name", "targets", "clean_accuracy", "cells"), f"{EVALUATE} --preset=quick"
    ),
    "curves": Kind("success against patch size, steps and restarts", ("curves",), f"{EVALUATE} --preset=curves"),
    "alignment": Kind(
        "similarity of bit-widths", ("pairs", "prediction"), "python -m triqdef_jax.alignment --workdirs={workdirs}"
    ),
    "pictures": Kind("pictures", ("pictures",), "python -m triqdef_jax.pictures --workdirs={workdirs}"),
    "comparison": Kind(
        "paired tests between two runs",
        ("name_a", "name_b", "pairs"),
        f"{EVALUATE} --preset=quick --compare=OTHER",
        False,
    ),
    "seeds": Kind(
        "spread over seeds", ("names", "clean_accuracy", "success"), f"{EVALUATE},OTHER,OTHER --preset=quick", False
    ),
    "sensitivity": Kind(
        "sensitivity to the method's weights",
        ("points", "against_seeds"),
        "python -m triqdef_jax.sensitivity --config=configs/digits.py",
        False,
    ),
}
CELL_FIELDS = ("name", "attack", "access", "size_px", "placement", "success")
TRAIN = "python -m triqdef_jax.train --workdir={workdirs} --config=FILE"


class Run(NamedTuple):
    """A workdir as it was given, its short unique label, records by file name, lines of metrics.jsonl, names of files left unread."""

    workdir: str
    label: str
    records: dict[str, dict]
    metrics: list[dict]
    ignored: tuple[str, ...]


def read_runs(workdirs: list[str]) -> tuple[Run, ...]:
    """Read the result files of several runs.

    Raises:
      ValueError: a directory is named twice or has no results, or a record is damaged or lacks a field.
    """
    if len({pathlib.Path(workdir).resolve() for workdir in workdirs}) < len(workdirs):
        raise ValueError(f"--workdirs: expected different directories, got {','.join(workdirs)}")
    names = [pathlib.Path(workdir).resolve().name for workdir in workdirs]
    return tuple(
        _read_run(workdir, name if names.count(name) == 1 else workdir)
        for workdir, name in zip(workdirs, names, strict=True)
    )


def of_kind(runs: tuple[Run, ...], kind: str) -> dict[str, dict]:
    """Return the records of a kind by unique labels: the run's, with the file's name where a run has several."""
    labelled = {}
    for run in runs:
        found = {name: record for name, record in run.records.items() if record["kind"] == kind}
        for name, record in found.items():
            labelled[run.label if len(found) == 1 else f"{run.label}: {name}"] = record
    return labelled


def headline(evaluations: dict[str, dict]) -> dict[str, dict]:
    """Return the evaluations that met every kind of attacker and so can name a worst one; all of them where none did."""
    return {label: record for label, record in evaluations.items() if "worst" in record} or evaluations


def missing(runs: tuple[Run, ...]) -> list[tuple[str, str]]:
    """Return (what is missing and where, the command that makes it) for everything that a full report would hold."""
    lines = []
    for name, kind in KINDS.items():
        without = [run for run in runs if name not in {record["kind"] for record in run.records.values()}]
        if len(without) == len(runs) or (kind.is_per_run and without):
            lines.append(_missing_line(kind.shows, kind.command, without if kind.is_per_run else runs))
    without = [run for run in runs if not run.metrics]
    return lines + [_missing_line("training curves", TRAIN, [run]) for run in without]


def read_picture(run: Run, file: str) -> bytes | None:
    """Return the bytes of a PNG that a record names, or None where there is no such file.

    Raises:
      ValueError: the name leads out of the run's results, or the file is no PNG.
    """
    folder = (pathlib.Path(run.workdir) / RESULTS_DIR).resolve()
    for path in ((folder / file).resolve(), (folder / "pictures" / file).resolve()):
        if not path.is_relative_to(folder):
            raise ValueError(f"{run.workdir}: expected pictures inside {folder}, got {file!r}; make the pictures again")
        if path.is_file():
            content = path.read_bytes()
            if not content.startswith(PNG_SIGNATURE):
                raise ValueError(f"{path}: expected a PNG file, got other bytes; make the pictures again")
            return content
    return None


def _missing_line(shows, command, runs):
    workdirs = ",".join(run.workdir for run in runs)
    return f"{shows}: {', '.join(run.label for run in runs)}", command.format(workdirs=workdirs)


def _read_run(workdir, label):
    folder = pathlib.Path(workdir) / RESULTS_DIR
    if not pathlib.Path(workdir).is_dir():
        raise ValueError(f"--workdirs: no such directory: {workdir}")
    found = {path.stem: _read_json(path) for path in sorted(folder.glob("*.json"))}
    records = {name: record for name, record in found.items() if record.get("kind") in KINDS}
    if not records:
        command = KINDS["evaluation"].command.format(workdirs=workdir)
        raise ValueError(f"{workdir} has no results to report (looked for {folder}/*.json); first run: {command}")
    for name, record in records.items():
        _check_fields(folder / f"{name}.json", record)
    metrics = _read_metrics(pathlib.Path(workdir) / METRICS_FILE)
    return Run(workdir, label, records, metrics, tuple(sorted(found.keys() - records.keys())))


def _check_fields(path, record):
    kind = KINDS[record["kind"]]
    absent = [field for field in kind.fields if field not in record]
    absent += [f"cells[].{f}" for f in CELL_FIELDS if any(f not in cell for cell in record.get("cells", ()))]
    if absent:
        raise ValueError(f"{path}: a record of kind {record['kind']} needs {', '.join(absent)}; make it again")


def _read_json(path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); make it again") from error
    return record if isinstance(record, dict) else {}


def _read_metrics(path):
    """Return the whole lines of metrics.jsonl; the last one may be torn by a kill, and an absent file has none."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines
