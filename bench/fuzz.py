"""Hostile media and malformed messages through the real daemon, and what becomes of them.

2,000 media files, crafted ones and sound ones damaged at random, are posts of an HTTP server on
loopback, which packs and labels some of its answers wrongly; 500 malformed messages and posts with
IDs of every BSON type lie between theirs on the queue. The daemon is the real one with small models
on the embedded services, but each of its workers answers once with what is no answer. Every post
must end as tagged or as a dead letter, every failure must have a type of ours, and the King must
live, no larger than before.

Apart from that, random IDs of every type go through the codec, and messages with odd AMQP
properties through a RabbitMQ, where there is one.

Run: ``make fuzz``, or ``python bench/fuzz.py [--media 2000 --messages 500 --seed S]``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

from results_file import FOLDER, write_results
from rich.console import Console

from common import errors
from common.progress import progress_bar
from common.tables import print_table

if TYPE_CHECKING:
    from fuzzing.messages import BadMessage
    from fuzzing.site import Site

DOCUMENTED = frozenset({"Exhausted", "DeadlineExceeded"})
"""Types of failures that are no exceptions (docs/security.md)."""
_WARM = 0.1
_STALLED_S = 120
_LOOK_EVERY_S = 0.5
_GROWTH_LIMIT = 0.05


def known_types() -> frozenset[str]:
    """Return every type that a failure may have."""
    ours = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.TaggingError)
    ]
    return DOCUMENTED | set(ours)


@dataclass
class Outcome:
    """The end of the posts and messages.

    Attributes:
        open: IDs without a terminal state.
        untyped: ``{ID: type}`` of failures whose type nobody documents.
        types: How often each type was a reason.
        states: How often each terminal state was reached.
    """

    open: list[str] = field(default_factory=list)
    untyped: dict[str, str] = field(default_factory=dict)
    types: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)

    def failure(self, post_id: str, error: Mapping[str, Any] | None) -> None:
        """Count a reason."""
        name = str((error or {}).get("type") or "nothing")
        self.types[name] += 1
        if name not in known_types() or not (error or {}).get("message"):
            self.untyped[post_id] = name


def outcome_of(site: Site, messages: Sequence[BadMessage]) -> Outcome:
    """Read every post's result and every message's dead letter."""
    outcome = Outcome()
    jobs = {str(job["_id"]): job for job in site.store.client.jobs.find()}
    for document in site.store.client.posts.find({"case": {"$ne": "odd ID"}}):
        post_id, result = str(document["_id"]), document.get("insight") or {}
        status, job = result.get("status"), jobs.get(post_id)
        if status == "tagged" and job is None:
            failed = result.get("failures") or {}
            outcome.states["partial" if failed else "tagged"] += 1
            for failure in failed.values():
                outcome.failure(post_id, failure)
        elif status == "failed" and job is not None and job["state"] == "dead":
            outcome.states["dead letter"] += 1
            outcome.failure(post_id, job.get("last_error"))
        else:
            outcome.open.append(post_id)
    for post_id in site.odd_ids:
        stored, job = site.store.queries.post(post_id), jobs.get(post_id)
        if stored is not None and stored.result is not None and job is None:
            outcome.states["tagged"] += 1
        elif job is not None and job["state"] == "dead":
            outcome.states["dead letter"] += 1
            outcome.failure(post_id, job.get("last_error"))
        else:
            outcome.open.append(post_id)
    for message in messages:
        job = jobs.get(message.key)
        if job is None or job["state"] != "dead":
            outcome.open.append(f"{message.name}: {message.key}")
            continue
        outcome.states["dead message"] += 1
        outcome.failure(message.key, job.get("last_error"))
    return outcome


def drive(site: Site, total: int, timeout_s: float) -> list[tuple[int, int]]:
    """Watch the King until all is done, or nothing is for too long.

    Returns:
        How many had ended, and the King's resident memory in bytes, at every look.
    """
    samples: list[tuple[int, int]] = []
    end, moved, before = time.monotonic() + timeout_s, time.monotonic(), -1
    with progress_bar("fuzz", total) as bar:
        while time.monotonic() < end and time.monotonic() - moved < _STALLED_S:
            resident = site.look_after_king()
            tagged = site.store.client.posts.count_documents({"insight.status": "tagged"})
            done = tagged + site.store.client.jobs.count_documents({"state": "dead"})
            bar.update(done, site.phase())
            if done != before:
                before, moved = done, time.monotonic()
            if resident:
                samples.append((done, resident))
            if done >= total and site.queue_left() == 0:
                break
            time.sleep(_LOOK_EVERY_S)
    return samples


def growth_of(samples: Sequence[tuple[int, int]], total: int) -> float:
    """Return the share by which the King's memory grew after the first tenth of the work."""
    warm = [resident for done, resident in samples if done >= _WARM * total]
    if len(warm) < 2:
        return 0.0
    few = max(1, len(warm) // 9)  # a tenth of the work at either end: one look may be at a peak
    before, after = statistics.median(warm[:few]), statistics.median(warm[-few:])
    return round(after / before - 1, 4)


def report(results: Mapping[str, Any], outcome: Outcome, console: Console) -> None:
    """Return the tables that a person reads."""
    rows = [
        (key.replace("_", " "), f"{value:.2%}" if key == "memory_growth" else value)
        for key, value in results.items()
    ]
    print_table("fuzzing", ("measure", "value"), [*rows, *sorted(outcome.states.items())])
    print_table("reasons", ("type", "posts and messages"), outcome.types.most_common())
    for post_id in outcome.open[:20]:
        console.print(f"without a terminal state: {post_id!r}", markup=False)
    for post_id, name in list(outcome.untyped.items())[:20]:
        console.print(f"untyped: {post_id!r}: {name}", markup=False)


def run(options: argparse.Namespace, folder: Path, console: Console) -> int:
    """Run once; return the exit code."""
    from fuzzing.cases import Cases
    from fuzzing.headers import lost_messages
    from fuzzing.ids import lost_ids
    from fuzzing.messages import bad_messages
    from fuzzing.seeds import make_seeds
    from fuzzing.site import Site

    from common.logs import configure_logs
    from tests.support.services import RabbitMQServer

    configure_logs("auto", "error")
    (folder / "seeds").mkdir(parents=True)
    cases = Cases(make_seeds(folder / "seeds"), options.seed, options.media)
    messages = bad_messages(options.seed, options.messages)
    site = Site(folder, cases, ocr=options.ocr)
    started = time.monotonic()
    try:
        site.publish(messages)
        site.start_king()
        total = options.media + len(site.odd_ids) + len({message.key for message in messages})
        samples = drive(site, total, options.timeout)
        outcome = outcome_of(site, messages)
        queue_left = site.queue_left()
        site.stop_king()
        leftovers = site.spool_files() + queue_left
        lies = site.lies()
    finally:
        site.close()
    lost = lost_ids(options.seed, options.ids)
    headers = options.headers if RabbitMQServer.binary() else 0
    lost += lost_messages(folder / "rabbitmq", options.seed, headers) if headers else []
    results = {
        "media": options.media,
        "messages": options.messages,
        "king_deaths": site.deaths,
        "without_terminal_state": len(outcome.open),
        "untyped": len(outcome.untyped),
        "memory_growth": growth_of(samples, total),
        "ids": options.ids,
        "headers": headers,
        "ids_and_headers_lost": len(lost),
        "worker_lies": lies,
    }
    report(results, outcome, console)
    for each in lost[:20]:
        console.print(f"lost: {each}", markup=False)
    seconds = time.monotonic() - started
    console.print(
        f"{seconds:.0f} s, seed {options.seed}, {leftovers} files and messages left behind"
    )
    console.print(f"written to {write_results('fuzz', 1, results, options.out)}", soft_wrap=True)
    good = lies > 0 and not (site.deaths or outcome.open or outcome.untyped or leftovers or lost)
    return 0 if good and results["memory_growth"] < _GROWTH_LIMIT else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz; 0 when everything held."""
    parser = argparse.ArgumentParser(prog="bench/fuzz.py", description=__doc__.split("\n")[0])
    parser.add_argument("--media", type=int, default=2000, help="hostile files (default: 2000)")
    parser.add_argument("--messages", type=int, default=500, help="bad messages (default: 500)")
    parser.add_argument("--ids", type=int, default=5000, help="random IDs (default: 5000)")
    parser.add_argument("--headers", type=int, default=2000, help="AMQP messages (default: 2000)")
    parser.add_argument("--seed", type=int, default=1, help="decides every byte (default: 1)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds (default: 1800)")
    parser.add_argument("--ocr", action="store_true", help="read the pictures too (slow)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of fuzz.json")
    parser.add_argument("--folder", type=Path, help="work here, and leave what lies there")
    options = parser.parse_args(arguments)
    console = Console(stderr=False)
    if options.folder is not None:
        return run(options, options.folder.resolve(), console)
    with tempfile.TemporaryDirectory(prefix="insighttag-fuzz-") as scratch:
        return run(options, Path(scratch), console)


if __name__ == "__main__":
    sys.exit(main())
