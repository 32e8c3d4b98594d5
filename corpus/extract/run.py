"""The main of the four extraction scripts: the run, its counts, progress, and file of failures."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, get_args

from common.cli import Script, json_report, say
from common.logs import configure_logs
from common.progress import progress_bar
from corpus.databases import open_scratch
from corpus.extract.options import CommandLine, Options, about, options_of
from corpus.extract.work import MODALITIES_OF, Entry, FailedPart, Inputs, Kind, Result
from corpus.records import AtomicLines, Summary
from corpus.runs import Interrupt
from fusion.data.data_file import check_holds_post


class Tally:
    """Counts of results.

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
        for summary in (self.summary, self.record):
            if result.failures:
                summary.failed(result.failures[0].reason)
            elif result.state == "repeated":
                summary.skipped("the same post_id again")
            elif result.state == "done" or summary is self.record:
                summary.done()
            else:
                summary.skipped("there already")
        self._statuses.update(f"{m} {status}" for m, status in result.statuses.items())
        if result.state == "done" and result.node:
            self.nodes[result.node] += 1

    def tell(self, options: Options) -> None:
        """Write the record, and show the summary; both get the counts of modalities."""
        for summary in (self.summary, self.record):
            summary.figures = dict(sorted(self._statuses.items()))
        self.record.write(options.features / f"summary_{options.kind}.json")
        self.summary.show()
        for node, count in sorted(self.nodes.items()):
            say(f"node {node}: {count:,} posts\n")
        if self.summary.failures:
            say(f"what failed, and why: {options.failures}\n")


def watch(results: Iterable[Result], title: str, total: int) -> Iterator[Result]:
    """Pass results on, and show the progress."""
    began = time.monotonic()
    done = existing = failed = 0
    with progress_bar(title, total) as bar:
        for result in results:
            done += 1
            existing += result.state == "there"
            failed += bool(result.failures)
            # What was there already costs nothing: it would spoil the rate.
            rate_hz = (done - existing) / max(time.monotonic() - began, 1e-9)
            bar.update(done, f"{existing:,} there, {failed:,} failed, {rate_hz:.1f}/s")
            yield result


class FailureFile:
    """A context that takes failures as they come, and writes them in order at its end.

    They wait in a temporary database. An exception inside the block leaves the old file as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._base = open_scratch("", "CREATE TABLE failures (number INTEGER, line TEXT)")

    def __enter__(self) -> FailureFile:
        return self

    def add(self, index: int, failures: Iterable[FailedPart]) -> None:
        rows = ((index, part.line()) for part in failures)
        self._base.executemany("INSERT INTO failures VALUES (?, ?)", rows)

    def __exit__(self, error: object, *_: Any) -> None:
        with contextlib.closing(self._base):
            if error is None:
                with AtomicLines(self.path) as lines:
                    query = "SELECT line FROM failures ORDER BY number, rowid"
                    for (line,) in self._base.execute(query):
                        lines.write(line)


class Engine(Protocol):
    """The interface of `local` and `on_ray`."""

    def open(self) -> None:
        """Get ready; raises ConfigError where it cannot be."""
        ...

    def run(self, entries: Iterable[Entry]) -> Iterator[Result]:
        """Yield one result for each entry, in any order; fewer after an interruption."""
        ...

    def close(self) -> None:
        """End what was begun."""
        ...


def _run(kind: Kind, line: CommandLine) -> None:
    with json_report(line.as_json) as report:
        options = options_of(kind, line)
        summary = extract(options)
        report |= {"features": options.features, **summary.as_dict()}
        report["failures"] = options.failures if summary.failures else None


def _script(kind: Kind) -> Script[CommandLine]:
    return Script(
        f"extract_{kind}_features",
        CommandLine,
        partial(_run, kind),
        about=about(kind),
        interrupted="interrupted; run it again to continue",
        again="; run it again to continue",
    )


COMMANDS: Mapping[Kind, Script[CommandLine]] = {kind: _script(kind) for kind in get_args(Kind)}


def main(kind: Kind, arguments: Sequence[str] | None = None) -> int:
    """Extract; 0 done, 2 the input is wrong, 1 anything else."""
    return COMMANDS[kind].main(arguments)


def extract(options: Options) -> Summary:
    """Extract, show the progress, write what failed, and return the counts of this run.

    Raises:
        KeyboardInterrupt: After a signal; what was done is kept.
    """
    settings = options.settings
    configure_logs(settings.log.format, settings.log.level)
    limit = options.line.limit
    check_holds_post(options.posts, limit)  # before models are loaded for nothing
    manifest = options.line.manifest and options.line.manifest.absolute()
    inputs = Inputs(options.posts, settings, MODALITIES_OF[options.kind], manifest, limit)
    total = inputs.count()
    options.features.mkdir(parents=True, exist_ok=True)
    tally = Tally(f"{options.kind} features")
    with Interrupt() as interrupt, contextlib.closing(_engine(options, interrupt)) as engine:
        engine.open()
        interrupt.patient = True
        with FailureFile(options.failures) as failures:
            for result in watch(engine.run(inputs), tally.summary.title, total):
                tally.add(result)
                failures.add(result.index, result.failures)
            if interrupt.asked:
                # The files of a run tell of all posts, or they are those of the run before.
                raise KeyboardInterrupt
    tally.tell(options)
    return tally.summary


def _engine(options: Options, interrupt: Interrupt) -> Engine:
    if options.line.engine == "ray":
        from corpus.extract.on_ray import RayEngine

        return RayEngine(options, interrupt)
    from corpus.extract.local import LocalEngine

    return LocalEngine(options, interrupt)
