"""The cache in the real pool: posts without downloads, and a cache worker that dies."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.files import new_folder
from config.settings import Settings
from tests.integration.workers.test_cached_posts import NAMES, World, files, same
from tests.support.tiny_models import tiny_features
from tests.support.workers.driving import Driver, alive, through, toy_settings
from tests.support.workers.small_bundle import write_bundle
from workers.local import local_runner
from workers.pool.supervisor import ROLES, pinned_environment, without_credentials, worker_specs
from workers.protocol import FuseTask, WorkerRole

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


@pytest.fixture(scope="module")
def world(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(files, tmp_path_factory.mktemp("world"))
    try:
        yield made
    finally:
        if made.thread.is_alive():
            made.close()


@pytest.fixture(scope="module")
def driver(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """One pool of real workers; after all tests it holds no slot and no file."""
    settings = pool_settings(tmp_path_factory.mktemp("pool"), world, timeout_s=3, retry_s=0.5)
    made = Driver(settings, ROLES).start()
    try:
        yield made
        made.holds_nothing()
    finally:
        made.stop()


def settled(world: World, least: int) -> None:
    """Wait until what is written behind is there."""
    end = time.monotonic() + 60
    while sum(1 for p in world.cache.rglob("*") if p.is_file()) < least:
        assert time.monotonic() < end
        time.sleep(0.02)


def replaced(driver: Driver, pid: int) -> bool:
    """Another process than this is the cache worker."""
    return next(w for w in driver.pool.workers if w.name == "cache-0").pid not in (None, pid)


def test_cache_worker_dies(driver: Driver, world: World) -> None:
    post = world.post("sign.png")
    [first] = through(driver, post, cache=True)
    settled(world, 4)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        pid = driver.pid("cache-0")
        os.kill(pid, number)
        started = time.monotonic()
        [again] = through(driver, post, cache=True)
        assert time.monotonic() - started < 40
        same(first, again)
        driver.until(partial(replaced, driver, pid))
        assert not alive([pid])
        driver.ready()
    before = world.downloads["sign.png"]
    [known] = through(driver, post, cache=True)
    same(first, known)
    assert world.downloads["sign.png"] == before


def test_another_process_uses_the_cache(driver: Driver, world: World) -> None:
    """With the server gone both give the features and tags of before; another bundle other tags."""
    posts = [world.post(*NAMES), world.post("sign.png"), world.post("v.mp4", "s.wav")]
    plain = through(driver, *posts, cache=True)
    settled(world, 3 + 4 + 4 + 1)  # URLs, what decoding gave, image video audio audio, text
    world.close()
    tags = driver.run(FuseTask(plain[0]))
    for known, again in zip(plain, through(driver, *posts, cache=True), strict=True):
        same(known, again)
    with local_runner(driver.settings) as runner:
        for known, post in zip(plain, posts, strict=True):
            same(known, runner.run(post).features)
        ran = runner.run(posts[0]).tags
    assert [tag.name for tag in ran.tags] == [tag.name for tag in tags.tags]
    np.testing.assert_allclose(ran.scores, tags.scores, atol=1e-6)
    before, bundle = driver.pool.bundle, driver.settings.fusion.bundle
    with new_folder(bundle) as new:
        shutil.copytree(bundle.parent / "another", new, dirs_exist_ok=True)
    driver.until(lambda: driver.pool.bundle != before)
    other = driver.run(FuseTask(through(driver, posts[0], cache=True)[0]))
    assert (other.model, other.version) == driver.pool.bundle
    assert not np.array_equal(other.scores, tags.scores)


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
    for spec in worker_specs(settings):
        known = pinned_environment(spec, {"AWS_SECRET_ACCESS_KEY": "hush", "HOME": "/root"})
        assert known["HOME"] == "/root"
        assert ("AWS_SECRET_ACCESS_KEY" in known) == (spec.role in users)
    assert "cache" not in [s.role for s in worker_specs(toy_settings(Path("spool")))]
