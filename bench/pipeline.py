"""Measure the posts per second that the daemon tags, against the pure work that a post is.

The daemon is the real one with the demo's config, bundle and online posts: embedded broker and
database, media over HTTP on loopback, every process. The pure work is the same posts, one after
the other in one process on one thread: the seconds inside decoding and inside each forward pass,
nothing else. Their product says how many cores' worth of pure work the daemon does.

Run: ``python bench/pipeline.py [--posts 180] [--runs 3]``; prepares the demo when it is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from results_file import write_results

from common.logs import configure_logs
from common.post import Post
from config.load import load_settings
from config.settings import Settings
from demo.__main__ import CONFIG, ROOT
from demo.layout import Layout, Sizes
from extractors.parts import slot_bytes
from fusion.data.data_file import read_whole_posts
from workers.pool.channel import Arena
from workers.post_run import PostPlan, Step
from workers.protocol import (
    DecodeTask,
    ExtractTask,
    Fetched,
    FetchTask,
    FuseTask,
)
from workers.roles.batched import run_decode, run_extract, run_fuse


class PureWork:
    """Take posts through decoding and forward passes in this process, and keeps the time."""

    def __init__(self, settings: Settings) -> None:
        """Load the extractors and the bundle, on one thread."""
        from extractors.suite import ExtractorSuite
        from fusion.infer.inferer import Inferer

        self._settings = settings
        self._suite = ExtractorSuite(settings.features, "cpu", threads=1)
        self._suite.load()
        self._inferer = Inferer.load(settings.fusion.bundle, device="cpu", threads=1)
        self._arena = Arena.private(1, slot_bytes(settings))
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def run(self, post: Post) -> None:
        """Run one post, from its files to its tags."""
        plan = PostPlan(post, self._settings.features, max_media=self._settings.fetch.max_media)
        steps = deque(plan.start())
        while steps:
            step = steps.popleft()
            steps.extendleft(reversed(plan.done(step, self._execute(step))))
        features = plan.features()
        started = time.perf_counter()
        run_fuse(self._inferer, [FuseTask(features)])
        self.seconds["fuse"] += time.perf_counter() - started

    def _execute(self, step: Step) -> Any:
        task = step.task
        if isinstance(task, FetchTask):
            return Fetched(task.media.source, 0)
        started = time.perf_counter()
        if isinstance(task, DecodeTask):
            name = "decode"
            in_slot = DecodeTask(task.kind, task.path, 0)
            settings = self._settings
            result: Any = run_decode(in_slot, settings.features, settings.decode, self._arena)
        elif isinstance(task, ExtractTask):
            name = f"forward_{task.extractor}"
            result = run_extract(self._suite, [task], self._arena)[0]
        else:
            raise TypeError(type(task).__name__)
        self.seconds[name] += time.perf_counter() - started
        return result


def pure_seconds(settings: Settings, posts: list[Post], runs: int) -> dict[str, float]:
    """Median over the runs of the seconds per post, by kind of work."""
    work = PureWork(settings)
    for post in posts[:3]:  # first calls allocate and compile
        work.run(post)
    per_run: list[Mapping[str, float]] = []
    for number in range(runs):
        work.seconds.clear()
        for i, post in enumerate(posts):
            work.run(post)
            _progress(f"pure work, run {number + 1} of {runs}: {i + 1} of {len(posts)} posts")
        per_run.append({name: s / len(posts) for name, s in work.seconds.items()})
    return {name: statistics.median(run[name] for run in per_run) for name in sorted(per_run[0])}


def daemon_rates(settings: Settings, layout: Layout, n_posts: int, runs: int) -> list[float]:
    """Return posts per second of each run, from publishing to the last result in the database."""
    from demo.online import PostBox, daemon, media_server, publish_and_wait

    source = layout.posts("online")
    log = layout.root / "bench.log"
    box = PostBox(settings.store)
    rates = []
    try:
        with (
            media_server(source.parent) as url,
            daemon(["--config", str(CONFIG)], settings, log) as child,
            tempfile.TemporaryDirectory() as folder,
        ):
            for number in range(-1, runs):  # run -1 warms up
                copies = _copies(source, Path(folder) / "posts.json", n_posts, number)
                ids = box.put(copies, url)
                _, seconds = publish_and_wait(settings, box, ids, child, log)
                if number >= 0:
                    rates.append(n_posts / seconds)
    finally:
        box.close()
    return rates


def _copies(source: Path, target: Path, n_posts: int, run: int) -> Path:
    """Return a data file of ``n_posts`` posts with IDs of their own."""
    entries = json.loads(source.read_text(encoding="utf-8"))
    copies = [{**entries[i % len(entries)], "post_id": f"bench-{run}-{i}"} for i in range(n_posts)]
    target.write_text(json.dumps(copies), encoding="utf-8")
    return target


@contextmanager
def _services(settings: Settings) -> Iterator[Settings]:
    from deploy import embedded

    before = any(view.state == "running" for view in embedded.status(settings))
    try:
        yield embedded.resolve(settings)
    finally:
        if not before:
            embedded.stop(settings)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text}\x1b[K")


def main() -> int:
    """Measure, print, write ``bench/results/pipeline.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--posts", type=int, default=180, help="posts of one run")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    configure_logs("pretty", "warning")
    settings = load_settings(CONFIG)
    layout = Layout(ROOT)

    from demo.stages import prepare

    prepare(layout, settings, Sizes(), seed=7)
    pure = pure_seconds(settings, read_whole_posts(layout.posts("online")), options.runs)
    with _services(settings) as online:
        rates = daemon_rates(online, layout, options.posts, options.runs)
    total_s, rate, cores = sum(pure.values()), statistics.median(rates), os.cpu_count() or 1
    ratio = rate * total_s
    results = {
        "posts": options.posts,
        "posts_per_s": round(rate, 2),
        "posts_per_s_runs": [round(r, 2) for r in rates],
        "pure_s_per_post": {name: round(s, 5) for name, s in pure.items()},
        "pure_s_per_post_sum": round(total_s, 5),
        "ratio": round(ratio, 3),
        "cores": cores,
    }
    sys.stderr.write("\n")
    print(f"daemon           {rate:8.2f} posts/s  (runs: {', '.join(f'{r:.2f}' for r in rates)})")
    for name, seconds in sorted(pure.items(), key=lambda item: -item[1]):
        print(f"{name:<16} {seconds * 1000:8.2f} ms per post")
    print(f"{'pure work':<16} {total_s * 1000:8.2f} ms per post, one thread")
    print(f"ratio            {ratio:8.2f} cores' worth of pure work on {cores} cores")
    print(f"written to {write_results('pipeline', options.runs, results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
