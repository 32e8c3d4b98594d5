"""How fast a queue of IDs that need no work is emptied: a reconciler or a crash leaves such ones.

One post is tagged by the real daemon (small models with random weights); the others get its result.
Then the broker holds all their IDs, and the daemon is started. The clock runs from the first one
that leaves the queue to the last.

Run: ``python bench/backlog.py [--posts 20000] [--broker redis] [--prefetch 32 128]``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

from chaos_rig.run import TIMES
from chaos_rig.site import SERVERS, Site
from results_file import FOLDER, write_results

from common.logs import configure_logs
from tests.support.services import wait_until
from tests.support.tiny_models import tiny_bundle, tiny_features


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="backlog", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--posts", type=int, default=20_000)
    parser.add_argument("--broker", choices=list(SERVERS), default="redis")
    parser.add_argument("--prefetch", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of backlog.json")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, prefetch: int, folder: Path) -> float:
    """Return the IDs per second."""
    bundle, features = folder / "bundle", tiny_features()
    tiny_bundle(bundle, features)
    settings = {**TIMES, "features": features.model_dump(mode="json")}
    settings["fusion"] = {"bundle": str(bundle)}
    settings["broker"] = {**TIMES["broker"], "prefetch": prefetch}
    site = Site(folder, options.broker, settings)
    site.through = site.direct  # proxies are for faults
    ids = [f"post-{i:06d}" for i in range(options.posts)]
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
        waiting = site.messages_left
        site.start_king()
        wait_until(lambda: site.messages_left < waiting, 300, "the daemon to begin")
        first, began = site.messages_left, time.monotonic()
        while left := site.messages_left:
            print(f"\r{left:>8} left", end="", file=sys.stderr, flush=True)
            time.sleep(0.25)
        print(file=sys.stderr)
        return first / (time.monotonic() - began)
    finally:
        site.close()


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; gives the exit code."""
    options = parse(arguments)
    configure_logs("json", "error")
    results = []
    for prefetch in options.prefetch:
        with tempfile.TemporaryDirectory(prefix="backlog-", ignore_cleanup_errors=True) as name:
            rate = round(measure(options, prefetch, Path(name)))
        print(f"{options.broker}, prefetch {prefetch}: {rate} IDs per second")
        results.append({"broker": options.broker, "prefetch": prefetch, "posts": options.posts})
        results[-1]["ids_per_s"] = rate
    print(f"written: {write_results('backlog', 1, results, options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
