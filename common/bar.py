"""The progress bar of the long runs."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_WIDTH = 20
_REFRESH_HZ = 4
_ESTIMATE_S = 60
_Bar = TypeVar("_Bar", bound="Bar")


class Bar:
    """A bar on standard error with the time that is left and a note; used with ``with``.

    Args:
        title: What is counted.
        total: How many there are; None where nobody knows.
        rate: Whether a rate is told beside the count.
        shown: Whether there is a bar at all.
    """

    def __init__(
        self, title: str, total: int | None, *, rate: bool = False, shown: bool = True
    ) -> None:
        self.title, self.total = title, total
        self._rate, self._shown = rate, shown
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self: _Bar) -> _Bar:
        if self._shown:
            self._progress = _progress(rate=self._rate)
            self._task = self._progress.add_task(self.title, total=self.total, note="", rate="")
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, done: int, note: str, rate: str = "") -> None:
        """Show how many are done; without a bar nothing happens."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, note=note, rate=rate)


def _progress(*, rate: bool) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=_WIDTH),
        MofNCompleteColumn(),
        *([TextColumn("{task.fields[rate]}")] if rate else []),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True, highlight=False),
        refresh_per_second=_REFRESH_HZ,
        speed_estimate_period=_ESTIMATE_S,
    )
