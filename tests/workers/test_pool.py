"""The pool on real processes that do as they are told (`tests.workers.toys`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from config.errors import ConfigError
from extractors.fingerprint import stream_fingerprints
from tests.services import wait_until
from tests.workers.driving import (
    Driver,
    alive,
    decode_task,
    fetch_task,
    fuse_task,
    memory_files,
    text_task,
    toy_settings,
)
from tests.workers.toys import ROLES
from workers.pool import BundleChanged, PoolRefused, ProcessPool, TaskDone, TaskPool
from workers.protocol import Decoded, ExtractTask, Fetched, Tags

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """One pool for all tests that leave it as they found it: deaths included."""
    driver = Driver(toy_settings(tmp_path_factory.mktemp("spool"))).start()
    try:
        yield driver
    finally:
        driver.stop()
        assert memory_files() == 0


@pytest.fixture
def driver(shared: Driver) -> Iterator[Driver]:
    """The shared pool, whole again; after the test it must hold nothing."""
    shared.ready()
    yield shared
    shared.until(lambda: not shared.pool._scheduler.busy)
    assert shared.free_slots == 4
    spool = shared.pool._spool
    assert spool is not None
    assert [path.name for path in spool.folder.iterdir()] == ["lock"]


# What it does --------------------------------------------------------------------------------


def test_every_stage_answers(driver: Driver) -> None:
    """Each kind of task reaches its role, and a decoded array is read where it was written."""
    fetched = driver.run(fetch_task("any:1"))
    assert isinstance(fetched, Fetched)
    assert Path(fetched.path).read_text() == "x"
    Path(fetched.path).unlink()
    decoded = driver.decode()
    ref = decoded.parts[0].ref
    features = driver.run(ExtractTask("video", "video", (ref,)))
    assert features.array.tolist() == [[ref.slot + 1.0] * 2]
    driver.pool.release(ref.slot)
    assert driver.say("hello") == "hello"
    assert isinstance(driver.run(fuse_task("tags:p1")), Tags)


def test_decoded_to_nothing_holds_no_slot(driver: Driver) -> None:
    """A result without arrays gives its slot back by itself, and keeps its failures."""
    decoded = driver.decode("empty")
    assert decoded.failures["audio"].message == "broken"
    assert driver.free_slots == 4


def test_tasks_are_batched_across_posts(driver: Driver, tmp_path: Path) -> None:
    """What comes in while a worker is busy runs as one batch."""
    with driver.held(text_task, tmp_path / "hold"):
        asked = [driver.submit(text_task("batch")) for _ in range(6)]
        driver.told += driver.pool.poll(0.1)  # sends them
    assert {driver.done(task).result.text for task in asked} == {"6"}  # type: ignore[union-attr]


def test_a_bad_member_fails_alone(driver: Driver) -> None:
    """A task that raises fails with its own reason; its batch goes on."""
    driver.submit(text_task("sleep:0.3"))
    good = driver.submit(text_task("fine"))
    bad = driver.submit(text_task("bad:no such thing"))
    failure = driver.failed(bad).failure
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
    assert driver.pool._expected == expected
    assert driver.pool.bundle is not None
    assert driver.pool.bundle[0] == "toy"


def test_a_new_bundle_is_told(driver: Driver) -> None:
    """A hot swap comes out as an event, and is what the pool says it serves."""
    driver.done(driver.submit(fuse_task("swap:2026")))
    driver.until(lambda: BundleChanged("toy", "2026") in driver.told)
    assert driver.pool.bundle == ("toy", "2026")


def test_big_messages_pass(driver: Driver) -> None:
    """A message far beyond a socket's buffer arrives whole, both ways."""
    assert len(driver.say("big:5000000")) == 5_000_000
    assert driver.say("echo:" + "y" * 3_000_000).endswith("y")


def test_wake_from_another_thread(driver: Driver) -> None:
    """`wake` ends a long poll at once."""
    timer = threading.Timer(0.2, driver.pool.wake)
    timer.start()
    started = time.monotonic()
    assert driver.pool.poll(30) == []
    assert time.monotonic() - started < 20
    timer.join()


def test_poll_returns_in_time(driver: Driver, tmp_path: Path) -> None:
    """Without events `poll` returns after its time, also when workers are busy."""
    with driver.held(text_task, tmp_path / "hold") as task:
        started = time.monotonic()
        assert driver.pool.poll(0.3) == []
        assert 0.25 < time.monotonic() - started < 10
    driver.done(task)


# Forgetting ----------------------------------------------------------------------------------


def test_cancelled_tasks_tell_nothing_and_hold_nothing(driver: Driver) -> None:
    """Queued or running, a cancelled task has no event; its slot and its file are freed."""
    running = [driver.submit(decode_task("sleep:0.3")), driver.submit(fetch_task("sleep:0.3"))]
    queued = driver.submit(decode_task())
    driver.told += driver.pool.poll(0.1)
    for task in (*running, queued):
        driver.pool.cancel(task)
    driver.until(lambda: not driver.pool._scheduler.busy)
    assert not any(driver.outcome(task) for task in (*running, queued))


def test_release_waits_for_the_readers(driver: Driver, tmp_path: Path) -> None:
    """A released slot is not written again before the task that reads it has ended."""
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


# Deaths --------------------------------------------------------------------------------------


def test_killed_worker_costs_its_task_one_attempt(driver: Driver, tmp_path: Path) -> None:
    """Kill -9 in the middle of a task: that task is told as retryable, the worker comes back."""
    before = driver.pid("decode-0")
    with driver.held(decode_task, tmp_path / "hold") as task:
        assert any(w.held for w in driver.pool.workers)
        os.kill(before, signal.SIGKILL)
        failed = driver.failed(task)
    assert (failed.failure.type, failed.failure.retryable) == ("WorkerDied", True)
    assert failed.failure.message == "worker decode-0 died (signal SIGKILL)"
    driver.pool.release(driver.decode().parts[0].ref.slot)
    assert driver.pid("decode-0") != before
    assert next(w.deaths for w in driver.pool.workers if w.name == "decode-0") >= 1


def test_crash_on_a_batch_charges_only_the_culprit(driver: Driver) -> None:
    """A batch that kills its worker runs one by one again: one is charged, the others answer."""
    blocker = driver.submit(text_task("sleep:0.5"))
    driver.told += driver.pool.poll(0.2)
    before = [driver.submit(text_task(f"good-{i}")) for i in range(3)]
    culprit = driver.submit(text_task("kill"))
    after = [driver.submit(text_task(f"good-{i}")) for i in range(3)]
    failed = driver.failed(culprit)
    assert (failed.failure.type, failed.failure.stage) == ("WorkerDied", "extract")
    for task in (blocker, *before, *after):
        driver.done(task)


def test_lost_device_replaces_the_process(driver: Driver) -> None:
    """A device-side assert ends the process: its task is charged, a fresh one serves on."""
    before = driver.say("pid")
    failed = driver.failed(driver.submit(text_task("device-lost")))
    assert failed.failure.message == "worker extract-0 died (status 3)"
    assert driver.say("pid") != before


def test_stopped_worker_is_killed_at_the_deadline(driver: Driver) -> None:
    """SIGSTOP in a task: the task fails at its deadline and the worker is replaced."""
    before = driver.pid("extract-0")
    started = time.monotonic()
    failed = driver.failed(driver.submit(text_task("stop"), seconds=2))
    assert time.monotonic() - started < 30
    assert failed.failure.type == "WorkerDied"
    assert "deadline" in failed.failure.message
    assert driver.say("after") == "after"
    assert driver.pid("extract-0") != before


def test_worker_that_reads_nothing_blocks_nobody(driver: Driver) -> None:
    """Sending megabytes to a stopped worker does not block; others go on; it is replaced."""
    before = driver.pid("extract-0")
    os.kill(before, signal.SIGSTOP)
    stuck = driver.submit(text_task("x" * 20_000_000), seconds=6)
    started = time.monotonic()
    driver.told += driver.pool.poll(0)
    assert time.monotonic() - started < 5, "it waited for the stopped one"
    assert isinstance(driver.run(fuse_task("tags:p1")), Tags)
    assert driver.failed(stuck).failure.retryable
    assert driver.say("after") == "after"
    assert driver.pid("extract-0") != before


def test_task_waits_no_longer_than_its_deadline(driver: Driver, tmp_path: Path) -> None:
    """A queued task fails at its deadline, and its worker is left alone."""
    before = driver.pid("extract-0")
    with driver.held(text_task, tmp_path / "hold") as blocker:
        waiting = driver.submit(text_task("x"), seconds=0.2)
        failed = driver.failed(waiting)
    assert (failed.failure.type, failed.failure.retryable) == ("RetryableError", True)
    assert failed.failure.message == "text waited past its deadline"
    driver.done(blocker)
    assert driver.pid("extract-0") == before


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (fetch_task("elsewhere"), "fetch-0"),
        (decode_task("slot-of-another"), "decode-0"),
    ],
)
def test_lying_worker_is_replaced(driver: Driver, task: ExtractTask, name: str) -> None:
    """A result that cannot be true is not passed on: the King would delete or read for it."""
    before = driver.pid(name)
    failed = driver.failed(driver.submit(task))
    assert failed.failure.type == "WorkerDied"
    driver.ready()
    assert driver.pid(name) != before


def test_workers_ignore_the_signals_of_the_group(driver: Driver) -> None:
    """SIGTERM and SIGINT are the King's to act on."""
    pid = driver.pid("fuse-0")
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, number)
    assert isinstance(driver.run(fuse_task("tags:p1")), Tags)
    assert driver.pid("fuse-0") == pid


def test_storm_of_kills_loses_nothing(driver: Driver) -> None:
    """Under random kills every task still ends in exactly one event, and no slot is lost."""
    tasks = []
    for i in range(60):
        tasks.append(driver.submit(decode_task(f"sleep:0.0{i % 3}")))
        tasks.append(driver.submit(text_task(f"sleep:0.0{i % 3}")))

    def ended(least: int) -> bool:
        return sum(driver.outcome(task) is not None for task in tasks) >= least

    for name, least in (("decode-0", 3), ("extract-0", 10)):
        driver.until(partial(ended, least))
        os.kill(driver.pid(name), signal.SIGKILL)
    for task in tasks:
        event = driver.wait(task)
        if isinstance(event, TaskDone) and isinstance(event.result, Decoded):
            driver.pool.release(event.result.parts[0].ref.slot)
    told = [event.task_id for event in driver.told if hasattr(event, "task_id")]
    assert len(told) == len(set(told)), "a task ended twice"


# Starting and stopping -----------------------------------------------------------------------


def test_refused_start(tmp_path: Path) -> None:
    """A worker that says why it cannot start is believed at once: no restart, one line."""
    settings = toy_settings(tmp_path, features={"text": {"arch": "extract-refuses:no weights"}})
    driver = Driver(settings)
    driver.pool.start()
    driver.until(lambda: driver.told)
    assert driver.told == [PoolRefused("no weights")]
    assert driver.pool.refused == "no weights"
    assert not driver.pool.ready
    driver.stop()


def test_start_that_fails_again_and_again(tmp_path: Path) -> None:
    """A worker that dies while loading is tried three times, with back-off, then given up."""
    settings = toy_settings(tmp_path, features={"text": {"arch": "decode-dies"}})
    driver = Driver(settings)
    driver.pool.start()
    driver.until(lambda: driver.told)
    [event] = driver.told
    assert isinstance(event, PoolRefused)
    assert event.message == "worker decode-0 failed to start 3 times (status 7); its log says why"
    driver.stop()


def test_start_that_hangs(tmp_path: Path) -> None:
    """A worker that loads for longer than it may is killed and tried again."""
    settings = toy_settings(
        tmp_path,
        features={"text": {"arch": "decode-hangs"}},
        workers={"start_timeout_s": 4},
    )
    driver = Driver(settings)
    driver.pool.start()
    driver.until(lambda: any(w.deaths for w in driver.pool.workers))
    driver.stop()


def test_wrong_bundle_is_refused(tmp_path: Path) -> None:
    """A bundle made for other features refuses the pool, naming the modality and both sides."""
    settings = toy_settings(
        tmp_path, features={"text": {"arch": 'bundle-wants:{"video": "fp-of-others"}'}}
    )
    driver = Driver(settings)
    driver.pool.start()
    driver.until(lambda: driver.told)
    [event] = driver.told
    assert isinstance(event, PoolRefused)
    assert "modality video: the bundle needs fp-of-others, the extractors give fp-video" in (
        event.message
    )
    driver.stop()


def test_stop_waits_for_no_interpreter(tmp_path: Path) -> None:
    """A worker that is done is gone: taking torch apart would cost a drain seconds."""
    roles = dict.fromkeys(ROLES, "tests.workers.toys:run_lingering")
    driver = Driver(toy_settings(tmp_path), roles).start()
    started = time.monotonic()
    driver.pool.stop(30)
    assert time.monotonic() - started < 18


def test_stop_lets_the_begun_finish_and_kills_the_rest(tmp_path: Path) -> None:
    """`stop` is bounded: what has begun may end, a stopped worker is killed at the limit."""
    driver = Driver(toy_settings(tmp_path)).start()
    pids = [w.pid for w in driver.pool.workers if w.pid]
    os.kill(driver.pid("decode-0"), signal.SIGSTOP)
    driver.submit(text_task("sleep:0.5"))
    driver.told += driver.pool.poll(0.2)
    started = time.monotonic()
    driver.pool.stop(3)
    assert time.monotonic() - started < 30
    assert not alive(pids)
    assert driver.pool.poll(1) == []
    driver.pool.stop(1)
    driver.pool.wake()
    assert list(tmp_path.glob("king-*")) == []


def test_without_pidfd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a kernel without pidfd a death is noticed too, by its pipe or by asking now and then."""
    monkeypatch.setattr("workers.process._open_pidfd", lambda pid: None)
    driver = Driver(toy_settings(tmp_path)).start()
    with driver.held(text_task, tmp_path / "hold") as task:
        os.kill(driver.pid("extract-0"), signal.SIGKILL)
        assert "SIGKILL" in driver.failed(task).failure.message
    assert driver.say("again") == "again"
    driver.stop()


def test_constructing_starts_nothing(tmp_path: Path) -> None:
    """Until `start` there is no process, no file and no memory file; stopping is fine."""
    before = memory_files()
    pool: TaskPool = ProcessPool(toy_settings(tmp_path / "spool"))
    assert not (tmp_path / "spool").exists()
    assert memory_files() == before
    assert {w.state for w in pool.workers} == {"waiting"}
    pool.stop(1)


def test_unusable_spool_is_a_config_error(tmp_path: Path) -> None:
    """A spool that is a file is told by its key."""
    (tmp_path / "file").write_text("")
    pool = ProcessPool(toy_settings(tmp_path / "file" / "spool"))
    with pytest.raises(ConfigError, match=r"^fetch\.spool: .* cannot be used"):
        pool.start()
    pool.stop(1)


KING = """
import json, sys, time
from pathlib import Path
from config.logs import configure_logs
from tests.workers.driving import Driver, decode_task, text_task, toy_settings
configure_logs("json", "error")
driver = Driver(toy_settings(Path(sys.argv[1]))).start()
driver.submit(decode_task("sleep:60"))
driver.submit(text_task("stop"))
driver.told += driver.pool.poll(0.5)
modules = sorted({"torch", "cv2", "av", "transformers", "timm", "fusion"} & set(sys.modules))
pids = [w.pid for w in driver.pool.workers]
rss = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
print(json.dumps({"pids": pids, "modules": modules, "rss": rss}), flush=True)
time.sleep(60)
"""


def test_killed_king_leaves_nothing(tmp_path: Path) -> None:
    """After kill -9 of the King every worker dies with it, a busy and a stopped one too.

    The next King removes its spool. And the King's side is small and loads no model library.
    """
    king = subprocess.Popen(
        [sys.executable, "-c", KING, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert king.stdout is not None
    told = json.loads(king.stdout.readline())
    assert told["modules"] == []
    assert told["rss"] < 100 * 1024 * 1024
    assert len(alive(told["pids"])) == 4
    assert len(list(tmp_path.glob("king-*"))) == 1
    king.kill()
    king.wait()
    king.stdout.close()
    wait_until(lambda: not alive(told["pids"]), 60, "the workers' end")
    pool = ProcessPool(toy_settings(tmp_path))
    pool.start()
    assert len(list(tmp_path.glob("king-*"))) == 1, "the dead King's folder is still there"
    pool.stop(0)
