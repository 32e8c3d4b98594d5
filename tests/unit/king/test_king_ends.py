"""Ends of the King: drained, out of time, refused, or by a thread that dies."""

import io
import time
from pathlib import Path

import pytest
import structlog

from common.errors import ConfigError, RetryableError
from king.jobs import Job
from tests.support.fakes.broker import MemoryBroker
from tests.support.fakes.pool import DIED, Answer, default_answer
from tests.support.fakes.store import FakeStore
from tests.support.king import king_rig
from tests.support.services import wait_until
from workers.protocol import FuseTask, Task


def test_drain_mode_waits_for_retries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --drain the King ends by itself, after the queue, the posts in flight and the retries.

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

    store = FakeStore(king_rig.posts(*[f"p{i}" for i in range(20)]))
    broker = MemoryBroker(king_rig.queue_of(*[f"p{i}".encode() for i in range(20)]))
    settings = king_rig.king_settings(tmp_path, attempts=9, backoff_s=1)
    with king_rig.Running(
        settings, king_rig.fake_pool(tmp_path, answer), store=store, broker=broker, drain=True
    ) as it:
        it.join()
    assert it.exit_code == 0
    assert all(post["insight"]["status"] == "tagged" for post in store.posts.values())
    assert store.jobs == {}
    assert broker.queue.waiting == []
    assert "20 tagged, 0 failed, 0 in flight, 0 queued" in terminal.getvalue()


def test_drain_finishes_what_is_in_flight(tmp_path: Path) -> None:
    store, gate = FakeStore(king_rig.posts("p1", "p2")), king_rig.Gate()
    broker = MemoryBroker(king_rig.queue_of(b"p1"))
    with king_rig.on_fakes(tmp_path, store, broker, gate) as it:
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
    """Posts that are not finished in time are requeued at no attempt; two stops mean at once."""
    store = FakeStore(king_rig.posts("p1", "p2"))
    store.jobs["p2"] = Job("p2", "queued", attempts=1, due_at=time.time() + 900)
    broker = MemoryBroker(king_rig.queue_of(b"p1", b"p2"))
    settings = king_rig.king_settings(tmp_path, drain_timeout_s=60 if at_once else 0.3)
    with king_rig.Running(
        settings, king_rig.fake_pool(tmp_path, king_rig.Gate()), store=store, broker=broker
    ) as it:
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


def test_refused_workers_end_the_king_with_one_line(tmp_path: Path) -> None:
    """A bundle that does not fit is a mistake of the user: ConfigError, hence exit 2."""
    pool = king_rig.fake_pool(tmp_path, refuse="fusion.bundle: made for other features")
    store, broker = FakeStore(), MemoryBroker()
    with king_rig.Running(king_rig.king_settings(tmp_path), pool, store=store, broker=broker) as it:
        it.join()
    assert isinstance(it.error, ConfigError)
    assert str(it.error) == "fusion.bundle: made for other features"


class LimitedBroker(MemoryBroker):
    """Refuses connections as for wrong settings while it is full."""

    full = False

    def _open(self, declare: bool) -> None:
        if self.full:
            raise ConfigError("broker memory://: vhost connection limit (1) is reached")
        super()._open(declare)


def test_a_king_that_has_served_ends_with_1_where_it_would_have_refused(tmp_path: Path) -> None:
    """Its configuration was right: the supervisor starts it again."""
    store, broker = FakeStore(), MemoryBroker()
    with king_rig.on_fakes(tmp_path, store, broker) as it:
        wait_until(lambda: it.king.status.phase == "serving", 60, "a King that serves")
        it.pool.refuse("weights have changed")
        it.join()
    assert isinstance(it.error, RetryableError)
    assert str(it.error) == "weights have changed"


def test_a_refused_reconnection_is_tried_again_a_refused_first_one_is_not(tmp_path: Path) -> None:
    """A limit of connections may be reached whenever the connection is lost."""
    store, broker = FakeStore(king_rig.posts("p1")), LimitedBroker()
    with king_rig.on_fakes(tmp_path / "a", store, broker) as it:
        wait_until(lambda: it.king.status.phase == "serving", 60, "a King that serves")
        broker.full = True
        broker.lose_connection()
        wait_until(lambda: it.king.status.phase == "broker_down", 60, "a lost broker")
        broker.full = False
        wait_until(lambda: it.king.status.phase == "serving", 60, "the broker again")
        it.king.stop()
        it.join()
    assert it.exit_code == 0
    broker = LimitedBroker()
    broker.full = True
    with king_rig.on_fakes(tmp_path / "b", FakeStore(), broker) as it:
        it.join()
    assert isinstance(it.error, ConfigError)


def test_a_thread_that_dies_ends_the_king(tmp_path: Path) -> None:
    """An unexpected exception is logged and exits 1, so that the supervisor starts anew."""

    def boom(task: Task) -> Answer:
        raise RuntimeError("a bug")

    store, broker = FakeStore(king_rig.posts("p1")), MemoryBroker(king_rig.queue_of(b"p1"))
    with structlog.testing.capture_logs() as logs:
        with king_rig.on_fakes(tmp_path, store, broker, boom) as it:
            it.join()
    assert it.exit_code == 1
    [died] = [line for line in logs if line["event"] == "king.thread_died"]
    assert died["thread"] == "dispatch"
    assert [m.body for m in broker.queue.waiting] == [b"p1"]
    assert it.pool.stopped
