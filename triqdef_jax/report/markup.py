"""Pieces of HTML that several sections are made of; every word from a record is escaped here."""

import html


def text(words: object) -> str:
    """Return words with the characters that HTML gives a meaning escaped; not for attributes."""
    return html.escape(str(words), quote=False)


def fold(title: str, body: str) -> str:
    """Return HTML that opens when its title is pressed."""
    return f"<details><summary>{text(title)}</summary>{body}</details>"


def beside(parts: list[str]) -> str:
    """Return pieces of HTML side by side where there is room, else below one another; empty where all are."""
    return f'<div class="beside">{"".join(parts)}</div>' if any(parts) else ""


def definitions(values: dict) -> str:
    """Return names and values as a list; dicts are written as `name: value`, absent values left out."""
    rows = [
        f"<dt>{text(str(name).replace('_', ' '))}</dt><dd>{text(_plain(value))}</dd>"
        for name, value in values.items()
        if value not in (None, "", {})
    ]
    return f"<dl>{''.join(rows)}</dl>"


def _plain(value):
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_plain(inner)}" for name, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
