"""Measure how long tagging posts again with another bundle takes, with features in the cache.

The daemon is the real one with the demo's config and models: embedded broker and database, media
over HTTP on loopback, every process; all of its files lie in a temporary folder. First pass: the
posts from an empty cache. Then the media server is stopped, another bundle is put in the place of
the first, and ``insighttag retag --bundle-older-than current`` publishes the same posts again.

Run: ``python bench/retag.py [--posts 500] [--runs 1]``; needs the demo (``make demo``).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from results_file import write_results

from common.logs import configure_logs
from config.load import load_settings
from config.settings import Settings
from demo.__main__ import CONFIG, ROOT
from demo.online import alive, daemon, media_server
from deploy import embedded
from king.broker.connect import publish_posts
from king.messages import PostMessage
from king.status import read_health
from scripts import cli

SPLITS = ("train", "valid", "online")
WARM_UP = 16
PATIENCE_S = 600.0
PREFETCH = 512
"""Posts at once: one that is known takes milliseconds, and 32 would wait for the broker."""


@dataclass(frozen=True)
class Pass:
    """One pass over the posts.

    Attributes:
        seconds: From the daemon's taking up of the first post to the last post's tags.
        with_command_s: From the start of the command that publishes.
    """

    seconds: float
    with_command_s: float
    timings_ms: Mapping[str, float]
    modalities: Mapping[str, Mapping[str, str]]
    tags: Mapping[str, Sequence[Mapping[str, Any]]]


def documents(count: int, url: str) -> list[dict[str, Any]]:
    """Return the demo's posts as the database holds them, their media on the server."""
    posts: list[dict[str, Any]] = []
    for split in SPLITS:
        entries = json.loads((ROOT / "posts" / split / "posts.json").read_text(encoding="utf-8"))
        for entry in entries:
            media = {
                kind: [f"{url}/{split}/{name}" for name in entry[kind]]
                for kind in ("images", "videos", "audios")
            }
            posts.append({"_id": entry["post_id"], "text": entry["text"], **media})
    if len(posts) < count:
        raise SystemExit(f"the demo has {len(posts)} posts")
    return posts[:count]


class Bench:
    """The services, the database, and the daemon's command line."""

    def __init__(self, folder: Path, more: Sequence[str]) -> None:
        self.folder = folder
        self.overrides = [
            f"embedded.folder={folder / 'embedded'}",
            f"fetch.spool={folder / 'spool'}",
            f"king.health_file={folder / 'king.json'}",
            f"fusion.bundle={folder / 'bundle'}",
            "fusion.reload_s=0.5",
            f"broker.prefetch={PREFETCH}",
            f"cache.url={folder / 'cache'}",
            *more,
        ]
        self.settings: Settings = load_settings(CONFIG, self.overrides)
        self.arguments = ["--config", str(CONFIG)]
        for override in self.overrides:
            self.arguments += ["--set", override]
        shutil.copytree(ROOT / "bundle", folder / "bundle")
        self.online = embedded.resolve(self.settings)
        store = self.online.store
        self.client: MongoClient[dict[str, Any]] = MongoClient(store.url)
        self.posts = self.client[store.database][store.collection]
        self.log = folder / "daemon.log"

    def close(self) -> None:
        """Stop the services."""
        self.client.close()
        embedded.stop(self.settings)

    def another_bundle(self, child: Any) -> str:
        """Put a bundle of a later version in the place of the first; returns when it is served."""
        from fusion.bundle.bundle import load_bundle, save_bundle

        bundle = load_bundle(self.folder / "bundle")
        for parameter in bundle.model.parameters():  # none learns: it was loaded
            parameter.mul_(1.01)
        version = save_bundle(self.folder / "bundle", bundle)
        self.until(child, lambda: self._served() == version, "the new bundle")
        return version

    def _served(self) -> str | None:
        health = read_health(self.settings.king.health_file) or {}
        return (health.get("bundle") or {}).get("version")

    def _tagged(self) -> int:
        health = read_health(self.settings.king.health_file) or {}
        return int(health.get("posts_tagged") or 0)

    def until(self, child: Any, done: Callable[[], bool], what: str) -> None:
        """Wait, and see that the daemon lives."""
        end = time.monotonic() + PATIENCE_S
        while not done():
            alive(child, self.log)
            if time.monotonic() > end:
                raise SystemExit(f"{what}: not within {PATIENCE_S:.0f} s")
            time.sleep(0.2)

    def version(self) -> str:
        """Return the version of the bundle in the folder."""
        from scripts.commands.retag import current_version

        return current_version(self.settings)

    def one_pass(self, child: Any, ids: Sequence[str], publish: Callable[[], None]) -> Pass:
        """Publish, and wait until every post carries the tags of the bundle in the folder."""
        version = self.version()
        condition = {"$and": [{"_id": {"$in": list(ids)}}, {"insight.version": version}]}
        before, started = self._tagged(), time.time()
        publish()
        # The database is asked when all is done, and not while it is measured.
        self.until(child, lambda: self._tagged() >= before + len(ids), "the posts")
        self.until(child, lambda: self.posts.count_documents(condition) == len(ids), "the posts")
        results = {
            str(d["_id"]): d["insight"] for d in self.posts.find({"_id": {"$in": list(ids)}})
        }
        ends = {i: result["tagged_at"].timestamp() for i, result in results.items()}
        began = min(end - results[i]["timings_ms"]["total"] / 1000 for i, end in ends.items())
        stages = {stage for result in results.values() for stage in result["timings_ms"]}
        return Pass(
            seconds=max(ends.values()) - began,
            with_command_s=max(ends.values()) - started,
            timings_ms={
                stage: statistics.fmean(r["timings_ms"].get(stage, 0) for r in results.values())
                for stage in sorted(stages)
            },
            modalities={post_id: result["modalities"] for post_id, result in results.items()},
            tags={post_id: result["tags"] for post_id, result in results.items()},
        )


def measure(count: int, more: Sequence[str]) -> dict[str, Any]:
    """Measure one run."""
    with tempfile.TemporaryDirectory(prefix="insighttag-retag-") as name:
        bench = Bench(Path(name), more)
        try:
            with daemon(bench.arguments, bench.settings, bench.log) as child:
                first, second = _both(bench, child, count)
        finally:
            bench.close()
    same = first.modalities == second.modalities
    return {
        "posts": count,
        "prefetch": PREFETCH,
        "first_ms_per_post": round(first.seconds / count * 1000, 3),
        "second_ms_per_post": round(second.seconds / count * 1000, 3),
        "second_with_command_ms_per_post": round(second.with_command_s / count * 1000, 3),
        "ratio": round(second.seconds / first.seconds, 4),
        "times_faster": round(first.seconds / second.seconds, 1),
        "same_modalities": same,
        "first_timings_ms": {k: round(v, 2) for k, v in first.timings_ms.items()},
        "second_timings_ms": {k: round(v, 2) for k, v in second.timings_ms.items()},
    }


def _both(bench: Bench, child: Any, count: int) -> tuple[Pass, Pass]:
    with media_server(ROOT / "posts") as url:
        posts = documents(count + WARM_UP, url)
        bench.posts.insert_many(posts)
        warm, ids = [d["_id"] for d in posts[:WARM_UP]], [d["_id"] for d in posts[WARM_UP:]]

        def publish(some: Sequence[str]) -> None:
            publish_posts(bench.online.broker, [PostMessage(i, force=True) for i in some])

        bench.one_pass(child, warm, lambda: publish(warm))
        first = bench.one_pass(child, ids, lambda: publish(ids))
    bench.another_bundle(child)
    bench.one_pass(child, warm, lambda: publish(warm))  # warmed up like the first pass

    def retag() -> None:
        code = cli.run(["retag", "--bundle-older-than", "current", *bench.arguments])
        if code:
            raise SystemExit(code)

    return first, bench.one_pass(child, ids, retag)


def main() -> int:
    """Measure, print, write ``bench/results/retag.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--posts", type=int, default=500)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="override one setting")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    configure_logs("pretty", "warning")
    runs = [measure(options.posts, options.set) for _ in range(options.runs)]
    all_ratios = [run["ratio"] for run in runs]
    runs.sort(key=lambda run: run["ratio"])
    results = {**runs[len(runs) // 2], "ratio_runs": all_ratios}
    for name, value in results.items():
        print(f"{name:<20} {value}")
    if not options.dry:
        print(f"written to {write_results('retag', options.runs, results)}")
    return 0 if results["ratio"] < 1 / 20 and results["same_modalities"] else 1


if __name__ == "__main__":
    sys.exit(main())
