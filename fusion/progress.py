"""One progress bar for every long loop, on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bar:
    """A running bar: `advance` moves it, `note` changes the text behind it."""

    def __init__(self, progress: Progress, total: int, description: str) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total, note="")

    def advance(self, steps: int = 1) -> None:
        """Move on by some steps."""
        self._progress.advance(self._task, steps)

    def note(self, text: str) -> None:
        """Show a short text behind the bar, for example the loss."""
        self._progress.update(self._task, note=text)


@contextmanager
def progress_bar(description: str, total: int, *, enabled: bool = True) -> Iterator[Bar]:
    """Show a bar while the block runs; where nobody watches, one line at its end."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True, highlight=False),
        disable=not enabled,
    )
    with progress:
        yield Bar(progress, total, description)
