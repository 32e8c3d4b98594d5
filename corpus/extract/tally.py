"""Results of an extraction: counts, progress, and the file of failures."""

from __future__ import annotations

import json
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from common.progress import progress_bar
from corpus.extract.values import FailedPart, Result
from corpus.records import AtomicLines, Summary


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


class FailureFile:
    """Takes failures as they come and writes them in order at the end of a ``with`` block.

    They wait in a file without a name, which goes with the process however that ends; memory
    holds 16 bytes for each. An exception inside the block leaves the old file as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._indexes = array("q")
        self._offsets = array("q")
        self._waiting = tempfile.TemporaryFile("w+b")  # noqa: SIM115  closed in __exit__

    def __enter__(self) -> FailureFile:
        return self

    def add(self, index: int, failures: Iterable[FailedPart]) -> None:
        """Add the failures of one line of the input."""
        lines = [part.line() for part in failures]
        if lines:
            self._indexes.append(index)
            self._offsets.append(self._waiting.tell())
            self._waiting.write(json.dumps(lines).encode("ascii") + b"\n")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._waiting:
            if kind is None:
                self._publish()

    def _publish(self) -> None:
        order = sorted(range(len(self._indexes)), key=self._indexes.__getitem__)
        with AtomicLines(self.path) as lines:
            for at in order:
                self._waiting.seek(self._offsets[at])
                for line in json.loads(self._waiting.readline()):
                    lines.write(line)
