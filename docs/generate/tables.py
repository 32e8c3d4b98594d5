"""Tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

CODE = re.compile(r"(`[^`\n]*`)")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; cells are Markdown, and may hold bars."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    # Bars in code separate nothing here, and an escaping backslash would be shown.
    parts = CODE.split(text)
    return "".join(it if it.startswith("`") else it.replace("|", "&#124;") for it in parts)
