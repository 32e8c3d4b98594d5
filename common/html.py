"""HTML pages of reports: one file each, that needs no network, no script and no other file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_SHARED = Path(__file__).parent / "templates"


class Advice(NamedTuple):
    """One step to take next: a sentence with the figures behind it, and a command."""

    text: str
    command: str = ""


def command(*words: object) -> str:
    """Return a command line for a shell; words in capitals are for the reader to replace."""
    return shlex.join(str(word) for word in words)


def counted(count: int, noun: str) -> str:
    """Return a number of things: 1 tag, 1,200 tags."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def render(template: Path, **values: Any) -> str:
    """Return the page that a template ``*.html.j2`` makes; every text in it is escaped.

    The template extends ``base.html.j2`` and finds the macros of ``parts.html.j2``.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, _SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"anchor": _anchor, "cell": _cell}
    return environment.get_template(template.name).render(**values)


def _anchor(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def _cell(value: object) -> str:
    """Return a value as a table shows it: three decimals for fractions, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
