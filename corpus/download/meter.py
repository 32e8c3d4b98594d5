"""The progress of a run: how much is done, at what rate, and when it will end."""

from __future__ import annotations

import time
from collections import deque

from common.progress import Bar

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
    """A bar with the rates of the last seconds.

    Attributes:
        files: Downloaded in this run.
        size_bytes: Of these.
        failed: Failed in this run.
    """

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self.files = self.size_bytes = self.failed = 0
        self._rates = Rate()
        self._shown_at = 0.0

    def show(self, posts_done: float, *, last: bool = False) -> None:
        """Bring the bar up to date, a few times a second at most."""
        now = time.monotonic()
        if not last and now - self._shown_at < _EVERY_S:
            return
        self._shown_at = now
        files_hz, bytes_hz = self._rates.of(now, self.files, self.size_bytes)
        note = f"{self.files:,} files, {self.failed:,} failed"
        note += f", {files_hz:,.1f} files/s, {bytes_hz / 1e6:,.1f} MB/s"
        self._bar.update(int(posts_done), note)
