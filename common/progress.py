"""One progress bar for every long loop, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Watch: TypeAlias = Callable[[int, int, str], None]
"""Takes steps done, steps in all, and the note: for a bar that another process shows."""


class Bar:
    """A running bar: `advance` moves it, `note` changes the text behind it."""

    def __init__(
        self, progress: Progress, total: int, description: str, watch: Watch | None = None
    ) -> None:
        self._progress, self._watch = progress, watch
        self._done, self._total, self._note = 0, total, ""
        self._task = progress.add_task(description, total=total, note="")

    def advance(self, steps: int = 1) -> None:
        """Move on by some steps."""
        self._progress.advance(self._task, steps)
        self._done += steps
        self._tell()

    def note(self, text: str) -> None:
        """Show a short text behind the bar, for example the loss."""
        self._progress.update(self._task, note=text)
        self._note = text
        self._tell()

    def _tell(self) -> None:
        if self._watch is not None:
            self._watch(self._done, self._total, self._note)


@contextmanager
def progress_bar(
    description: str, total: int, *, enabled: bool = True, watch: Watch | None = None
) -> Iterator[Bar]:
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
        yield Bar(progress, total, description, watch)


def notice(text: str, *, enabled: bool = True) -> None:
    """One line for the person at the terminal, on standard error."""
    if enabled:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text)
