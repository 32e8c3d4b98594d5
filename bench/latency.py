"""Measure how long a post takes: alone, at 50% and 90% load, and behind many long videos.

The daemon's rate on a full queue comes first; the loads are shares of it, with posts that arrive at
random (Poisson). Latency runs from publishing a post to its ``tagged_at``. Last, a post of one line
is published behind clips of 20 s, with and without priority.

Run: ``python bench/latency.py [--case demo realistic] [--broker rabbitmq] [--posts N] [--rounds 5]
[--clips 100] [--small]``.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

import numpy as np
from chaos_rig.posts import media_server
from floors import finish
from results_file import FOLDER
from rig import BROKERS, Site, site
from workloads import Workload, workload

from common.logs import configure_logs
from common.tables import print_table

Rows: TypeAlias = list[dict[str, Any]]

POSTS = {"demo": 300, "realistic": 40, "tiny": 12}
"""Of each load: the 99th percentile of 300 is the third worst."""
LOADS = (0.5, 0.9)
ALONE = 10  # posts that are tagged one after the other


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="latency", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=list(POSTS), nargs="+", default=["demo", "realistic"])
    parser.add_argument("--broker", choices=BROKERS, default="rabbitmq")
    parser.add_argument("--posts", type=int, help="of each load, instead of 300 and 40")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clips", type=int, default=100, help="that the small post is behind")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of latency.json")
    parser.add_argument("--small", action="store_true", help="one round of few tiny posts")
    options = parser.parse_args(arguments)
    if options.small:
        options.case, options.broker, options.rounds = ["tiny"], "embedded", 1
        options.clips = 3
    return options


def latencies_ms(place: Site, ids: Sequence[str], gaps_s: Sequence[float]) -> list[float]:
    """Publish posts with gaps before each; return the time from each one's publishing to its tags.

    A gap of infinity waits until the post before has ended.
    """
    with place.publisher() as publish:
        published, before, due = {}, place.ended, time.time()
        for i, (post_id, gap_s) in enumerate(zip(ids, gaps_s, strict=True)):
            if gap_s == float("inf"):
                place.wait_for(before + i)
            else:
                due += gap_s
                time.sleep(max(0.0, due - time.time()))
            published[post_id] = publish([post_id], 0)
    place.wait_for(before + len(ids))
    results = place.results(ids)
    return [1000 * (results[i]["tagged_at"].timestamp() - published[i]) for i in ids]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the percentiles as they are written."""
    return {f"p{q}_ms": round(float(np.percentile(values, q)), 1) for q in (50, 95, 99)}


def measure(options: argparse.Namespace, case: Any, made: Workload, place: Site, url: str) -> Rows:
    """Return the rows of one kind of posts; each percentile is the median over the rounds."""
    number, chance = options.posts or POSTS[case], np.random.default_rng(0)
    rounds: dict[str, list[dict[str, float]]] = {}
    counter = itertools.count()

    def posts(count: int) -> list[dict[str, Any]]:
        return made.documents(f"post-{next(counter)}", count, url)

    for _ in range(options.rounds):
        rate = place.load(posts(number)).posts_per_s
        ids = place.insert(posts(min(ALONE, number)))
        alone = percentiles(latencies_ms(place, ids, [float("inf")] * len(ids)))
        alone = {"rate_hz": rate} | alone | {"p95_over_alone": 1.0}
        rounds.setdefault("one at a time", []).append(alone)
        for share in LOADS:
            ids = place.insert(posts(number))
            gaps_s = chance.exponential(1 / (share * rate), len(ids)).tolist()
            figures = percentiles(latencies_ms(place, ids, gaps_s))
            over = figures["p95_ms"] / alone["p50_ms"]
            row = {"rate_hz": share * rate} | figures | {"p95_over_alone": over}
            rounds.setdefault(f"{share:.0%} load", []).append(row)
    return [_row(options, case, load, rows, number) for load, rows in rounds.items()]


def behind_clips(options: argparse.Namespace, made: Workload, place: Site, url: str) -> Rows:
    """Return the rows of a small post that is published behind long videos."""
    rounds: dict[str, list[dict[str, float]]] = {}
    for i, priority in itertools.product(range(options.rounds), (0, 9)):
        clips = made.documents(f"clip-{i}-{priority}", options.clips, url)
        ids = place.insert([{"_id": c["_id"], "videos": c["videos"]} for c in clips])
        [small] = place.insert([{"_id": f"small-{i}-{priority}", "text": "a red cat"}])
        before = place.ended
        place.publish(ids)
        sent_at = place.publish([small], priority)
        place.wait_for(before + len(ids) + 1)
        waited = place.results([small])[small]["tagged_at"].timestamp() - sent_at
        rounds.setdefault(f"priority {priority}", []).append(percentiles([1000 * waited]))
    behind = f"a small post behind {options.clips} clips"
    return [_row(options, behind, load, rows, 1) for load, rows in rounds.items()]


@contextmanager
def serving(options: argparse.Namespace, case: Any) -> Iterator[tuple[Workload, Site, str]]:
    """Run a daemon that has tagged each of its posts once."""
    with tempfile.TemporaryDirectory(prefix="late-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        made = workload(case, folder)
        with (
            media_server(made.folder) as url,
            site(options.broker, made.settings, folder) as place,
            place.kings(),
        ):
            place.load(made.documents("warm", len(made.entries), url))
            yield made, place, url


def _row(
    options: argparse.Namespace, case: str, load: str, rounds: Sequence[Mapping[str, float]], n: int
) -> dict[str, Any]:
    row = {key: round(statistics.median(r[key] for r in rounds), 3) for key in rounds[0]}
    own = {"case": case, "broker": options.broker, "load": load, "posts": n}
    return own | row | {"machine_load": [round(x, 1) for x in os.getloadavg()]}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; gives the exit code."""
    options = parse(arguments)
    configure_logs("json", "error")
    rows: Rows = []
    long: Any = "tiny" if options.small else "realistic"
    for case in options.case:
        with serving(options, case) as daemon:
            rows += measure(options, case, *daemon)
            if case == long:
                rows += behind_clips(options, *daemon)
    if long not in options.case:
        with serving(options, long) as daemon:
            rows += behind_clips(options, *daemon)
    keys = ("case", "load", "posts", "rate_hz", "p50_ms", "p95_ms", "p99_ms", "p95_over_alone")
    cells = [[row.get(key) for key in keys] for row in rows]
    print_table("", [key.replace("_", " ") for key in keys], cells, right=range(2, len(keys)))
    return finish("latency", options.rounds, rows, options.out, check=not options.small)


if __name__ == "__main__":
    sys.exit(main())
