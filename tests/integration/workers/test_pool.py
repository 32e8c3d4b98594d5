"""The pool on real processes that do what they are told (`tests.support.workers.toys`)."""

import threading
import time
from pathlib import Path

import psutil

from common.post import Tags
from extractors.feature_file import stream_fingerprints
from tests.support.workers.driving import Driver, decode_task, fetch_task, fuse_task, text_task
from workers.protocol import BundleLoaded, ExtractTask, Fetched

ROOT = Path(__file__).resolve().parents[3]


def test_every_stage_answers(driver: Driver) -> None:
    """Each kind of task reaches its role, and a decoded array is read where it was written."""
    fetched = driver.run(fetch_task("any:1"))
    assert isinstance(fetched, Fetched)
    assert Path(fetched.path).read_text() == "x"
    Path(fetched.path).unlink()
    ref = driver.decode().parts[0].ref
    features = driver.run(ExtractTask("video", "video", (ref,)))
    assert features.array.tolist() == [[ref.slot + 1.0] * 2]
    driver.pool.release(ref.slot)
    assert driver.say("hello") == "hello"
    assert isinstance(driver.run(fuse_task("tags:p1")), Tags)


def test_decoded_to_nothing_holds_no_slot(driver: Driver) -> None:
    assert driver.decode("empty").failures["audio"].message == "broken"
    assert driver.free_slots == 4


def test_tasks_are_batched_across_posts(driver: Driver, tmp_path: Path) -> None:
    with driver.held(text_task, tmp_path / "hold"):
        asked = [driver.submit(text_task("batch")) for _ in range(6)]
        driver.told += driver.pool.poll(0.1)  # sends them
    assert {driver.done(task).result.text for task in asked} == {"6"}  # type: ignore[union-attr]


def test_a_bad_member_fails_alone(driver: Driver) -> None:
    driver.submit(text_task("sleep:0.3"))
    good = driver.submit(text_task("fine"))
    failure = driver.failed(driver.submit(text_task("bad:no such thing"))).failure
    assert (failure.type, failure.message) == ("ConfigError", "no such thing")
    assert not failure.retryable
    driver.done(good)


def test_workers_are_pinned_and_named(driver: Driver) -> None:
    """Threads and devices are set before a worker's first import; its title tells its role."""
    assert driver.say("env:OMP_NUM_THREADS") == "2"
    assert driver.say("env:CUDA_VISIBLE_DEVICES") == ""
    assert driver.say("modules:torch,cv2,av,transformers") == "[]"
    title = " ".join(psutil.Process(driver.pid("extract-0")).cmdline())
    assert title.strip() == "insighttag: extract cpu video,image,audio,text,ocr"


def test_fusion_is_told_the_fingerprints(driver: Driver) -> None:
    """A later bundle can be judged by the fusion worker: it knows what the extractors give."""
    expected = stream_fingerprints(
        driver.pool._settings.features,
        {"video": "fp-video", "image": "fp-image", "audio": "fp-audio", "text": "fp-text"}
        | {"ocr": "fp-ocr"},  # type: ignore[arg-type]
    )
    assert driver.pool.fingerprints == expected
    assert driver.pool.bundle is not None
    assert driver.pool.bundle[0] == "toy"


def test_a_new_bundle_is_told(driver: Driver) -> None:
    """A hot swap comes out as an event, and is what the pool says it serves."""
    driver.done(driver.submit(fuse_task("swap:2026")))
    driver.until(lambda: BundleLoaded("toy", "2026") in driver.told)
    assert driver.pool.bundle == ("toy", "2026")


def test_big_messages_pass(driver: Driver) -> None:
    assert len(driver.say("big:5000000")) == 5_000_000
    assert driver.say("echo:" + "y" * 3_000_000).endswith("y")


def test_wake_from_another_thread(driver: Driver) -> None:
    timer = threading.Timer(0.2, driver.pool.wake)
    timer.start()
    started = time.monotonic()
    assert driver.pool.poll(30) == []
    assert time.monotonic() - started < 20
    timer.join()


def test_poll_returns_in_time(driver: Driver, tmp_path: Path) -> None:
    with driver.held(text_task, tmp_path / "hold") as task:
        started = time.monotonic()
        assert driver.pool.poll(0.3) == []
        assert 0.25 < time.monotonic() - started < 10
    driver.done(task)


def test_cancelled_tasks_tell_nothing_and_hold_nothing(driver: Driver) -> None:
    running = [driver.submit(decode_task("sleep:0.3")), driver.submit(fetch_task("sleep:0.3"))]
    queued = driver.submit(decode_task())
    driver.told += driver.pool.poll(0.1)
    for task in (*running, queued):
        driver.pool.cancel(task)
    driver.until(lambda: not driver.pool._scheduler.busy)
    assert not any(driver.outcome(task) for task in (*running, queued))


def test_release_waits_for_the_readers(driver: Driver, tmp_path: Path) -> None:
    ref = driver.decode().parts[0].ref
    with driver.held(text_task, tmp_path / "hold") as blocker:
        reader = driver.submit(ExtractTask("video", "video", (ref,)))
        driver.pool.release(ref.slot)
        others = [driver.decode().parts[0].ref.slot for _ in range(3)]
        assert ref.slot not in others
    assert driver.done(reader).result.array.tolist() == [[ref.slot + 1.0] * 2]  # type: ignore[union-attr]
    driver.done(blocker)
    for slot in others:
        driver.pool.release(slot)
