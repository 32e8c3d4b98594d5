"""The real roles in the real pool: a post's media from a web server to tags, and what breaks."""

import os
import queue
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.errors import ConfigError, MediaError
from common.post import Features, Media, Post, TagResult
from config.features import FeatureSettings
from config.settings import Settings
from extractors.suite import ExtractorSuite
from fusion.bundle.folder import newest_version
from king.dispatch_thread import DispatchThread
from king.jobs import Outcome, Started, Tagged
from king.status import Status
from scripts.cli import run
from tests.support import media
from tests.support.processes import file_server
from tests.support.tiny_models import tiny_features
from tests.support.workers.driving import Driver, through, toy_settings
from tests.support.workers.small_bundle import write_bundle
from tests.support.workers.toys import ROLES as TOYS
from workers.local import local_runner
from workers.pool.channel import Arena
from workers.pool.pool import ProcessPool
from workers.pool.supervisor import ROLES
from workers.protocol import BundleLoaded, Decoded, DecodeTask, FuseTask, Task
from workers.roles.batched import run_decode
from workers.runner import PostRunner

MAX_BYTES = 2_000_000
TAGS, RULES = "tags.yaml", "rename: {cat: 猫}\nmap: {Water: {id: w1, tags: [sea, dog]}}\n"


@dataclass
class Site:
    """Media files, the server that serves them, and settings with a bundle for their features."""

    folder: Path
    url: str
    settings: Settings
    bundle: Path
    suite: ExtractorSuite

    def media(self, *names: str) -> tuple[Media, ...]:
        kinds = {".png": "image", ".jpg": "image", ".mp4": "video", ".wav": "audio"}
        return tuple(
            Media(kinds[Path(name).suffix], f"{self.url}/{name}")  # type: ignore[arg-type]
            for name in names
        )

    def local(self, post: Post) -> Post:
        """The same post with the files named by path."""
        files = tuple(
            replace(m, source=str(self.folder / m.source.rpartition("/")[2])) for m in post.media
        )
        return replace(post, media=files)


def make_files(folder: Path) -> None:
    media.write_png(folder / "a.png", media.quadrants(90, 70))
    media.write_jpeg(folder / "b.jpg", media.noise(64, 48))
    sound = media.tone(duration_s=2, rate_hz=44100)
    media.write_video(folder / "v.mp4", media.grey_steps(30), audio=sound)
    media.write_wav(folder / "s.wav", media.tone(duration_s=1.5))
    media.truncate(folder / "b.jpg", folder / "cut.jpg", 0.5)
    media.write_random(folder / "random.mp4")
    (folder / "huge.png").write_bytes(b"\x89PNG" + bytes(MAX_BYTES))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    files = root / "files"
    files.mkdir()
    make_files(files)
    features: FeatureSettings = tiny_features()
    suite = ExtractorSuite(features, threads=1)
    suite.load()
    bundle = root / "bundle"
    write_bundle(bundle, suite)
    settings = toy_settings(
        root / "spool",
        fetch={"allow_private_hosts": True, "max_bytes": MAX_BYTES, "total_timeout_s": 10},
        features=features.model_dump(),
        decode={"memory_mb": 600, "deadline_s": 20},
        fusion={"bundle": str(bundle), "reload_s": 0.3, "max_tags": 2, "tags": str(root / TAGS)},
    )
    (root / TAGS).write_text(RULES)
    with closing(suite), file_server(files) as url:
        yield Site(files, url, settings, bundle, suite)


@pytest.fixture(scope="module")
def shared(site: Site) -> Iterator[Driver]:
    """The pool with the real roles."""
    driver = Driver(site.settings, ROLES).start()
    try:
        yield driver
    finally:
        driver.stop()


@pytest.fixture(scope="module")
def runner(site: Site) -> Iterator[PostRunner]:
    """Everything in this process."""
    with local_runner(site.settings) as made:
        yield made


def same(one: Features, other: Features) -> None:
    assert one.statuses == other.statuses
    assert one.failures == other.failures
    assert set(one.arrays) == set(other.arrays)
    for modality, array in one.arrays.items():
        difference = np.abs(array.astype(np.float32) - other.arrays[modality].astype(np.float32))
        assert difference.max() < 1e-3, modality


class Lent:
    """A running pool that its borrower neither starts nor stops.

    Attributes:
        fused: The features that came to the fusion.
    """

    fused: Features

    def __init__(self, pool: ProcessPool) -> None:
        self.pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pool, name)

    def start(self) -> None:
        """Do nothing: it runs."""

    def stop(self, timeout_s: float) -> None:
        """Do nothing: its owner stops it."""

    def submit(self, task: Task, **order: Any) -> int:
        if isinstance(task, FuseTask):
            self.fused = task.features
        return self.pool.submit(task, **order)


def by_daemon(pool: Any, settings: Settings, post: Post) -> tuple[Features, TagResult]:
    """Through the King's dispatch thread."""
    outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    dispatch = DispatchThread(pool, settings, Status(), outcomes.put)
    thread = Thread(target=dispatch.run)
    thread.start()
    try:
        dispatch.start(Started(post, post.post_id, attempt=1))
        outcome = outcomes.get(timeout=120)
    finally:
        dispatch.stop()
        thread.join()
    assert isinstance(outcome, Tagged), outcome
    result = outcome.result
    assert (result.modalities, result.failures) == (pool.fused.statuses, pool.fused.failures)
    return pool.fused, result


def by_runner(pool: Any, settings: Settings, post: Post) -> tuple[Features, TagResult]:
    """As the HTTP server and the offline scripts do."""
    runner = PostRunner(settings, pool=pool)
    runner.start(wait=False)
    with closing(runner):
        ran = runner.submit(post).result(120)
    return ran.features, ran.result


@pytest.mark.parametrize("path", [by_daemon, by_runner])
def test_every_path_gives_the_same(
    path: Callable[[Any, Settings, Post], tuple[Features, TagResult]],
    driver: Driver,
    runner: PostRunner,
    site: Site,
) -> None:
    """Daemon, HTTP and this process, by URL and by path: the same features, failures and tags."""
    names = ("a.png", "v.mp4", "b.jpg", "s.wav", "random.mp4")
    post = Post("p1", "a cat in the sea", site.media(*names))
    ran = runner.run(post)
    assert ran.features.arrays["video"].shape == (4, 64)
    assert ran.features.arrays["image"].shape == (2, 64)
    assert ran.features.statuses["ocr"] == "missing"
    assert {f.stage for f in ran.features.failures.values()} == {"decode"}
    same(ran.features, runner.run(site.local(post)).features)
    assert all((site.folder / name).exists() for name in names)
    features, result = path(Lent(driver.pool), site.settings, post)
    same(features, ran.features)
    assert {(tag.id, tag.name) for tag in ran.tags.tags} == {(0, "猫"), ("w1", "Water")}
    assert result.rules == ran.tags.rules is not None
    assert [tag.name for tag in result.tags] == [tag.name for tag in ran.tags.tags]
    scores, expected = ([t.score for t in each.tags] for each in (result, ran.tags))
    np.testing.assert_allclose(scores, expected, atol=1e-3)


def test_broken_media_fail_alone(driver: Driver, runner: PostRunner, site: Site) -> None:
    """404, too large, truncated, random: each its reason; the post is tagged from the rest."""
    post = Post("p2", "still here", site.media("none.png", "random.mp4", "s.wav"))
    [features] = through(driver, post)
    assert features.statuses == {
        "video": "failed",
        "image": "failed",
        "audio": "ok",
        "text": "ok",
        "ocr": "missing",
    }
    assert features.failures["image"].message == "HTTP 404"
    assert (features.failures["video"].stage, features.failures["video"].type) == (
        "decode",
        "MediaError",
    )
    same(features, runner.run(post).features)
    huge, cut = through(
        driver, Post("p3", "x", site.media("huge.png")), Post("p4", "x", site.media("cut.jpg"))
    )
    assert huge.failures["image"].message == f"larger than fetch.max_bytes ({MAX_BYTES})"
    assert cut.failures["image"].type == "MediaError"
    assert "truncated" in cut.failures["image"].message


def test_posts_do_not_disturb_each_other(driver: Driver, site: Site) -> None:
    first = Post("a", "cat", site.media("a.png", "v.mp4"))
    second = Post("b", "dog", site.media("b.jpg", "s.wav", "b.jpg"))
    alone = through(driver, first) + through(driver, second)
    together = through(driver, *(first, second) * 5)
    for i, features in enumerate(together):
        same(features, replace(alone[i % 2], post_id=features.post_id))
    assert not np.allclose(alone[0].arrays["image"], alone[1].arrays["image"][:1], atol=1e-3)


def test_wrong_features_fail_their_post_only(driver: Driver, site: Site) -> None:
    good = Features("good", {"text": np.ones((2, 64), np.float16)}, {"text": "ok"})
    bad = Features("bad", {"text": np.ones((2, 7), np.float16)}, {"text": "ok"})
    tasks = [driver.submit(FuseTask(each)) for each in (good, bad, good)]
    driver.done(tasks[0])
    failed = driver.failed(tasks[1]).failure
    assert (failed.stage, failed.type) == ("fuse", "FeatureError")
    driver.done(tasks[2])


def test_decoder_that_needs_too_much_memory(site: Site, tmp_path: Path) -> None:
    side = 9_000
    path = tmp_path / "big.png"
    Image.new("RGB", (side, side)).save(path, compress_level=1)  # 243 MB of pixels, a small file
    limits = {"max_pixels": side * side * 2, "memory_mb": 200}
    settings = site.settings.model_copy(
        update={"decode": site.settings.decode.model_copy(update=limits)}
    )
    other = Driver(settings, {**TOYS, "decode": ROLES["decode"]}).start()
    try:
        failed = other.failed(other.submit(DecodeTask("image", str(path), -1))).failure
        assert failed.type == "MediaError", failed
        assert "allocate" in failed.message or "memory" in failed.message
        assert isinstance(other.run(DecodeTask("image", str(site.folder / "a.png"), -1)), Decoded)
    finally:
        other.stop()


def test_more_than_a_slot_holds(site: Site) -> None:
    """Arrays beyond the slot's size are a media error and not a write into the next slot."""
    arena = Arena.private(2, 4096)
    task = DecodeTask("image", str(site.folder / "a.png"), 0)
    with pytest.raises(MediaError, match=r"more than a slot holds \(4096 bytes\)"):
        run_decode(task, site.settings.features, site.settings.decode, arena)
    arena.close()


def test_hot_swap(driver: Driver, site: Site) -> None:
    before = driver.pool.bundle
    assert before is not None
    pid = driver.pid("fuse-0")
    wrong = {**site.suite.fingerprints, "text": "of others"}
    write_bundle(site.bundle, site.suite, seed=1, fingerprints=wrong)
    time.sleep(1)
    post = Features("p", {"text": np.ones((2, 64), np.float16)}, {"text": "ok"})
    assert driver.run(FuseTask(post)).version == before[1]
    (site.bundle / "model.safetensors").write_bytes(b"broken")
    time.sleep(1)
    assert driver.run(FuseTask(post)).version == before[1]
    shutil.rmtree(site.bundle)
    version = write_bundle(site.bundle, site.suite, seed=2)
    driver.until(lambda: BundleLoaded("small", version) in driver.told)
    assert driver.run(FuseTask(post)).version == version
    assert driver.pid("fuse-0") == pid


def restart(driver: Driver) -> None:
    """Kill the fusion worker, and wait for the next one."""
    pid = driver.pid("fuse-0")
    os.kill(pid, signal.SIGKILL)
    driver.until(lambda: driver.view("fuse-0").pid not in (None, pid))
    driver.ready()


@pytest.mark.parametrize("damage", ["half", "another", "away"])
def test_the_last_good_bundle_is_served(driver: Driver, site: Site, damage: str) -> None:
    version = write_bundle(site.bundle, site.suite, seed=4, members=2)
    before = ("small", version)
    driver.until(lambda: driver.pool.bundle == before)
    driver.until(lambda: newest_version(site.bundle.parent / ".bundle.good") == version)
    weights = site.bundle / "model.safetensors"
    whole = weights.read_bytes()
    match damage:
        case "half":
            weights.write_bytes(whole[: len(whole) // 2])
        case "another":  # made for the features of others, while nobody served it
            wrong = {**site.suite.fingerprints, "text": "of others"}
            write_bundle(site.bundle, site.suite, seed=5, fingerprints=wrong)
        case "away":
            shutil.rmtree(site.bundle)
    restart(driver)
    post = Features("p", {"text": np.ones((2, 64), np.float16)}, {"text": "ok"})
    assert driver.run(FuseTask(post)).version == before[1]
    version = write_bundle(site.bundle, site.suite, seed=6)
    driver.until(lambda: driver.pool.bundle == ("small", version))


def test_rules_are_taken_up_when_their_file_changes(driver: Driver, site: Site) -> None:
    """A bad file leaves the last good one in force, also in a fusion worker that restarts."""
    file = site.bundle.parent / TAGS
    task = FuseTask(Features("p", {"text": np.ones((2, 64), np.float16)}, {"text": "ok"}))
    copy = site.bundle.parent / ".bundle.good" / TAGS

    def names() -> set[str]:
        return {tag.name for tag in driver.run(task).tags}

    try:
        pid, before = driver.pid("fuse-0"), driver.run(task).rules
        file.write_text("hide: [sea]\n")
        driver.until(lambda: names() == {"cat", "dog"})
        hidden = driver.run(task).rules
        assert hidden not in (None, before)
        driver.until(lambda: copy.read_text() == "hide: [sea]\n")
        assert driver.pid("fuse-0") == pid
        for bad in ("hide: [see]\n", None):
            file.unlink()
            if bad is not None:
                file.write_text(bad)
            restart(driver)
            assert driver.run(task).rules == hidden
            assert copy.read_text() == "hide: [sea]\n"
            pid = driver.pid("fuse-0")
        file.write_text("hide: [cat]\n")
        driver.until(lambda: names() == {"dog", "sea"})
        file.write_text("hide: [sae]\n")
        time.sleep(1)
        assert names() == {"dog", "sea"}
        assert driver.pid("fuse-0") == pid
    finally:
        file.write_text(RULES)
        driver.until(lambda: names() == {"猫", "Water"})


def test_thresholds_by_hand_are_taken_up(driver: Driver, site: Site) -> None:
    """They are a new version of the same weights, and other tags, without a restart."""
    before, pid = driver.pool.bundle, driver.pid("fuse-0")
    task = FuseTask(Features("p", {"text": np.ones((2, 64), np.float16)}, {"text": "ok"}))
    assert {tag.name for tag in driver.run(task).tags} == {"猫", "Water"}
    words = ["bundle", "thresholds", str(site.bundle), "--set", "sea=1", "--set", "dog=1"]
    assert run([*words, "--set", "cat=0.01"]) == 0
    driver.until(lambda: driver.pool.bundle == ("small", newest_version(site.bundle)))
    assert driver.pool.bundle != before
    assert [tag.name for tag in driver.run(task).tags] == ["猫"]
    assert driver.pid("fuse-0") == pid


def test_local_needs_the_right_bundle(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    write_bundle(folder, site.suite, fingerprints={**site.suite.fingerprints, "image": "of others"})
    fusion = site.settings.fusion.model_copy(update={"bundle": folder})
    settings = site.settings.model_copy(update={"fusion": fusion})
    with pytest.raises(ConfigError, match="modality image: the bundle needs of others"):
        local_runner(settings).start()
    write_bundle(folder, site.suite)
    switched = fusion.model_copy(update={"image_as_frames": True})
    with pytest.raises(ConfigError, match=r"fusion\.image_as_frames is True, but bundle"):
        local_runner(settings.model_copy(update={"fusion": switched})).start()
