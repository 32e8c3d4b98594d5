"""A job that the database refuses, and a refusal without a database, hold up nothing else."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import structlog

from common.errors import ConfigError, StoreUnavailable
from king.jobs import WriteRefused
from tests.support.fakes.broker import MemoryBroker
from tests.support.fakes.store import FakeStore
from tests.support.king.king_rig import Running, fake_pool, king_settings, on_fakes, queue_of


class PickyStore(FakeStore):
    """Refuses the jobs of some posts, at the begin or at the end, as often as asked."""

    def __init__(self, posts: list[dict[str, Any]], at: str, times: int) -> None:
        super().__init__(posts)
        self.at, self.times = at, times

    def _refuse(self, at: str, post_id: str) -> bool:
        if self.at != at or post_id != "bad" or not self.times:
            return False
        self.times -= 1
        return True

    def begin(self, claims: Any, context: Any) -> Any:
        refused = [self._refuse("begin", one.message.post_id) for one in claims]
        return [
            WriteRefused("bad", "validation")
            if no
            else super(PickyStore, self).begin([one], context)[0]
            for one, no in zip(claims, refused, strict=True)
        ]

    def finish(self, outcomes: Any, context: Any) -> Any:
        refused = [self._refuse("finish", one.started.post_id) for one in outcomes]
        return [
            WriteRefused("bad", "validation")
            if no
            else super(PickyStore, self).finish([one], context)[0]
            for one, no in zip(outcomes, refused, strict=True)
        ]


@pytest.mark.parametrize("at", ["begin", "finish"])
def test_refused_job_waits_alone_and_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    monkeypatch.setattr("king.store_thread._REFUSED_AGAIN_S", 0.3)
    store = PickyStore([{"_id": "bad", "text": "x"}, {"_id": "good", "text": "x"}], at, 3)
    broker = MemoryBroker(queue_of(b"bad", b"good"))
    with structlog.testing.capture_logs() as logs, on_fakes(tmp_path, store, broker) as it:
        it.until(lambda: len(broker.acked) == 1)
        assert "good" not in store.jobs
        it.until(lambda: len(broker.acked) == 2)
    refused = [line for line in logs if line["event"] == "king.job_refused"]
    assert [(line["post_id"], line["reason"]) for line in refused] == [("bad", "validation")] * 3
    assert store.posts["bad"]["insight"]["attempts"] == 1
    assert store.jobs == {}


@pytest.mark.parametrize("at", ["begin", "finish"])
def test_drain_puts_a_refused_post_back(tmp_path: Path, at: str) -> None:
    store = PickyStore([{"_id": "bad", "text": "x"}], at, 10_000)
    broker = MemoryBroker(queue_of(b"bad"))
    with on_fakes(tmp_path, store, broker, drain_timeout_s=50) as it:
        it.until(lambda: store.times < 10_000)
        begun = time.monotonic()
    assert time.monotonic() - begun < 40
    assert it.exit_code == 0
    assert broker.acked == []
    assert len(broker.queue.waiting) == 1


def test_refused_workers_end_the_king_soon_without_a_database(tmp_path: Path) -> None:
    """A database that does not answer holds up no refusal, and is no stuck thread."""
    timed_out = threading.Event()

    class Away(FakeStore):
        """Answers no sooner than a driver's time-out."""

        def connect(self) -> None:
            timed_out.wait(40)
            raise StoreUnavailable("fake://: no server")

    pool = fake_pool(tmp_path, refuse="fusion.bundle: made for other features")
    begun = time.monotonic()
    with structlog.testing.capture_logs() as logs:
        king = Running(king_settings(tmp_path), pool, store=Away(), broker=MemoryBroker())
        with king as it:
            it.join()
    assert time.monotonic() - begun < 30
    timed_out.set()
    assert isinstance(it.error, ConfigError)
    assert [line["event"] for line in logs if line["log_level"] == "error"] == []
