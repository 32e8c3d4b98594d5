"""How fast a queue of IDs that need no work is emptied: a reconciler or a crash leaves such ones.

One post is tagged by the real daemon (small models with random weights); the others get its result.
Then the broker holds all their IDs, and the daemon is started. The clock runs from the first one
that the daemon has settled to the last. The settings take turns, on each broker: the machine may be
busier at one time than at another.

Run: ``python bench/backlog.py [--posts 20000] [--runs 3] [--broker redis rabbitmq] [--prefetch auto
32]``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

import psutil
from chaos_rig.run import TIMES
from chaos_rig.site import SERVERS, BrokerName, Site
from results_file import FOLDER, write_results

from common.logs import configure_logs
from tests.support.services import wait_until
from tests.support.tiny_models import tiny_bundle, tiny_features

SETTLED = "king.message_settled"  # the log's event


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="backlog", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--posts", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--broker", choices=list(SERVERS), nargs="+", default=list(SERVERS))
    parser.add_argument("--prefetch", nargs="+", default=["auto", "32"])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of backlog.json")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Passed:
    """A queue that was emptied."""

    ids_per_s: float
    king_ms: float
    """Of the King's CPU for each ID."""


def measure(broker: BrokerName, prefetch: str, posts: int, folder: Path) -> Passed:
    """Empty a queue once."""
    bundle, features = folder / "bundle", tiny_features()
    tiny_bundle(bundle, features)
    settings = {**TIMES, "features": features.model_dump(mode="json")}
    settings["fusion"] = {"bundle": str(bundle)}
    settings["broker"] = {**TIMES["broker"], "prefetch": prefetch}
    site = Site(folder, broker, settings)
    site.through = site.direct  # proxies are for faults
    ids = [f"post-{i:06d}" for i in range(posts)]
    try:
        site.open([{"_id": post_id, "text": "a text about nothing"} for post_id in ids])
        site.start_daemon()
        site.publish(ids[:1])
        wait_until(lambda: ids[0] in site.ends(), 300, "the first post to be tagged")
        assert site.stop_king()[0] == 0
        path = site.direct.store.result_path
        document = site.store.client.posts.find_one({"_id": ids[0]}) or {}
        site.store.client.posts.update_many({}, {"$set": {path: document[path]}})
        for i in range(0, len(ids), 1000):
            site.publish(ids[i : i + 1000])
        settled = site.journal.counts
        before = settled[SETTLED]
        site.start_king()
        wait_until(lambda: settled[SETTLED] > before, 300, "the daemon to begin")
        first, began = settled[SETTLED], time.monotonic()
        king = psutil.Process(site.king_pid)
        used = -sum(king.cpu_times()[:2])
        while (remaining := posts - settled[SETTLED] + before) > 0:
            print(f"\r{remaining:>8} left", end="", file=sys.stderr, flush=True)
            time.sleep(0.05)
        seconds, passed = time.monotonic() - began, settled[SETTLED] - first
        used += sum(king.cpu_times()[:2])
        print(file=sys.stderr)
        return Passed(passed / seconds, used / passed * 1000)
    finally:
        site.close()


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; gives the exit code."""
    options = parse(arguments)
    configure_logs("json", "error")
    results = []
    for broker in options.broker:
        by_prefetch: dict[str, list[Passed]] = {each: [] for each in options.prefetch}
        for prefetch in options.prefetch * options.runs:
            with tempfile.TemporaryDirectory(prefix="backlog-", ignore_cleanup_errors=True) as name:
                passed = measure(broker, prefetch, options.posts, Path(name))
            by_prefetch[prefetch].append(passed)
            print(
                f"{broker}, prefetch {prefetch}: {passed.ids_per_s:.0f} IDs per second, "
                f"{passed.king_ms:.2f} ms of the King's CPU each",
                flush=True,
            )
        for prefetch, runs in by_prefetch.items():
            results.append(
                {
                    "broker": broker,
                    "prefetch": prefetch,
                    "posts": options.posts,
                    "ids_per_s": round(statistics.median(run.ids_per_s for run in runs)),
                    "ids_per_s_runs": [round(run.ids_per_s) for run in runs],
                    "king_cpu_ms_per_id": round(statistics.median(r.king_ms for r in runs), 3),
                    "load": [round(x, 1) for x in os.getloadavg()],
                }
            )
    print(f"written: {write_results('backlog', options.runs, results, options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
