"""The main of the four scripts."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from common.cli import exit_code
from common.logs import configure_logs
from corpus.extract.options import Options, parse
from corpus.extract.tally import FailureFile, Tally, watch
from corpus.extract.values import WANTED, Entry, Kind, Result
from corpus.extract.work import Inputs
from corpus.records import Summary, check_holds_post
from corpus.runs import Interrupt


class Engine(Protocol):
    """What runs the extractors: see `local` and `on_ray`."""

    def open(self) -> None:
        """Get ready; raises ConfigError where it cannot be."""
        ...

    def run(self, entries: Iterable[Entry]) -> Iterator[Result]:
        """One result for each entry, in any order; fewer after an interruption."""
        ...

    def close(self) -> None:
        """End what was begun."""
        ...


def main(kind: Kind, arguments: Sequence[str] | None = None) -> int:
    """Extract; 0 done, 2 the input is wrong, 1 anything else."""
    return exit_code(
        f"extract_{kind}_features",
        lambda: _run(parse(kind, arguments)),
        interrupted="interrupted; run it again to go on",
        again="; run it again to go on",
    )


def _run(options: Options) -> int:
    settings = options.settings
    configure_logs(settings.log.format, settings.log.level)
    check_holds_post(options.posts, options.limit)  # before models are loaded for nothing
    wanted = WANTED[options.kind]
    inputs = Inputs(options.posts, settings, wanted, manifest=options.manifest, limit=options.limit)
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
    _tell(tally.close(), tally, options)
    return 0


def _engine(options: Options, interrupt: Interrupt) -> Engine:
    if options.engine == "ray":
        from corpus.extract.on_ray import RayEngine

        return RayEngine(options, interrupt)
    from corpus.extract.local import LocalEngine

    return LocalEngine(
        options.settings,
        options.features,
        WANTED[options.kind],
        force=options.force,
        retry_failed=options.retry_failed,
        interrupt=interrupt,
    )


def _tell(summary: Summary, tally: Tally, options: Options) -> None:
    tally.record.write(options.summary)
    summary.show()
    for node, count in sorted(tally.nodes.items()):
        sys.stdout.write(f"node {node}: {count:,} posts\n")
    if summary.failures:
        sys.stdout.write(f"what failed, and why: {options.failures}\n")
