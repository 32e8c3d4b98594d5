"""What a database refuses for good, and a refusal without a database, hold up nothing else."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from common.errors import ConfigError, StoreRefused, StoreUnavailable
from common.post import Failure
from king.jobs import Dead, Outcome, Retry, Tagged, WriteRefused
from king.store.client import StoreClient
from king.store.store import Store
from tests.support.fakes.broker import MemoryBroker
from tests.support.fakes.store import FakeStore
from tests.support.king.king_rig import Running, fake_pool, king_settings, on_fakes, queue_of
from tests.support.king.store_rig import NOW, StoreRig, claim, context, started, tagged

BROKEN = Failure("extract", "WorkerDied", "worker extract-0 died", retryable=True)


def test_refused_job_of_a_claim_does_not_hold_up_the_others(mongo: Store) -> None:
    """A job that cannot be written begins no work; the other claims of its batch begin."""
    StoreRig(mongo).insert(*({"_id": f"p{i}"} for i in range(3)))
    claims = [claim("p0"), replace(claim("p1"), payload="half \ud800"), claim("p2")]
    verdicts = mongo.begin(claims, context())
    assert [type(verdict).__name__ for verdict in verdicts] == [
        "Started",
        "WriteRefused",
        "Started",
    ]
    assert mongo.queries.job("p1") is None


def test_refused_job_of_an_attempt_is_a_plain_dead_letter(mongo: Store) -> None:
    """A time that no document can hold ends as a dead letter that says so; others are kept."""
    StoreRig(mongo).insert(*({"_id": f"p{i}"} for i in range(2)))
    outcomes: list[Outcome] = [
        Retry(started(mongo, "p0"), BROKEN, due_at=10**30),
        tagged(started(mongo, "p1")),
    ]
    recorded = mongo.finish(outcomes, context())
    assert [type(outcome) for outcome in recorded] == [Dead, Tagged]
    job = mongo.queries.job("p0")
    assert job is not None
    assert (job.state, (job.last_error or {})["type"]) == ("dead", "StoreRefused")
    post = mongo.queries.post("p0")
    assert post is not None
    assert post.result is not None
    assert post.result["status"] == "failed"


@pytest.mark.parametrize("value", [10**22, "\ud800", object()])
def test_question_that_has_no_bson_is_refused(mongo: Store, value: Any) -> None:
    """A number too large, half a character, a foreign object: a refusal, not a foreign error."""
    with pytest.raises(StoreRefused):
        mongo.queries.matching({"n": value})
    with pytest.raises(StoreRefused):
        list(mongo.queries.matching_ids({"n": value}))


def test_job_that_is_refused_whatever_it_says_is_unrecorded(
    mongo: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a validator would: the outcome comes back to be finished again, the others are written."""
    StoreRig(mongo).insert(*({"_id": f"p{i}"} for i in range(2)))
    begun = [started(mongo, "p0"), started(mongo, "p1")]
    bulk = StoreClient.bulk

    def picky(self: StoreClient, collection: Any, operations: Any) -> Any:
        count, refused = bulk(self, collection, operations)
        if collection.name == self.jobs.name:
            refused = {i: (121, "validation") for i, o in enumerate(operations) if "p0" in str(o)}
        return count, refused

    monkeypatch.setattr(StoreClient, "bulk", picky)
    recorded = mongo.finish([Retry(begun[0], BROKEN, NOW + 5), tagged(begun[1])], context())
    assert recorded == [WriteRefused("p0", "validation"), recorded[1]]
    assert isinstance(recorded[1], Tagged)


class PickyStore(FakeStore):
    """Refuses the jobs of some posts, at the begin or at the end, as often as it is told."""

    def __init__(self, posts: list[dict[str, Any]], at: str, times: int) -> None:
        super().__init__(posts)
        self.at, self.times = at, times

    def _refuse(self, at: str, post_id: str) -> bool:
        if self.at != at or post_id != "bad" or not self.times:
            return False
        self.times -= 1
        return True

    def begin(self, claims: Any, context: Any) -> Any:
        """As `FakeStore`, or refused."""
        refused = [self._refuse("begin", one.message.post_id) for one in claims]
        return [
            WriteRefused("bad", "validation")
            if no
            else super(PickyStore, self).begin([one], context)[0]
            for one, no in zip(claims, refused, strict=True)
        ]

    def finish(self, outcomes: Any, context: Any) -> Any:
        """As `FakeStore`, or refused."""
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
    """The others are acknowledged at once, the refused one when its job is written at last."""
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
    """A stop does not wait for a job that is refused: its message goes back to the queue."""
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
