"""The King while its database, its broker or another King is away."""

import time
from pathlib import Path

import pytest
import structlog

from king.jobs import Job
from tests.support.fakes.broker import MemoryBroker
from tests.support.fakes.pool import DIED, Answer, default_answer
from tests.support.fakes.store import FakeStore
from tests.support.king.king_rig import Gate, on_fakes, posts, queue_of
from workers.protocol import FuseTask, Task


def test_database_away_stops_intake_and_nothing_else(tmp_path: Path) -> None:
    ids = [f"p{i}" for i in range(30)]
    store = FakeStore(posts(*ids))
    broker = MemoryBroker(queue_of(*[i.encode() for i in ids]), prefetch=8)
    gate = Gate()
    with structlog.testing.capture_logs() as logs:
        with on_fakes(tmp_path, store, broker, gate) as it:
            it.until(lambda: len(broker.unacked) == 8)
            store.down.set()
            gate.open.set()
            it.until(lambda: it.king.status.phase == "store_down")
            acked = len(broker.acked)
            ticked = it.king.status.ticks["broker"]
            time.sleep(0.6)
            assert len(broker.acked) == acked == 0
            assert len(broker.unacked) == 8
            it.until(lambda: it.king.status.ticks["broker"] > ticked)
            store.down.clear()
            it.until(lambda: len(broker.acked) == 30)
            it.until(lambda: it.king.status.phase == "serving")
    assert all(post["insight"]["status"] == "tagged" for post in store.posts.values())
    assert any(line["event"] == "king.store_unreachable" and line["url"] for line in logs)
    assert any(line["event"] == "king.store_reached" for line in logs)


def test_broker_and_database_away_at_the_start(tmp_path: Path) -> None:
    store, broker = FakeStore(posts("p1")), MemoryBroker(queue_of(b"p1"))
    store.down.set()
    broker.queue.reachable = False
    with structlog.testing.capture_logs() as logs, on_fakes(tmp_path, store, broker) as it:
        it.until(lambda: it.king.status.phase == "store_down")
        store.down.clear()
        it.until(lambda: it.king.status.phase == "broker_down")
        broker.queue.reachable = True
        it.until(lambda: len(broker.acked) == 1)
    assert {"king.store_unreachable", "king.broker_unreachable"} <= {line["event"] for line in logs}


def test_lost_connection_loses_and_repeats_nothing(tmp_path: Path) -> None:
    ids = [f"p{i}" for i in range(6)]
    store, gate = FakeStore(posts(*ids)), Gate()
    broker = MemoryBroker(queue_of(*[i.encode() for i in ids]))
    with on_fakes(tmp_path, store, broker, gate) as it:
        it.until(lambda: sum(isinstance(t, FuseTask) for t in it.pool.submitted) == 6)
        broker.lose_connection()
        it.until(lambda: broker.generation == 2 and len(broker.unacked) == 1)
        gate.open.set()
        it.until(lambda: len(broker.acked) == 6)
    assert sum(isinstance(task, FuseTask) for task in it.pool.submitted) == 6
    assert broker.queue.waiting == []
    assert store.jobs == {}


def test_what_a_broker_cannot_do_is_said_once(tmp_path: Path) -> None:
    """At the start, not again with each connection."""
    broker = MemoryBroker(queue_of(b"p1"))
    broker.shortcoming = "it ignores priorities"
    with structlog.testing.capture_logs() as logs:
        with on_fakes(tmp_path, FakeStore(posts("p1", "p2")), broker) as it:
            it.until(lambda: len(broker.acked) == 1)
            broker.lose_connection()
            broker.queue.put(b"p2")
            it.until(lambda: len(broker.acked) == 2)
    said = [line["reason"] for line in logs if line["event"] == "king.broker_shortcoming"]
    assert (said, broker.generation) == (["it ignores priorities"], 2)


def test_a_full_queue_holds_up_retries_and_nothing_else(tmp_path: Path) -> None:
    """While it takes no messages, the connection stays, posts go on, and the status says why."""
    deaths = iter((DIED,))
    broker = MemoryBroker(queue_of(b"p0"))

    def answer(task: Task) -> Answer:
        return next(deaths, None) or default_answer(task)

    ids = [f"p{i}" for i in range(20)]
    store = FakeStore(posts(*ids))
    broker.queue.full = True
    with structlog.testing.capture_logs() as logs:
        with on_fakes(tmp_path, store, broker, answer) as it:
            it.until(lambda: it.king.status.publish_refused)
            for post_id in ids[1:]:
                broker.queue.put(post_id.encode())
            it.until(lambda: len(broker.acked) == 20)
            assert it.king.status.phase == "serving"
            snapshot = it.king.status.snapshot(in_flight=0, oldest_in_flight_s=0)
            assert "full" in snapshot["publish_refused"]
            broker.queue.full = False
            it.until(lambda: store.posts["p0"].get("insight"))
            assert it.king.status.publish_refused is None
    assert broker.generation == 1
    events = [line["event"] for line in logs]
    assert {"king.publish_refused", "king.publish_accepted"} <= set(events)
    assert "king.broker_unreachable" not in events


def test_a_stop_does_not_wait_for_a_full_queue(tmp_path: Path) -> None:
    deaths = iter((DIED,))
    broker = MemoryBroker(queue_of(b"p0"))
    broker.queue.full = True

    def answer(task: Task) -> Answer:
        return next(deaths, None) or default_answer(task)

    with on_fakes(tmp_path, FakeStore(posts("p0")), broker, answer, drain_timeout_s=600) as it:
        it.until(lambda: it.king.status.publish_refused)
        it.king.stop()
        it.join(60)
    assert it.exit_code == 0


class BreaksAfterConnecting(MemoryBroker):
    """A server that accepts every connection and ends it at once, until it has been healed."""

    def __init__(self, times: int) -> None:
        super().__init__(queue_of(b"p0"))
        self.times = times

    def drain(self, timeout_s: float) -> int:
        if self.times:
            self.times -= 1
            self.lose_connection()
        return super().drain(timeout_s)


def test_pauses_grow_until_a_connection_has_done_some_work(tmp_path: Path) -> None:
    """Connecting alone proves nothing; after the first acknowledgement they start small again."""
    broker = BreaksAfterConnecting(times=4)
    with structlog.testing.capture_logs() as logs:
        with on_fakes(tmp_path, FakeStore(posts("p0")), broker) as it:
            it.until(lambda: len(broker.acked) == 1)
            drained = it.king.status.queue_depth
            it.until(lambda: it.king.status.queue_depth != drained)
            broker.times = 1
            it.until(lambda: broker.times == 0 and broker.connected)
    pauses = [line["retry_in_s"] for line in logs if line["event"] == "king.broker_unreachable"]
    limits = [0.25, 0.5, 1.0, 2.0, 0.25]
    assert len(pauses) == len(limits)
    assert all(limit / 2.1 <= pause <= limit for pause, limit in zip(pauses, limits, strict=True))


def test_job_of_another_king_is_parked_and_taken_over(tmp_path: Path) -> None:
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


def test_dead_kings_orphans_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("king.store_thread._RELEASE_AFTER_S", 0.1)
    monkeypatch.setattr("king.king.is_dead", lambda owner: owner == "dead")
    store, broker = FakeStore(posts("p1")), MemoryBroker()
    far = time.time() + 1000
    store.jobs["p1"] = Job("p1", "running", 1, owner="dead", lease_until=far, due_at=far)
    with on_fakes(tmp_path, store, broker) as it:
        it.until(lambda: len(broker.acked) == 1)
    assert store.posts["p1"]["insight"]["attempts"] == 2
    assert store.jobs == {}
