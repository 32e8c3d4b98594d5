"""The cache in the real pool: posts without downloads, and a cache that dies, hangs or lies."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.files import new_folder
from common.post import Features, Post
from config.settings import Settings
from tests.integration.workers.test_cached_posts import NAMES, World, files, same
from tests.support.services import RedisServer
from tests.support.tiny_models import tiny_features
from tests.support.workers.driving import Driver, alive, toy_settings
from tests.support.workers.small_bundle import write_bundle
from workers.plan import PostPlan, Step
from workers.pool.supervisor import ROLES, pinned_environment, without_credentials, worker_specs
from workers.protocol import Decoded, FuseTask, WorkerRole

__all__ = ["files"]


def pool_settings(folder: Path, world: World, **cache: Any) -> Settings:
    features = tiny_features(ocr=False)
    from extractors.suite import ExtractorSuite

    suite = ExtractorSuite(features, threads=1)
    suite.load()
    for seed, name in enumerate(("bundle", "another")):
        write_bundle(folder / name, suite, seed=seed)
    suite.close()
    return toy_settings(
        folder / "spool",
        fetch={"allow_private_hosts": True, "total_timeout_s": 30},
        features=features.model_dump(),
        decode={"memory_mb": 600},
        fusion={"bundle": str(folder / "bundle"), "reload_s": 0.3},
        cache={"url": str(world.cache), **cache},
    )


@contextmanager
def running(settings: Settings) -> Iterator[Driver]:
    driver = Driver(settings, ROLES).start()
    try:
        yield driver
        driver.until(lambda: not driver.pool._scheduler.busy)
        assert driver.free_slots == 4
        spool = driver.pool._spool
        assert spool is not None
        assert [path.name for path in spool.folder.iterdir()] == ["lock"]
    finally:
        driver.stop()


def through(driver: Driver, *posts: Post) -> list[Features]:
    """Walk the plans of posts on the pool, as the King does."""
    features = driver.pool._settings.features
    plans = [PostPlan(post, features, max_media=20, cache=True) for post in posts]
    steps: dict[int, tuple[PostPlan, Step]] = {}

    def submit(plan: PostPlan, some: list[Step], ended: Step | None = None) -> None:
        if ended is not None and ended.path and ended.path not in [s.path for s in some]:
            Path(ended.path).unlink()
        for step in some:
            steps[driver.submit(step.task)] = (plan, step)

    for plan in plans:
        submit(plan, plan.start())
    while steps:
        driver.until(lambda: any(driver.outcome(i) for i in steps))
        for task_id in [i for i in steps if driver.outcome(i)]:
            (plan, step), event = steps.pop(task_id), driver.outcome(task_id)
            result = getattr(event, "result", None)
            if result is None:
                submit(plan, plan.failed(step, getattr(event, "failure")), step)  # noqa: B009
                continue
            submit(plan, plan.done(step, result), step)
            if isinstance(result, Decoded) and result.parts:
                driver.pool.release(result.parts[0].ref.slot)
    return [plan.features() for plan in plans]


@pytest.fixture
def world(files: Path, tmp_path: Path) -> Iterator[World]:
    made = World(files, tmp_path)
    try:
        yield made
    finally:
        if made.thread.is_alive():
            made.close()


def settled(world: World, least: int) -> None:
    """Wait until what is written behind is there."""
    end = time.monotonic() + 60
    while sum(1 for p in world.cache.rglob("*") if p.is_file()) < least:
        assert time.monotonic() < end
        time.sleep(0.02)


def replaced(driver: Driver, pid: int) -> bool:
    """Another process than this is the cache worker."""
    worker = next(w for w in driver.pool.workers if w.name == "cache-0")
    return worker.pid not in (None, pid)


def test_two_pools_share_one_cache(world: World, tmp_path: Path) -> None:
    """With the server gone another pool gives the same tags, and another bundle's too."""
    settings = pool_settings(tmp_path, world)
    posts = [world.post(*NAMES), world.post("sign.png"), world.post("v.mp4", "s.wav")]
    with running(settings) as one, running(settings) as two:
        plain = through(one, *posts)
        settled(world, 3 + 4 + 4 + 1)  # URLs, what decoding gave, image video audio audio, text
        world.close()
        tags = one.run(FuseTask(plain[0]))
        for driver in (one, two):
            found = through(driver, *posts)
            for known, again in zip(plain, found, strict=True):
                same(known, again)
            again = driver.run(FuseTask(found[0]))
            assert [tag.name for tag in again.tags] == [tag.name for tag in tags.tags]
            assert np.array_equal(again.scores, tags.scores)
        before = two.pool.bundle
        with new_folder(tmp_path / "bundle") as new:
            shutil.copytree(tmp_path / "another", new, dirs_exist_ok=True)
        two.until(lambda: two.pool.bundle != before)
        other = two.run(FuseTask(through(two, posts[0])[0]))
        assert (other.model, other.version) == two.pool.bundle
        assert not np.array_equal(other.scores, tags.scores)
        idle = [w for w in two.pool.workers if w.role in ("fetch", "decode")]
        assert all(worker.done == 0 for worker in idle)


def test_cache_worker_dies(world: World, tmp_path: Path) -> None:
    """Killed, stopped or killed again: posts go on without it, and with it when it is back."""
    settings = pool_settings(tmp_path, world, timeout_s=0.5, retry_s=0.5)
    post = world.post("sign.png")
    with running(settings) as driver:
        [first] = through(driver, post)
        settled(world, 4)
        for number in (signal.SIGKILL, signal.SIGSTOP):
            pid = driver.pid("cache-0")
            os.kill(pid, number)
            started = time.monotonic()
            [again] = through(driver, post)
            assert time.monotonic() - started < 40
            same(first, again)
            driver.until(partial(replaced, driver, pid))
            assert not alive([pid])
            driver.ready()
        before = world.downloads["sign.png"]
        [known] = through(driver, post)
        same(first, known)
        assert world.downloads["sign.png"] == before


def test_cache_that_hangs(world: World, tmp_path: Path) -> None:
    """A Redis that has stopped costs a time-out once, and then nothing until it is tried again."""
    server = RedisServer(tmp_path / "redis")
    server.start()
    settings = pool_settings(tmp_path, world, url=server.url, timeout_s=3, retry_s=120)
    post = world.post("sign.png")
    try:
        with running(settings) as driver:
            [first] = through(driver, post)
            server.pause()
            started = time.monotonic()
            for _ in range(10):
                same(first, through(driver, post)[0])
            assert time.monotonic() - started < 25, "once for each post is 30 s and more"
            server.resume()
    finally:
        server.close()


def test_who_knows_the_cache() -> None:
    """Decoders, the downloader and fusion are not told the cache's URL, and start without it."""
    settings = toy_settings(Path("spool"), cache={"url": "redis://:hush@host/0"})
    others: tuple[WorkerRole, ...] = ("fetch", "decode", "fuse")
    users: tuple[WorkerRole, ...] = ("cache", "extract")
    for role in others:
        assert "hush" not in without_credentials(settings, role).model_dump_json()
    for role in users:
        assert "hush" in without_credentials(settings, role).model_dump_json()
    assert [s.role for s in worker_specs(settings)].count("cache") == 1
    keys = {"AWS_SECRET_ACCESS_KEY": "hush", "HOME": "/root"}
    for spec in worker_specs(settings):
        known = pinned_environment(spec, keys)
        assert known["HOME"] == "/root"
        assert ("AWS_SECRET_ACCESS_KEY" in known) == (spec.role in users)
    assert "cache" not in [s.role for s in worker_specs(toy_settings(Path("spool")))]
