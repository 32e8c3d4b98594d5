"""The King's threads together, on a queue, a store and workers in memory."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import structlog

from config.errors import ConfigError
from extractors.post import Failure
from king.health import read_health
from king.jobs import Job, message_key
from king.messages import PostMessage
from tests.fakes.broker import MemoryBroker, MemoryQueue
from tests.fakes.pool import DIED, Answer, default_answer
from tests.fakes.store import FakeStore
from tests.king.king_rig import Running, fake_pool, king_settings, on_fakes
from workers.protocol import FetchTask, FuseTask, Task


def posts(*ids: Any, **fields: Any) -> list[dict[str, Any]]:
    """Documents with a text."""
    return [{"_id": post_id, "text": "hello", **fields} for post_id in ids]


def queue_of(*bodies: bytes) -> MemoryQueue:
    """A queue with messages."""
    queue = MemoryQueue()
    for body in bodies:
        queue.put(body)
    return queue


class Gate:
    """Holds every fusion back until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def __call__(self, task: Task) -> Answer:
        if isinstance(task, FuseTask) and not self.open.is_set():
            return None
        return default_answer(task)


def test_posts_are_tagged_and_acknowledged_after_the_write(tmp_path: Path) -> None:
    """Any accepted body gets its post tagged; one summary line each, without the payload."""
    store = FakeStore(posts("p1", "p2", 3, images=["http://user:pw@host/1.jpg"]))
    broker = MemoryBroker(queue_of(b"p1", b'{"post_id": "p2", "priority": 5}', b"3"))
    acked_too_early: list[bytes] = []
    ack = broker.ack

    def watch(delivery: Any) -> bool:
        acked_too_early.extend(key.encode() for key in store.jobs)
        return ack(delivery)

    broker.ack = watch  # type: ignore[method-assign]
    with structlog.testing.capture_logs() as logs:
        with on_fakes(tmp_path, store, broker) as it:
            it.until(lambda: len(broker.acked) == 3)
    assert it.exit_code == 0
    assert {post["insight"]["status"] for post in store.posts.values()} == {"tagged"}
    assert store.jobs == {}
    assert acked_too_early == []
    lines = [line for line in logs if line["event"] == "king.post_tagged"]
    assert {line["post_id"] for line in lines} == {"p1", "p2", "3"}
    assert lines[0]["attempt"] == 1
    assert lines[0]["tags"] == ["sport"]
    assert lines[0]["modalities"]["image"] == "ok"
    assert {"fetch", "decode", "extract", "fuse"} <= lines[0]["timings_ms"].keys()
    assert "pw" not in json.dumps(logs, default=str)
    assert store.closed
    assert it.pool.stopped


def test_messages_that_cannot_be_served_are_dead_letters(tmp_path: Path) -> None:
    """Junk, unknown posts and empty posts are set aside with reasons, and the daemon goes on."""
    store = FakeStore([*posts("good"), {"_id": "empty"}])
    broker = MemoryBroker(queue_of(b"\xff\xfe", b"{", b"", b"nobody", b"empty", b"good"))
    with on_fakes(tmp_path, store, broker) as it:
        it.until(lambda: len(broker.acked) == 6)
    assert it.exit_code == 0
    assert store.posts["good"]["insight"]["status"] == "tagged"
    assert store.posts["empty"]["insight"]["error"]["type"] == "NothingUsable"
    stages = {key: job.last_error and job.last_error["stage"] for key, job in store.jobs.items()}
    assert stages == {
        message_key("\\xff\\xfe"): "message",
        message_key("{"): "message",
        message_key(""): "message",
        "nobody": "load",
        "empty": "load",
    }
    assert {job.state for job in store.jobs.values()} == {"dead"}
    assert store.jobs[message_key("{")].payload == "{"


def test_same_post_delivered_again_joins_the_running_job(tmp_path: Path) -> None:
    """Two messages for one post are one job; both are acknowledged at its end."""
    store, gate = FakeStore(posts("p1")), Gate()
    broker = MemoryBroker(queue_of(b"p1", b'"p1"'))
    pool = fake_pool(tmp_path, gate)
    with Running(king_settings(tmp_path), pool, store=store, broker=broker) as it:
        it.until(lambda: any(isinstance(task, FuseTask) for task in pool.submitted))
        broker.queue.put(b"p1")
        time.sleep(0.2)
        assert broker.acked == []
        gate.open.set()
        it.until(lambda: len(broker.acked) == 3)
    assert sum(isinstance(task, FuseTask) for task in pool.submitted) == 1


def test_tagged_post_is_settled_and_forced_post_is_not(tmp_path: Path) -> None:
    """What this bundle has tagged is acknowledged without work, unless the message insists."""
    done = {"model": "fake", "version": "1", "status": "tagged", "tags": []}
    store = FakeStore(posts("p1", "p2", insight=done))
    broker = MemoryBroker(queue_of(b"p1", PostMessage("p2", force=True).encode()))
    pool = fake_pool(tmp_path)
    with Running(king_settings(tmp_path), pool, store=store, broker=broker) as it:
        it.until(lambda: len(broker.acked) == 2)
        assert it.king.board.counter("settled") == 1
    fused = [task.features.post_id for task in pool.submitted if isinstance(task, FuseTask)]
    assert fused == ["p2"]


def test_retryable_failures_come_back_until_they_succeed(tmp_path: Path) -> None:
    """Two deaths and a success: three attempts, one result, no job left."""
    deaths = iter((DIED, DIED))

    def answer(task: Task) -> Answer:
        return next(deaths, None) or default_answer(task)

    store = FakeStore(posts("p1"))
    broker = MemoryBroker(queue_of(b"p1"))
    with structlog.testing.capture_logs() as logs:
        with Running(
            king_settings(tmp_path, attempts=5),
            fake_pool(tmp_path, answer),
            store=store,
            broker=broker,
        ) as it:
            it.until(lambda: store.posts["p1"].get("insight"))
            it.until(lambda: len(broker.acked) == 3)
    assert store.posts["p1"]["insight"]["attempts"] == 3
    assert store.jobs == {}
    assert [m.post_id for m in broker.published] == ["p1", "p1"]
    retries = [line for line in logs if line["event"] == "king.post_retry"]
    assert [line["attempt"] for line in retries] == [1, 2]


def test_exhausted_attempts_are_a_dead_letter(tmp_path: Path) -> None:
    """A post that always kills its worker is set aside after its last attempt."""
    store = FakeStore(posts("p1"))
    broker = MemoryBroker(queue_of(b"p1"))
    pool = fake_pool(
        tmp_path, lambda task: DIED if isinstance(task, FuseTask) else default_answer(task)
    )
    with Running(king_settings(tmp_path), pool, store=store, broker=broker) as it:
        it.until(lambda: len(broker.acked) == 3)
        assert it.king.board.counter("dead") == 1
    assert store.jobs["p1"].state == "dead"
    assert store.jobs["p1"].attempts == 3
    assert store.posts["p1"]["insight"]["error"]["type"] == "WorkerDied"


def test_drain_mode_waits_for_retries_and_exits_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --drain the King ends by itself, after the queue, the flights and the retries.

    On a terminal it shows how far it is.
    """
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    deaths = iter([DIED] * 7)

    def answer(task: Task) -> Answer:
        if isinstance(task, FuseTask):
            return next(deaths, None) or default_answer(task)
        return default_answer(task)

    store = FakeStore(posts(*[f"p{i}" for i in range(20)]))
    broker = MemoryBroker(queue_of(*[f"p{i}".encode() for i in range(20)]))
    settings = king_settings(tmp_path, attempts=9, backoff_s=1)
    with Running(
        settings, fake_pool(tmp_path, answer), store=store, broker=broker, drain=True
    ) as it:
        it.join()
    assert it.exit_code == 0
    assert all(post["insight"]["status"] == "tagged" for post in store.posts.values())
    assert store.jobs == {}
    assert broker.queue.waiting == []
    assert "20 tagged, 0 failed, 0 in flight, 0 queued" in terminal.getvalue()


def test_drain_finishes_what_is_in_flight(tmp_path: Path) -> None:
    """After a stop nothing new begins; what has begun is finished, written, acknowledged."""
    store, gate = FakeStore(posts("p1", "p2")), Gate()
    broker = MemoryBroker(queue_of(b"p1"))
    with on_fakes(tmp_path, store, broker, gate) as it:
        it.until(lambda: any(isinstance(task, FuseTask) for task in it.pool.submitted))
        it.king.stop()
        it.until(lambda: broker._on_delivery is None)
        broker.queue.put(b"p2")
        time.sleep(0.2)
        gate.open.set()
        it.join()
    assert it.exit_code == 0
    assert store.posts["p1"]["insight"]["status"] == "tagged"
    assert "insight" not in store.posts["p2"]
    assert [m.body for m in broker.queue.waiting] == [b"p2"]


@pytest.mark.parametrize("at_once", [False, True])
def test_drain_out_of_time_puts_posts_back_and_attempts_too(tmp_path: Path, at_once: bool) -> None:
    """What is not finished in time is requeued and has cost no attempt; twice means at once."""
    store = FakeStore(posts("p1", "p2"))
    store.jobs["p2"] = Job("p2", "queued", attempts=1, due_at=time.time() + 900)
    broker = MemoryBroker(queue_of(b"p1", b"p2"))
    settings = king_settings(tmp_path, drain_timeout_s=60 if at_once else 0.3)
    with Running(settings, fake_pool(tmp_path, Gate()), store=store, broker=broker) as it:
        it.until(lambda: sum(isinstance(t, FuseTask) for t in it.pool.submitted) == 2)
        began = time.monotonic()
        it.king.stop()
        if at_once:
            it.king.stop()
        it.join()
        assert time.monotonic() - began < 30
    assert it.exit_code == 0
    assert sorted(m.body for m in broker.queue.waiting) == [b"p1", b"p2"]
    assert broker.acked == []
    assert store.jobs.keys() == {"p2"}
    assert (store.jobs["p2"].state, store.jobs["p2"].attempts) == ("queued", 1)


def test_database_away_stops_intake_and_nothing_else(tmp_path: Path) -> None:
    """While the database is away nothing is acknowledged and no more is taken; then all is done."""
    ids = [f"p{i}" for i in range(30)]
    store = FakeStore(posts(*ids))
    broker = MemoryBroker(queue_of(*[i.encode() for i in ids]), prefetch=8)
    gate = Gate()
    with structlog.testing.capture_logs() as logs:
        with on_fakes(tmp_path, store, broker, gate) as it:
            it.until(lambda: len(broker._held) == 8)
            store.down.set()
            gate.open.set()
            it.until(lambda: it.king.board.phase == "store_down")
            acked = len(broker.acked)
            ticked = it.king.board._ticks["broker"]
            time.sleep(0.6)
            assert len(broker.acked) == acked == 0
            assert len(broker._held) == 8
            it.until(lambda: it.king.board._ticks["broker"] > ticked)
            store.down.clear()
            it.until(lambda: len(broker.acked) == 30)
            it.until(lambda: it.king.board.phase == "serving")
    assert all(post["insight"]["status"] == "tagged" for post in store.posts.values())
    assert any(line["event"] == "king.store_unreachable" and line["url"] for line in logs)
    assert any(line["event"] == "king.store_reached" for line in logs)


def test_broker_and_database_away_at_the_start(tmp_path: Path) -> None:
    """The King says which URLs it cannot reach, tries on, and serves as soon as they are there."""
    store, broker = FakeStore(posts("p1")), MemoryBroker(queue_of(b"p1"))
    store.down.set()
    broker.queue.reachable = False
    with structlog.testing.capture_logs() as logs:
        with on_fakes(tmp_path, store, broker) as it:
            it.until(lambda: it.king.board.phase == "store_down")
            store.down.clear()
            it.until(lambda: it.king.board.phase == "broker_down")
            broker.queue.reachable = True
            it.until(lambda: len(broker.acked) == 1)
    events = {line["event"] for line in logs}
    assert {"king.store_unreachable", "king.broker_unreachable"} <= events


def test_lost_connection_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """Messages of a dead connection come again, join their running jobs and are acknowledged."""
    ids = [f"p{i}" for i in range(6)]
    store, gate = FakeStore(posts(*ids)), Gate()
    broker = MemoryBroker(queue_of(*[i.encode() for i in ids]))
    with on_fakes(tmp_path, store, broker, gate) as it:
        it.until(lambda: sum(isinstance(t, FuseTask) for t in it.pool.submitted) == 6)
        broker.lose_connection()
        it.until(lambda: broker.generation == 2 and len(broker._held) == 6)
        gate.open.set()
        it.until(lambda: len(broker.acked) == 6)
    assert sum(isinstance(task, FuseTask) for task in it.pool.submitted) == 6
    assert broker.queue.waiting == []
    assert store.jobs == {}


def test_job_of_another_king_is_parked_and_taken_over(tmp_path: Path) -> None:
    """A running job is left alone while its lease holds, then it is one more attempt."""
    store = FakeStore(posts("p1"))
    lease = time.time() + 1.0
    store.jobs["p1"] = Job(
        "p1", "running", attempts=1, owner="other", lease_until=lease, due_at=lease + 60
    )
    broker = MemoryBroker(queue_of(b"p1"))
    with on_fakes(tmp_path, store, broker) as it:
        it.until(lambda: len(broker.acked) == 1)
    assert time.time() >= lease
    assert store.posts["p1"]["insight"]["attempts"] == 2


def test_refused_workers_end_the_king_with_one_line(tmp_path: Path) -> None:
    """A bundle that does not fit is the user's to mend: ConfigError, hence exit 2."""
    pool = fake_pool(tmp_path, refuse="fusion.bundle: made for other features")
    store, broker = FakeStore(), MemoryBroker()
    with Running(king_settings(tmp_path), pool, store=store, broker=broker) as it:
        it.join()
    assert isinstance(it.error, ConfigError)
    assert str(it.error) == "fusion.bundle: made for other features"


def test_a_thread_that_dies_ends_the_king(tmp_path: Path) -> None:
    """An unexpected exception is logged and exits 1, so that the supervisor starts anew."""

    def boom(task: Task) -> Answer:
        raise RuntimeError("a bug")

    store, broker = FakeStore(posts("p1")), MemoryBroker(queue_of(b"p1"))
    with structlog.testing.capture_logs() as logs:
        with on_fakes(tmp_path, store, broker, boom) as it:
            it.join()
    assert it.exit_code == 1
    [died] = [line for line in logs if line["event"] == "king.thread_died"]
    assert died["thread"] == "dispatch"
    assert [m.body for m in broker.queue.waiting] == [b"p1"]
    assert it.pool.stopped


def test_health_file_shows_progress(tmp_path: Path) -> None:
    """The file is there within a second or so, is whole, and has what the watchdog judges by."""
    ids = [f"p{i}" for i in range(5)]
    store, gate = FakeStore(posts(*ids)), Gate()
    broker = MemoryBroker(queue_of(*[i.encode() for i in ids]), prefetch=2)
    settings = king_settings(tmp_path)
    with Running(settings, fake_pool(tmp_path, gate), store=store, broker=broker) as it:

        def health() -> dict[str, Any]:
            return read_health(settings.king.health_file) or {}

        it.until(lambda: health().get("in_flight") == 2 and health().get("queue_depth") == 3)
        it.until(lambda: all(time.time() - tick < 2 for tick in health()["ticks"].values()))
        seen = health()
        assert seen["phase"] == "serving"
        assert seen["ticks"].keys() == {"main", "broker", "store", "dispatch"}
        assert seen["bundle"] == {"name": "fake", "version": "1"}
        assert seen["oldest_in_flight_s"] > 0
        assert seen["last_done_at"] is None
        assert [worker["role"] for worker in seen["workers"]] == ["extract"]
        gate.open.set()
        it.until(lambda: health()["posts_tagged"] == 5)
        seen = health()
        assert seen["counters"]["tagged"] == 5
        assert seen["posts_per_s"] > 0
        assert seen["last_done_at"] >= seen["last_delivery_at"] - 1
    assert health()["phase"] == "stopped"


def test_fetch_failures_are_named_in_the_result(tmp_path: Path) -> None:
    """A 404 costs its modality; its reason stands in the result and in the log line."""

    def answer(task: Task) -> Answer:
        if isinstance(task, FetchTask):
            return Failure("fetch", "FetchRefused", "HTTP 404")
        return default_answer(task)

    store = FakeStore(posts("p1", images="http://a/1"))
    broker = MemoryBroker(queue_of(b"p1"))
    with structlog.testing.capture_logs() as logs:
        with on_fakes(tmp_path, store, broker, answer) as it:
            it.until(lambda: len(broker.acked) == 1)
    result = store.posts["p1"]["insight"]
    assert result["status"] == "tagged"
    assert result["modalities"]["image"] == "failed"
    assert result["failures"]["image"]["message"] == "HTTP 404"
    [line] = [line for line in logs if line["event"] == "king.post_tagged"]
    assert "HTTP 404" in line["failures"]["image"]


def test_drain_with_the_database_away_ends_in_time(tmp_path: Path) -> None:
    """A stop while the database is away keeps nobody waiting; the messages go back."""
    store, gate = FakeStore(posts("p1")), Gate()
    broker = MemoryBroker(queue_of(b"p1"))
    with on_fakes(tmp_path, store, broker, gate, drain_timeout_s=0.3) as it:
        it.until(lambda: any(isinstance(task, FuseTask) for task in it.pool.submitted))
        store.down.set()
        it.king.stop()
        it.join(30)
    assert it.exit_code == 0
    assert [m.body for m in broker.queue.waiting] == [b"p1"]
    assert store.jobs["p1"].state == "running"  # whose lease will run out


def test_orphans_of_a_dead_king_are_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job whose King is dead and whose message is lost is done by the next King."""
    monkeypatch.setattr("king.keeper._RELEASE_AFTER_S", 0.1)
    monkeypatch.setattr("king.king.is_dead", lambda owner: owner == "dead")
    store, broker = FakeStore(posts("p1")), MemoryBroker()
    far = time.time() + 1000
    store.jobs["p1"] = Job("p1", "running", 1, owner="dead", lease_until=far, due_at=far)
    with on_fakes(tmp_path, store, broker) as it:
        it.until(lambda: len(broker.acked) == 1)
    assert store.posts["p1"]["insight"]["attempts"] == 2
    assert store.jobs == {}
