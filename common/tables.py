"""Tables on standard output."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from common.logs import visible

_WHOLE = 36
"""Characters of a UUID, the longest of the usual names."""


def console(width: int = 160) -> Console:
    """Return the terminal; a pipe or a file has a width that keeps rows whole."""
    return Console(width=None if sys.stdout.isatty() else width, highlight=False)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Collection[int] = (),
    width: int = 160,
) -> None:
    """Print a table, `right` its columns of numbers; narrow terminals fold long cells."""
    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        # Text: what users wrote may hold square brackets, which are markup to rich.
        cells = ("" if cell is None else cell for cell in row)
        table.add_row(
            *(cell if isinstance(cell, Text) else Text(visible(str(cell))) for cell in cells)
        )
    screen = console(width)
    if Measurement.get(screen, screen.options, table).maximum >= screen.width:
        table.collapse_padding = True  # a blank less between columns folds fewer cells
        # The first column names a row: it is copied, and in two parts it is not found again.
        names = table.columns[0]
        names.no_wrap = all(cell_len(str(cell)) <= _WHOLE for cell in names.cells)
    screen.print(table)
