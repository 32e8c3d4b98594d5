"""The progress of a run: how much is done, at what rate, and when it will end."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_WINDOW_S = 15.0
_EVERY_S = 0.2


class Rate:
    """Amounts over the last seconds."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, float, float]] = deque()

    def of(self, now: float, files: float, size_bytes: float) -> tuple[float, float]:
        """Files and bytes a second, given how many there are in all by now."""
        self._marks.append((now, files, size_bytes))
        while len(self._marks) > 2 and now - self._marks[1][0] >= _WINDOW_S:
            self._marks.popleft()
        then, files_then, bytes_then = self._marks[0]
        seconds = max(now - then, 1e-9)
        return (files - files_then) / seconds, (size_bytes - bytes_then) / seconds


class Meter:
    """A bar on standard error with rate and ETA; used with ``with``.

    Attributes:
        files: Downloaded in this run.
        size_bytes: Of these.
        failed: Failed in this run.
    """

    def __init__(self, description: str, total: int | None) -> None:
        self.files = self.size_bytes = self.failed = 0
        self._rate = Rate()
        self._shown_at = 0.0
        self._description, self._total = description, total
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Meter:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True, highlight=False),
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(self._description, total=self._total, note="")
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

    def show(self, posts_done: float, *, last: bool = False) -> None:
        """Bring the bar up to date, a few times a second at most."""
        now = time.monotonic()
        if self._progress is None or self._task is None:
            return
        if not last and now - self._shown_at < _EVERY_S:
            return
        self._shown_at = now
        files_hz, bytes_hz = self._rate.of(now, self.files, self.size_bytes)
        note = f"{self.files:,} files, {self.failed:,} failed"
        note += f", {files_hz:,.1f} files/s, {bytes_hz / 1e6:,.1f} MB/s"
        self._progress.update(self._task, completed=int(posts_done), note=note)
