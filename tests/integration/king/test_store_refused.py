"""Writes that MongoDB refuses for good hold up nothing else; on real databases."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from bson.errors import InvalidBSON
from pymongo.collection import Collection

from common.errors import StoreRefused
from common.post import Tag
from king.jobs import Dead, Outcome, Rejected, Retry, Started, Tagged, WriteRefused
from king.store.client import Refusal, StoreClient
from king.store.store import Store
from tests.support.king.store_rig import (
    BROKEN,
    BUNDLE,
    StoreRig,
    begin_one,
    claim,
    context,
    mongo_store,
    started,
    tagged,
)
from tests.support.mongo_proxy import MongoProxy
from tests.support.services import MongoServer


def test_refused_job_of_a_claim_does_not_hold_up_the_others(mongo: Store) -> None:
    StoreRig(mongo).insert(*({"_id": f"p{i}"} for i in range(3)))
    claims = [claim("p0"), replace(claim("p1"), payload="half \ud800"), claim("p2")]
    verdicts = mongo.begin(claims, context())
    assert [type(verdict) for verdict in verdicts] == [Started, Rejected, Started]
    job: Any = mongo.queries.job("p1")
    assert (job.state, (job.last_error or {})["stage"]) == ("dead", "store")


def test_a_refused_result_of_a_bundle_on_trial_costs_nothing_else(mongo: Store) -> None:
    rig = StoreRig(mongo)
    rig.insert(*({"_id": f"p{i}"} for i in range(2)))
    outcomes = [tagged(started(mongo, f"p{i}")) for i in range(2)]
    trials = [
        replace(each.result, tags=(Tag(tag_id, "x", 0.5),))  # BSON has no number of the first
        for each, tag_id in zip(outcomes, (10**30, 1), strict=True)
    ]
    tried = [
        replace(each, result=replace(each.result, shadow=trial))
        for each, trial in zip(outcomes, trials, strict=True)
    ]
    recorded = mongo.finish(tried, context())
    assert [type(outcome) for outcome in recorded] == [Tagged, Tagged]
    assert mongo.open_jobs() == 0
    assert [rig.result(f"p{i}")["status"] for i in range(2)] == ["tagged", "tagged"]
    assert rig.result("p0", "insight_shadow") is None
    assert rig.result("p1", "insight_shadow")["tags"][0]["name"] == "x"


class Endless(float):
    """A delay that leads to a time beyond int64."""

    def __radd__(self, _now: float) -> int:  # type: ignore[misc]
        return 10**30


def test_refused_job_of_an_attempt_is_a_plain_dead_letter(mongo: Store) -> None:
    """A time that no document can hold ends as a dead letter that says so; others are kept."""
    StoreRig(mongo).insert(*({"_id": f"p{i}"} for i in range(2)))
    outcomes: list[Outcome] = [
        Retry(started(mongo, "p0"), BROKEN, delay_s=Endless()),
        tagged(started(mongo, "p1")),
    ]
    recorded = mongo.finish(outcomes, context())
    assert [type(outcome) for outcome in recorded] == [Dead, Tagged]
    job: Any = mongo.queries.job("p0")
    assert (job.state, (job.last_error or {})["type"]) == ("dead", "StoreRefused")
    post: Any = mongo.queries.post("p0")
    assert post.result["status"] == "failed"


# Throttled, over a quota, interrupted, a plan killed, no right in a failover, unknown, elections, a
# full disk, one that nobody knows; and those that no repetition can help.
PASSING = (16500, 8000, 11601, 249, 175, 13, 8, 6, 50, 64, 91, 112, 10107, 14031, 99999)
PERMANENT = (2, 14, 28, 57, 66, 121, 10334, 17280, 17419)


@pytest.fixture
def refusing(mongo_server: MongoServer, unique_name: str) -> Iterator[tuple[Store, MongoProxy]]:
    """A store behind a proxy that refuses writes, with three posts."""
    proxy = MongoProxy(mongo_server.address)
    store = mongo_store(f"mongodb://127.0.0.1:{proxy.port}/", unique_name)
    StoreRig(store).insert(*({"_id": f"p{i}"} for i in range(3)))
    yield store, proxy
    store.close()
    proxy.close()


@pytest.mark.parametrize("collection", ["posts", "jobs"])
@pytest.mark.parametrize("code", PASSING)
def test_passing_error_costs_no_post(
    refusing: tuple[Store, MongoProxy], code: int, collection: str
) -> None:
    """The claim and the outcome wait, and are written when they are tried again."""
    store, proxy = refusing
    proxy.refuse_writes("jobs", code)
    assert isinstance(begin_one(store, "p0"), WriteRefused)
    outcome = tagged(started(store, "p0"))
    proxy.refuse_writes(collection, code)
    [refused] = store.finish([outcome], context())
    assert isinstance(refused, WriteRefused)
    assert f"code {code}" in refused.reason
    job: Any = store.queries.job("p0")
    assert job.state == "running"
    assert store.finish([outcome], context()) == [outcome]
    assert store.queries.job("p0") is None


@pytest.mark.parametrize("code", PERMANENT)
def test_permanent_error_is_a_dead_letter(refusing: tuple[Store, MongoProxy], code: int) -> None:
    store, proxy = refusing
    outcome = tagged(started(store, "p0"))
    proxy.refuse_writes("posts", code)
    [dead] = store.finish([outcome], context())
    assert isinstance(dead, Dead)
    proxy.refuse_writes("jobs", code)
    assert isinstance(begin_one(store, "p1"), Rejected)
    letters = {job.post_id: job.last_error or {} for job in store.queries.dead_letters()}
    assert {key: error["type"] for key, error in letters.items()} == {
        "p0": "StoreRefused",
        "p1": "StoreRefused",
    }
    assert all(f"code {code}" in error["message"] for error in letters.values())


@pytest.mark.parametrize(
    "error",
    [
        InvalidBSON("unknown type"),
        RecursionError("maximum recursion depth exceeded"),
        OverflowError("date out of range"),
    ],
)
def test_document_that_is_no_bson_is_a_dead_letter_and_the_others_go_on(
    mongo: Store, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    StoreRig(mongo).insert(*({"_id": f"p{i}"} for i in range(5)))
    find = Collection.find

    def picky(self: Any, condition: Any, *rest: Any) -> Any:
        if self.name == "posts" and "p3" in str(condition):
            raise error
        return find(self, condition, *rest)

    monkeypatch.setattr(Collection, "find", picky)
    verdicts = mongo.begin([claim(f"p{i}") for i in range(5)], context())
    assert [type(verdict) for verdict in verdicts] == [Started, Started, Started, Rejected, Started]
    job: Any = mongo.queries.job("p3")
    assert (job.state, (job.last_error or {})["type"]) == ("dead", "StoreRefused")


@pytest.mark.parametrize("value", [10**22, "\ud800", object()])
def test_question_that_has_no_bson_is_refused(mongo: Store, value: Any) -> None:
    """A number too large, half a character, a foreign object: a refusal, not a foreign error."""
    with pytest.raises(StoreRefused):
        mongo.queries.matching({"n": value})
    with pytest.raises(StoreRefused):
        list(mongo.queries.matching_ids({"n": value}))


def test_always_refused_jobs_are_unrecorded(mongo: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a validator would: the outcome comes back to be finished again, the others are written."""
    StoreRig(mongo).insert(*({"_id": f"p{i}"} for i in range(2)))
    begun = [started(mongo, "p0"), started(mongo, "p1")]
    bulk = StoreClient.bulk

    def picky(self: StoreClient, collection: Any, operations: Any) -> Any:
        result = bulk(self, collection, operations)
        if collection.name != self.jobs.name:
            return result
        refusal = Refusal("validation", is_permanent=True)
        refused = {i: refusal for i, o in enumerate(operations) if "p0" in str(o)}
        return replace(result, refused=refused)

    monkeypatch.setattr(StoreClient, "bulk", picky)
    recorded = mongo.finish([Retry(begun[0], BROKEN, 5), tagged(begun[1])], context())
    assert recorded == [WriteRefused("p0", "validation"), recorded[1]]
    assert isinstance(recorded[1], Tagged)


def test_one_result_that_cannot_be_written_does_not_hold_up_the_others(mongo: Store) -> None:
    mongo.client.posts.insert_many([{"_id": f"p{i}"} for i in range(3)])
    begun = [started(mongo, f"p{i}") for i in range(3)]
    outcomes = [tagged(begun[0]), tagged(begun[1], BUNDLE[1], "half \ud800"), tagged(begun[2])]
    recorded = mongo.finish(outcomes, context())
    assert [type(outcome) for outcome in recorded] == [Tagged, Dead, Tagged]
    assert mongo.queries.counts()["tagged"] == 2
    job: Any = mongo.queries.job("p1")
    assert job.state == "dead"
    assert job.last_error["stage"] == "store"
