"""Measure the posts per second of the daemon and of each stage, and the King's own work per post.

The daemon is the real one: embedded broker and database, media over HTTP on loopback, every
process. Its models are small ones with random weights and its posts are made here, so that nothing
has to be prepared. The stages are the same posts, one after the other in one process on one thread:
the seconds inside decoding and inside each forward pass, nothing else.

Run: ``python bench/pipeline.py [--posts 120] [--runs 3] [--ocr] [--tree FOLDER]``; with ``--tree``
the daemon is that of another checkout, such as one of an older commit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

import psutil
import yaml
from fuzzing.site import site_settings
from results_file import write_results

from common.logs import configure_logs
from common.post import Post
from config.settings import Settings
from demo.online import PostBox, daemon, media_server, publish_and_wait
from demo.posts.make import make_posts
from demo.posts.plan import plan_posts
from deploy import embedded
from extractors.parts import slot_bytes
from extractors.suite import ExtractorSuite
from fusion.data.data_file import read_whole_posts
from tests.support.workers.small_bundle import write_bundle
from workers.pool.channel import Arena
from workers.post_run import PostPlan, Step
from workers.protocol import DecodeTask, ExtractTask, Fetched, FetchTask, FuseTask
from workers.roles.batched import run_decode, run_extract, run_fuse

MADE = 24  # posts that are made, and repeated under other IDs


class PureWork:
    """Posts taken through decoding and forward passes in this process, and the seconds of each."""

    def __init__(self, settings: Settings) -> None:
        """Load the extractors on one thread, and make a bundle for them."""
        from fusion.infer.inferer import Inferer

        self._settings = settings
        self._suite = ExtractorSuite(settings.features, "cpu", threads=1)
        self._suite.load()
        write_bundle(settings.fusion.bundle, self._suite)
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
        started = perf_counter()
        run_fuse(self._inferer, [FuseTask(features)])
        self.seconds["fuse"] += perf_counter() - started

    def _execute(self, step: Step) -> Any:
        task = step.task
        if isinstance(task, FetchTask):
            return Fetched(task.media.source, 0)
        started = perf_counter()
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
        self.seconds[name] += perf_counter() - started
        return result


def pure_seconds(settings: Settings, posts: list[Post], runs: int) -> dict[str, float]:
    """Median over the runs of the seconds per post, by kind of work."""
    work = PureWork(settings)
    for post in posts[:3]:  # first calls allocate and compile
        work.run(post)
    per_run: list[Mapping[str, float]] = []
    for _ in range(runs):
        work.seconds.clear()
        for post in posts:
            work.run(post)
        per_run.append({name: s / len(posts) for name, s in work.seconds.items()})
    return {name: statistics.median(run[name] for run in per_run) for name in sorted(per_run[0])}


def daemon_runs(
    settings: Settings, folder: Path, n_posts: int, runs: int, tree: Path
) -> tuple[list[float], list[float]]:
    """Return posts per second, and CPU seconds of the King per post, of each run."""
    config, log = folder / "settings.yaml", folder / "daemon.log"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
    os.environ["PYTHONPATH"] = str(tree)
    os.chdir(tree)
    box = PostBox(settings.store)
    rates, king_s = [], []
    with (
        contextlib.closing(box),
        media_server(folder / "posts") as url,
        daemon(["--config", str(config)], settings, log) as child,
    ):
        king = psutil.Process(child.pid)
        for number in range(-1, runs):  # run -1 warms up
            copies = _copies(folder / "posts" / "posts.json", n_posts, number)
            ids = box.put(copies, url)
            before = king.cpu_times()
            _, seconds = publish_and_wait(settings, box, ids, child, log)
            after = king.cpu_times()
            if number >= 0:
                rates.append(n_posts / seconds)
                used = after.user + after.system - before.user - before.system
                king_s.append(used / n_posts)
    return rates, king_s


def _copies(source: Path, n_posts: int, run: int) -> Path:
    """Return a data file of ``n_posts`` posts with IDs of their own."""
    entries = json.loads(source.read_text(encoding="utf-8"))
    copies = [{**entries[i % len(entries)], "post_id": f"bench-{run}-{i}"} for i in range(n_posts)]
    target = source.with_name("copies.json")
    target.write_text(json.dumps(copies), encoding="utf-8")
    return target


def main() -> int:
    """Measure, print, write ``bench/results/pipeline.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--posts", type=int, default=120, help="posts of one run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ocr", action="store_true", help="read the words in pictures, too")
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1])
    options = parser.parse_args()
    configure_logs("pretty", "warning")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        list(make_posts(folder / "posts", plan_posts(MADE, 7, "online"), os.cpu_count() or 1))
        made = site_settings(folder, ocr=options.ocr)
        posts = read_whole_posts(folder / "posts" / "posts.json")
        pure = pure_seconds(made, posts, options.runs)
        try:
            rates, king_s = daemon_runs(
                embedded.resolve(made), folder, options.posts, options.runs, options.tree.resolve()
            )
        finally:
            embedded.stop(made)
    total_s, rate, king = sum(pure.values()), statistics.median(rates), statistics.median(king_s)
    results = {
        "posts": options.posts,
        "ocr": options.ocr,
        "load": [round(x, 1) for x in os.getloadavg()],
        "posts_per_s": round(rate, 2),
        "posts_per_s_runs": [round(r, 2) for r in rates],
        "king_cpu_s_per_post": round(king, 5),
        "stage_posts_per_s": {stage: round(1 / s, 1) for stage, s in pure.items()},
        "pure_s_per_post_sum": round(total_s, 5),
        "ratio": round(rate * total_s, 3),
        "cores": os.cpu_count(),
    }
    print(f"daemon           {rate:8.2f} posts/s  (runs: {', '.join(f'{r:.2f}' for r in rates)})")
    print(f"King             {king * 1000:8.2f} ms of CPU per post")
    for stage, seconds in sorted(pure.items(), key=lambda item: -item[1]):
        print(f"{stage:<16} {1 / seconds:8.1f} posts/s on one thread ({seconds * 1000:.2f} ms)")
    print(f"all stages       {1 / total_s:8.1f} posts/s on one thread ({total_s * 1000:.2f} ms)")
    print(f"written to {write_results('pipeline', options.runs, results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
