"""Progress of every long loop, on standard error: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from common.logs import visible

Item = TypeVar("Item")

# Without a terminal, as under a scheduler: often enough to see that it moves, and a night's log
# stays within a thousand lines.
_LINE_EVERY_S = 30.0

# The time left is estimated from the steps of the last minute: a resumed run passes over what is
# done in no time, and a longer window would promise that pace for the rest.
_ESTIMATE_S = 60.0

# A person who has heard nothing for two seconds wonders whether it hangs. At half, every slow
# answer is announced; at double, the word comes when one has reached for Ctrl-C.
_SILENT_S = 1.5

# From this width on a bar has its full length; below, notes need the room.
_WIDE = 100


class Bar:
    """One running bar."""

    def __init__(
        self, progress: Progress, task: TaskID, line_every_s: float = _LINE_EVERY_S
    ) -> None:
        self._progress, self._id, self._line_every_s = progress, task, line_every_s
        self._task = next(each for each in progress.tasks if each.id == task)
        self._line_due = time.monotonic() + line_every_s

    def advance(self, steps: int = 1) -> None:
        self.update(int(self._task.completed) + steps)

    def note(self, text: str) -> None:
        """Show a short text behind the bar, for example the loss."""
        self.update(int(self._task.completed), text)

    def update(self, done: int, note: str | None = None, total: int | None = None) -> None:
        """Show how many steps are done; a note or a total of None stays as it is."""
        if note is None:
            note = str(self._task.fields["note"])
        self._progress.update(self._id, completed=done, total=total, note=note)
        now = time.monotonic()
        shown = self._progress.disable or self._progress.console.is_terminal
        if not shown and now >= self._line_due:
            self._line_due = now + self._line_every_s
            self._progress.console.print(self._line(), soft_wrap=True)

    def _line(self) -> str:
        task = self._task
        of = f" of {int(task.total):,}" if task.total is not None else ""
        remaining_s, rate_hz = task.time_remaining, task.speed
        parts = [
            f"{task.description.strip()}: {int(task.completed):,}{of}",
            f"{rate_hz:.3g}/s" if rate_hz else "",
            f"{timedelta(seconds=int(remaining_s))} left" if remaining_s is not None else "",
            str(task.fields["note"]),
        ]
        return ", ".join(part for part in parts if part)


class Bars:
    """Several bars, one under the other."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def add(self, description: str, total: int | None = None) -> Bar:
        """Add a bar; a total of None is not known yet."""
        return Bar(self._progress, self._progress.add_task(description, total=total, note=""))


class _Note(TextColumn):
    """The last column: what does not fit the terminal is cut off."""

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


def on_console(console: Console, *, enabled: bool = True) -> Progress:
    """Return bars for a console; the note is cut off if a row is too wide."""
    whole = Column(no_wrap=True)
    return Progress(
        TextColumn("{task.description}", table_column=whole),
        BarColumn(bar_width=24 if console.width >= _WIDE else 10, table_column=whole),
        MofNCompleteColumn(table_column=whole),
        TimeElapsedColumn(table_column=whole),
        TimeRemainingColumn(table_column=whole),
        _Note("{task.fields[note]}", table_column=Column()),
        console=console,
        speed_estimate_period=_ESTIMATE_S,
        disable=not enabled,
    )


@contextmanager
def progress_bars(*, enabled: bool = True) -> Iterator[Bars]:
    """Show bars while the block runs; without a terminal, a line of each now and then."""
    with on_console(Console(stderr=True, highlight=False), enabled=enabled) as progress:
        yield Bars(progress)


@contextmanager
def progress_bar(description: str, total: int | None, *, enabled: bool = True) -> Iterator[Bar]:
    with progress_bars(enabled=enabled) as bars:
        yield bars.add(description, total)


def track(items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    """Pass items on, and show how many have passed."""
    with progress_bar(description, total) as bar:
        for item in items:
            yield item
            bar.advance()


def notice(text: str, *, enabled: bool = True) -> None:
    """Write one line for the person at the terminal, on standard error."""
    if enabled:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(visible(text))


@contextmanager
def told_if_long(text: str, after_s: float = _SILENT_S) -> Iterator[None]:
    """Write one line if the block takes long, such as while a server does not answer."""
    timer = threading.Timer(after_s, notice, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
