"""What an extraction shows: a bar while it runs, and what became of the posts at the end."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from common.bar import Bar
from corpus.extract.values import Result
from corpus.records import Summary

_LINE_EVERY_S = 30.0


class Tally:
    """Counts results.

    Attributes:
        summary: Of this run, for the terminal.
        record: Of the posts, whichever run did them: the same however often one was killed.
    """

    def __init__(self, title: str) -> None:
        self.summary = Summary(title)
        self.record = Summary(title)
        self.nodes: Counter[str] = Counter()
        self._statuses: Counter[str] = Counter()

    def add(self, result: Result) -> None:
        """Count one result."""
        if result.failures:
            self.summary.failed(result.failures[0].reason)
            self.record.failed(result.failures[0].reason)
        elif result.state == "repeated":
            self.summary.skipped("the same post_id again")
            self.record.skipped("the same post_id again")
        else:
            self.record.done()
            if result.state == "done":
                self.summary.done()
            else:
                self.summary.skipped("there already")
        self._statuses.update(f"{m} {status}" for m, status in result.statuses.items())
        if result.state == "done" and result.node:
            self.nodes[result.node] += 1

    def close(self) -> Summary:
        """The summary, with the counts of modalities; the record has them too."""
        self.summary.facts = {name: self._statuses[name] for name in sorted(self._statuses)}
        self.record.facts = dict(self.summary.facts)
        return self.summary


class ResultBar(Bar):
    """A bar with rate and time left; lines where standard error is no terminal."""

    def __init__(self, title: str, total: int) -> None:
        self._terminal = sys.stderr.isatty()
        super().__init__(title, total, rate=True, shown=self._terminal)
        self._number = total
        self._done = self._there = self._failed = 0
        self._began = self._line_due = 0.0

    def watch(self, results: Iterable[Result]) -> Iterator[Result]:
        """Pass results on and show how far they are."""
        self._began = time.monotonic()
        self._line_due = self._began + _LINE_EVERY_S
        for result in results:
            self._done += 1
            self._there += result.state == "there"
            self._failed += bool(result.failures)
            self._show()
            yield result

    def _show(self) -> None:
        now = time.monotonic()
        # What was there already costs nothing, and says nothing of how long the rest will take.
        rate_hz = (self._done - self._there) / max(now - self._began, 1e-9)
        note = f"{self._there:,} there, {self._failed:,} with failures"
        if self._terminal:
            self.update(self._done, note, f"{rate_hz:.1f} posts/s")
        elif now >= self._line_due:
            self._line_due = now + _LINE_EVERY_S
            left = (self._number - self._done) / rate_hz if rate_hz > 0 else float("inf")
            ends = f", {left / 60:.0f} min left" if left < 1e8 else ""
            sys.stderr.write(
                f"{self.title}: {self._done:,} of {self._number:,}, {note}, "
                f"{rate_hz:.1f} posts/s{ends}\n"
            )
            sys.stderr.flush()
