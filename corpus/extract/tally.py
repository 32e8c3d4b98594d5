"""What an extraction shows: a bar while it runs, and what became of the posts at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator

from common.progress import progress_bar
from corpus.extract.values import Result
from corpus.records import Summary


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


def watch(results: Iterable[Result], title: str, total: int) -> Iterator[Result]:
    """Pass results on, and show how far they are."""
    began = time.monotonic()
    done = existing = failed = 0
    with progress_bar(title, total) as bar:
        for result in results:
            done += 1
            existing += result.state == "there"
            failed += bool(result.failures)
            # What was there already costs nothing: it would spoil the rate.
            rate_hz = (done - existing) / max(time.monotonic() - began, 1e-9)
            bar.update(done, f"{existing:,} there, {failed:,} with failures, {rate_hz:.1f} posts/s")
            yield result
