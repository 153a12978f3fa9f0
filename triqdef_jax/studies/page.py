"""The tables of a study as a page, as Markdown, as LaTeX and for a terminal; printed figures are grey wherever colour is to be had."""

import collections
import html
import importlib.resources

from triqdef_jax.report import markup, table
from triqdef_jax.report.page import POLICY
from triqdef_jax.report.plaintext import LATEX_HEAD
from triqdef_jax.report.table import Table
from triqdef_jax.studies import tables

# Our rows have no heading, so that what follows one was printed.
GREY = "tr.group ~ tr td, tr.group ~ tr td b, tr.group ~ tr th, tr.group ~ tr th b { color: var(--soft); font-weight: 400; }"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def to_html(record: dict, report_file: str) -> str:
    """Return the page of a study; it opens from disk without a network. `report_file` is the page of all runs, beside it."""
    style = importlib.resources.files(markup.__package__).joinpath("style.css").read_text(encoding="utf-8")
    title = _title(record)
    link = html.escape(report_file, quote=True)
    parts = [
        *(f'<p class="{css}">{markup.text(words)}</p>' for css, words in _said(record)),
        f'<p>Everything that was measured on each run: <a href="{link}">{link}</a>.</p>',
        *(table.to_html(made, css_class="matrix") for made in tables.make(record)),
        markup.fold("Commands, settings and hashes of the runs", _provenance(record)),
        markup.fold("Definitions", markup.definitions(record["definitions"])),
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{markup.text(title)}</title>\n<style>\n{style}\n{GREY}\n</style>\n</head>\n<body>\n<main>",
            f"<h1>{markup.text(title)}</h1>",
            *parts,
            "</main>\n</body>\n</html>\n",
        ]
    )


def to_markdown(record: dict) -> str:
    """Return the study as Markdown."""
    said = [f"- {table.escape_markdown(words)}" for _, words in _said(record)]
    made = (table.to_markdown(made) for made in tables.make(record))
    return "\n".join([f"# {table.escape_markdown(_title(record))}", "", *said, "", *made])


def to_latex(record: dict) -> str:
    """Return all tables as LaTeX floats."""
    return LATEX_HEAD + "\n".join(table.to_latex(made) for made in tables.make(record))


def to_text(record: dict, *, is_colour: bool = False) -> str:
    """Return the study for a terminal: figures with their intervals; counts and notes are left to the page.

    Args:
      is_colour: print the paper's figures dim.
    """
    said = [words for _, words in _said(record)]
    return "\n".join([_title(record), *said, "", *(_text_table(made, is_colour) for made in tables.make(record))])


def _text_table(made: Table, is_colour):
    grid = [list(made.columns)]
    for row in made.rows:
        head = f"{row.head}, {row.notes[0]}" if row.notes else row.head
        grid.append([head, *(_text_cell(cell) for cell in row.cells)])
    widths = [max(len(line[place]) for line in grid) for place in range(len(made.columns))]
    lines, group = [made.title], ""
    for line, row in zip(grid, (None, *made.rows), strict=True):
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        text = "  ".join(cells).rstrip()
        if row and row.group != group:
            group = row.group
            lines.append(f"  {group}:")
        lines.append(f"{DIM}{text}{PLAIN}" if group and is_colour else text)
    return "\n".join([*lines, ""])


def _text_cell(cell):
    shown = [note for note in cell.notes if note.startswith(("[", "p "))]
    return " ".join([cell.text, *shown])


def _title(record):
    label = f"{record['label']}. " if record["label"] else ""
    return f"{label}{record['title']}"


def _said(record):
    """Return (css class, sentence) of what a reader must know before the tables."""
    runs = record["runs"]
    bad = [run for run in runs if run["status"] != "done"]
    facts, done = record["facts"], next((run for run in runs if run["status"] == "done"), None)
    where = f", {done['num_images']:,} test images, {done['forward']} forward, {done['device']}" if done else ""
    seeds = (
        f"seed {record['seeds'][0]}" if len(record["seeds"]) == 1 else f"seeds {', '.join(map(str, record['seeds']))}"
    )
    about = f"{facts['data']}, {facts['network']}, {facts['epochs']} epochs, {seeds}, evaluation preset {record['preset']}{where}."
    said = [("flagged", f"{record['label']}.")] if record["label"] else []
    said.append(("meta", about))
    said += [("flagged", f"{run['name']} has no figures: {run['status']}.") for run in bad]
    flags = [f"{run['name']}: {_counted(run['flags'])}" for run in runs if run.get("flags")]
    if flags:
        words = f"Flags raised (on how many attacks): {'; '.join(flags)}. The page of all runs names them."
        said.append(("flagged", words))
    return said


def _counted(flags):
    """Return each flag once, with how often it was raised: 'no better than noise at 32 (3)'."""
    return ", ".join(f"{flag} ({count})" for flag, count in collections.Counter(flags).items())


def _provenance(record):
    names = ("command", "workdir", "config_hash", "seed", "step", "device", "status")
    return "".join(
        f"<h3>{markup.text(run['name'])}</h3>{markup.definitions({name: run.get(name) for name in names})}"
        for run in record["runs"]
    )
