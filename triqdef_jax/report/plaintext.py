"""The figures of the report as Markdown and as LaTeX tables, from the very tables of the page."""

from triqdef_jax import grids
from triqdef_jax.report import attack_tables, evidence_tables, first_screen, flags, records, table
from triqdef_jax.report.records import Run
from triqdef_jax.report.table import Table

LATEX_HEAD = "% \\usepackage{booktabs,graphicx} in the preamble; \\input this file.\n"


def markdown(runs: tuple[Run, ...]) -> str:
    """Return title, verdicts, flags, all tables and what is missing as Markdown."""
    evaluations = records.of_kind(runs, "evaluation")
    said = [first_screen.verdict(label, record) for label, record in records.headline(evaluations).items()]
    for flag in flags.collect(evaluations):
        said.append(f"flag: {flag.name}{': ' * bool(flag.meaning)}{flag.meaning} ({'; '.join(flag.places)})")
    found = records.of_kind(runs, "sensitivity")
    said += [f"{label}: {grids.sentence(record['against_seeds'])}" for label, record in found.items()]
    said += [f"not run: {label}: {row['attack']}: {row['reason']}" for label, row in _not_run(evaluations)]
    said += [f"not made yet: {what}: {command}" for what, command in records.missing(runs)]
    title = f"# Robustness report: {table.escape_markdown(', '.join(run.label for run in runs))}"
    lines = [title, "", *(f"- {table.escape_markdown(words)}" for words in said)]
    return "\n".join([*lines, "", *(table.to_markdown(made) for made in tables(runs))])


def latex(runs: tuple[Run, ...]) -> str:
    """Return all tables as LaTeX floats."""
    return LATEX_HEAD + "\n".join(table.to_latex(made) for made in tables(runs))


def tables(runs: tuple[Run, ...]) -> list[Table]:
    """Return the tables of the page in its order, without the single pairs of the similarity measures."""
    evaluations = records.of_kind(runs, "evaluation")
    made: list[Table | None] = []
    if evaluations:
        chosen = records.headline(evaluations)
        made += [attack_tables.summary(chosen), attack_tables.summary(chosen, is_trained=False)]
        made += [attack_tables.robust(chosen)]
    for build in (attack_tables.matrix, attack_tables.controls, attack_tables.seen):
        made += [build(label, record) for label, record in evaluations.items()]
    for record in evaluations.values():
        made += [attack_tables.success_numbers(cell, record) for cell in record["cells"]]
    made += [evidence_tables.comparison(record) for record in records.of_kind(runs, "comparison").values()]
    made += [evidence_tables.seeds(record) for record in records.of_kind(runs, "seeds").values()]
    for label, record in records.of_kind(runs, "alignment").items():
        made += [evidence_tables.alignment_means(label, record)] if record.get("groups") else []
        made += [evidence_tables.alignment_counts(label, record), evidence_tables.prediction(label, record)]
        made += [evidence_tables.transfer(label, moved) for moved in record.get("transfer", ())]
    for label, record in records.of_kind(runs, "curves").items():
        made += [evidence_tables.curve(label, curve) for curve in record["curves"]]
    for label, record in records.of_kind(runs, "sensitivity").items():
        made += [evidence_tables.sensitivity(label, record, field) for field in ("success", "clean_accuracy")]
    return [table for table in made if table is not None]


def _not_run(evaluations):
    return [(label, row) for label, record in evaluations.items() for row in record.get("not_run", ())]
