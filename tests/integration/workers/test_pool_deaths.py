"""The pool when its workers die, hang or lie (`tests.support.workers.toys`)."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from common.post import Tags
from tests.support.processes import no_descriptors
from tests.support.workers.driving import Driver, decode_task, fetch_task, fuse_task, text_task
from workers.protocol import Decoded, Done, ExtractTask


def test_killed_worker_costs_its_task_one_attempt(driver: Driver, tmp_path: Path) -> None:
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
    before = driver.say("pid")
    failed = driver.failed(driver.submit(text_task("device-lost")))
    assert failed.failure.message == "worker extract-0 died (status 3)"
    assert driver.say("pid") != before


def test_stopped_worker_is_killed_at_the_deadline(driver: Driver) -> None:
    before = driver.pid("extract-0")
    started = time.monotonic()
    failed = driver.failed(driver.submit(text_task("stop"), seconds=2))
    assert time.monotonic() - started < 30
    assert failed.failure.type == "WorkerDied"
    assert "deadline" in failed.failure.message
    assert driver.say("after") == "after"
    assert driver.pid("extract-0") != before


def test_worker_that_reads_nothing_blocks_nobody(driver: Driver) -> None:
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
    before = driver.pid("extract-0")
    with driver.held(text_task, tmp_path / "hold") as blocker:
        failed = driver.failed(driver.submit(text_task("x"), seconds=0.2))
    assert (failed.failure.type, failed.failure.retryable) == ("RetryableError", True)
    assert failed.failure.message == "text waited past its deadline"
    driver.done(blocker)
    assert driver.pid("extract-0") == before


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (fetch_task("elsewhere"), "fetch-0"),
        (fetch_task("above"), "fetch-0"),
        (decode_task("slot-of-another"), "decode-0"),
        (decode_task("no-parts"), "decode-0"),
        (text_task("no-rows"), "extract-0"),
    ],
)
def test_lying_worker_is_replaced(driver: Driver, task: ExtractTask, name: str) -> None:
    before = driver.pid(name)
    assert driver.failed(driver.submit(task)).failure.type == "WorkerDied"
    driver.ready()
    assert driver.pid(name) != before


def test_want_of_descriptors_passes(driver: Driver) -> None:
    """A worker that dies while the King can open nothing comes back once it can."""
    with no_descriptors():
        os.kill(driver.pid("fetch-0"), signal.SIGKILL)
        driver.until(lambda: driver.view("fetch-0").deaths and driver.view("fetch-0").pid is None)
        driver.told += driver.pool.poll(0.5)
        assert driver.pool.refused is None
    driver.ready()


def test_workers_ignore_the_signals_of_the_group(driver: Driver) -> None:
    """SIGTERM and SIGINT are the King's to act on."""
    pid = driver.pid("fuse-0")
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, number)
    assert isinstance(driver.run(fuse_task("tags:p1")), Tags)
    assert driver.pid("fuse-0") == pid


def test_storm_of_kills_loses_nothing(driver: Driver) -> None:
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
        if isinstance(event, Done) and isinstance(event.result, Decoded):
            driver.pool.release(event.result.parts[0].ref.slot)
    told = [event.task_id for event in driver.told if hasattr(event, "task_id")]
    assert len(told) == len(set(told)), "a task ended twice"
