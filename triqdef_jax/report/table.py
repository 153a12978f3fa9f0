"""A table as data, and the same table as HTML, Markdown and LaTeX: every form shows the same figures."""

import html
from typing import NamedTuple

LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


class Cell(NamedTuple):
    """A figure, what stands beside it in small type, its shade as a share in [0, 1] or None, and words that mark it."""

    text: str
    notes: tuple[str, ...] = ()
    level: float | None = None
    marks: tuple[str, ...] = ()


class Row(NamedTuple):
    """A row: its head with notes, one cell per column, and the heading of the rows it belongs to, if any."""

    head: str
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()
    group: str = ""


class Table(NamedTuple):
    """A table: `columns` names the row heads first, then one per cell; `spans` are (heading, number of cells) over them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    spans: tuple[tuple[str, int], ...] = ()


def to_html(table: Table, *, css_class: str = "") -> str:
    """Return the table in a box of its own that scrolls sideways where the screen is narrow."""
    body, group = [], ""
    for row in table.rows:
        if row.group != group:
            body.append(
                f'<tr class="group"><th colspan="{len(table.columns)}"><span>{_text(row.group)}</span></th></tr>'
            )
            group = row.group
        cells = "".join(_html_cell(cell) for cell in row.cells)
        body.append(f'<tr><th scope="row">{_html_words(row.head, row.notes)}</th>{cells}</tr>')
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    title = html.escape(table.title, quote=True)
    return (
        f'<figure class="table {css_class}"><figcaption>{title}</figcaption>'
        f'<div class="scroll" role="region" aria-label="{title}" tabindex="0"><table>\n'
        f"<thead>{_html_head(table)}</thead>\n<tbody>\n" + "\n".join(body) + f"\n</tbody></table></div>{note}</figure>"
    )


def to_markdown(table: Table) -> str:
    """Return the table with its title above; notes follow their figure in the same cell."""
    heads = [table.columns[0], *_flat_columns(table)]
    lines = [f"**{escape_markdown(table.title)}**", ""]
    lines.append("| " + " | ".join(escape_markdown(head) for head in heads) + " |")
    lines.append("|---" * len(heads) + "|")
    for row in _with_groups(table):
        cells = [_line(row.head, row.notes), *(_line(cell.text, cell.notes + cell.marks) for cell in row.cells)]
        lines.append("| " + " | ".join(escape_markdown(cell) for cell in cells) + " |")
    return "\n".join([*lines, *(["", escape_markdown(table.note)] if table.note else [])]) + "\n"


def escape_markdown(text: str) -> str:
    """Return words in one line with the characters that Markdown gives a meaning escaped."""
    for character in "\\|*_<>`[]":  # brackets too: an interval followed by parentheses would become a link
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def to_latex(table: Table) -> str:
    """Return the table as a float in pure ASCII; it needs the packages booktabs and graphicx."""
    heads = [table.columns[0], *_flat_columns(table)]
    rows = []
    for row in _with_groups(table):
        cells = [_line(row.head, row.notes), *(_line(cell.text, cell.notes + cell.marks) for cell in row.cells)]
        rows.append(_latex_row(cells))
    caption = _latex(" ".join(filter(None, (f"{table.title}.", table.note))))
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering",
            f"\\caption{{{caption}}}",
            r"\resizebox{\linewidth}{!}{%",
            f"\\begin{{tabular}}{{{'l' * len(heads)}}}",
            r"\toprule",
            _latex_row(heads),
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    )


def _html_head(table):
    spans = ""
    if table.spans:
        groups = "".join(f'<th colspan="{width}" scope="colgroup">{_text(head)}</th>' for head, width in table.spans)
        spans = f'<tr class="spans"><td></td>{groups}</tr>'
    return spans + "<tr>" + "".join(f'<th scope="col">{_text(name)}</th>' for name in table.columns) + "</tr>"


def _html_cell(cell):
    attributes = "" if cell.level is None else f' class="heat" style="--level:{100 * cell.level:.1f}%"'
    marks = "".join(f' <i class="mark">{_text(mark)}</i>' for mark in cell.marks)
    return f"<td{attributes}>{_html_words(cell.text, cell.notes)}{marks}</td>"


def _html_words(text, notes):
    small = "".join(f" <small>{_text(note)}</small>" for note in notes)
    return f"<b>{_text(text)}</b>{small}"


def _text(words):
    return html.escape(words, quote=False)


def _flat_columns(table):
    """Return the headings of the cells, each after the heading that spans it."""
    if not table.spans:
        return table.columns[1:]
    above = [heading for heading, width in table.spans for _ in range(width)]
    return [f"{heading}: {name}" for heading, name in zip(above, table.columns[1:], strict=True)]


def _with_groups(table):
    """Yield the rows with a row of its own before the first of every group."""
    group = ""
    for row in table.rows:
        if row.group != group:
            yield Row(row.group, (Cell(""),) * len(row.cells))
            group = row.group
        yield row


def _line(text, notes):
    """Return a figure and its notes on one line, an interval without a comma before it."""
    for note in notes:
        text += f" {note}" if note.startswith("[") else f", {note}"
    return text


def _latex_row(cells):
    return " & ".join(_latex(cell) for cell in cells) + r" \\"


def _latex(text):
    """Escape; a leading bracket would be read as an argument of the row before it, so it is braced."""
    escaped = "".join(LATEX_ESCAPES.get(character, character) for character in text)
    escaped = escaped.encode("ascii", "replace").decode()
    return f"{{{escaped}}}" if escaped.startswith(("[", "*")) else escaped
