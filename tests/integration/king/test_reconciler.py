"""Lost posts are found and published again, by one King at a time; on real databases."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from common.errors import StoreRefused
from king.jobs import Job
from king.store.store import Store
from king.store_thread import RECONCILER_LEASE as LEASE
from king.store_thread import lost_messages
from tests.support.fakes.broker import MemoryBroker
from tests.support.king.king_rig import Running, fake_pool, king_settings
from tests.support.king.store_rig import (
    BUNDLE,
    NOW,
    StoreRig,
    context,
    mongo_settings,
    mongo_store,
    started,
    tagged,
)
from tests.support.services import wait_until


def test_lease_has_one_holder_until_it_runs_out(mongo: Store) -> None:
    """Its holder renews it; another King gets it only when it has expired."""
    first, second = context(owner="k1"), context(owner="k2")
    assert mongo.take_lease(LEASE, first, 60)
    assert not mongo.take_lease(LEASE, second, 60)
    assert mongo.take_lease(LEASE, replace(first, now=NOW + 50), 60)
    assert not mongo.take_lease(LEASE, replace(second, now=NOW + 70), 60)
    assert mongo.take_lease(LEASE, replace(second, now=NOW + 111), 60)
    assert not mongo.take_lease(LEASE, replace(first, now=NOW + 112), 60)


def test_lease_of_a_dead_king_is_free_and_no_job(mongo: Store) -> None:
    """A King that is known to be dead holds nothing; a lease is not counted among the jobs."""
    assert mongo.take_lease(LEASE, context(owner="dead"), 60)
    assert mongo.take_lease(LEASE, context(owner="k2", is_dead=lambda owner: owner == "dead"), 60)
    assert mongo.open_jobs() == 0
    assert mongo.queries.dead_letters() == []
    assert mongo.queries.counts()["jobs"] == {"running": 0, "waiting": 0, "queued": 0, "dead": 0}


def test_lease_that_many_want_at_once_goes_to_one(mongo_url: str, unique_name: str) -> None:
    """Free or expired: of eight Kings that reach for it together exactly one wins."""
    stores = [mongo_store(mongo_url, unique_name) for _ in range(8)]
    for now in (NOW, NOW + 1000):
        won: list[int] = []
        start = threading.Barrier(len(stores))

        def reach(i: int, now: float = now, won: Any = won, start: Any = start) -> None:
            start.wait()
            if stores[i].take_lease(LEASE, context(now=now, owner=f"k{i}"), 60):
                won.append(i)

        threads = [threading.Thread(target=reach, args=(i,)) for i in range(len(stores))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
    for store in stores:
        store.close()


def test_only_posts_without_result_and_job_are_published(mongo: Store) -> None:
    """A result, also a failed one, or a job in any state, a dead letter too, leaves a post out.

    But for tags of the served bundle that lack something, when they have rested for a while.
    """
    rig = StoreRig(mongo)
    rig.insert(
        {"_id": "lost", "text": "x"},
        {"_id": "tagged", "insight": {"status": "tagged"}},
        {"_id": "failed", "insight": {"status": "failed"}},
        {"_id": "works"},
        {"_id": "dead"},
        {"_id": 42},
        {"_id": "no\x00message"},
        {"_id": " spaced "},
    )
    for name, version in (("partial", BUNDLE[1]), ("older", "2025"), ("recent", BUNDLE[1])):
        ended_at = NOW - (60 if name == "recent" else 4000)
        rig.insert({"_id": name})
        begun = started(mongo, name, context(ended_at))
        mongo.finish([tagged(begun, version, partial=True, ended_at=ended_at)], context(ended_at))
    rig.set_job(Job("works", "running", 1, owner="k2", lease_until=NOW + 60))
    rig.set_job(Job("dead", "dead", 5))
    ids = [message.post_id for message in lost_messages(mongo, context(), 60, 10)]
    assert sorted(ids[:4]) == ['" spaced "', '"no\\u0000message"', "42", "lost"]
    assert ids[4:] == ["partial"], "with what room the lost ones leave"
    assert len(lost_messages(mongo, context(), 60, 2)) == 2


def test_batches_are_bounded_and_the_lease_decides(mongo: Store) -> None:
    """At most a batch at a time, and nothing for a King that does not hold the lease."""
    StoreRig(mongo).insert(*({"_id": f"p{i}"} for i in range(5)))
    assert len(lost_messages(mongo, context(owner="k1"), 60, 3)) == 3
    assert lost_messages(mongo, context(owner="k2"), 60, 3) == []
    later = context(now=NOW + 121, owner="k2")  # expired: twice the period
    assert len(lost_messages(mongo, later, 60, 3)) == 3


def test_a_refused_lease_costs_one_period(mongo: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """No right to write leases is a line in the log, and nothing waits for it."""

    def refuse(*_: object) -> bool:
        raise StoreRefused("not authorized")

    monkeypatch.setattr(mongo, "take_lease", refuse)
    with structlog.testing.capture_logs() as logs:
        assert lost_messages(mongo, context(), 60, 3) == []
    assert [line["event"] for line in logs] == ["king.reconcile_failed"]


def test_a_lost_post_is_published_once(tmp_path: Path, mongo_url: str, unique_name: str) -> None:
    settings = mongo_settings(mongo_url, unique_name)
    store = mongo_store(mongo_url, unique_name)
    store.client.posts.insert_many([{"_id": f"p{i}", "text": "x"} for i in range(4)])
    brokers = [MemoryBroker(), MemoryBroker()]
    kings = [
        Running(
            king_settings(tmp_path / f"k{i}", store=settings, reconcile_s=1.5),
            fake_pool(tmp_path / f"k{i}"),
            broker=broker,
            owner=f"k{i}",
        )
        for i, broker in enumerate(brokers)
    ]
    with structlog.testing.capture_logs() as logs, kings[0], kings[1]:
        wait_until(lambda: store.queries.counts()["tagged"] == 4, 60, "tags")
        time.sleep(1.0)
    assert [line["posts"] for line in logs if line["event"] == "king.reconciled"] == [4]
    assert sorted(len(broker.acked) for broker in brokers) == [0, 4]
    assert store.open_jobs() == 0
    store.close()
