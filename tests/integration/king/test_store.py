"""The store on a real database: posts, tags and jobs."""

import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from bson import Int64, ObjectId

from common.post import Failure, Media, Tag
from king import jobs
from king.store.client import StoreClient
from king.store.documents import id_text
from king.store.store import Store
from tests.support.king.store_rig import (
    BROKEN,
    BUNDLE,
    NOW,
    StoreRig,
    begin_one,
    claim,
    context,
    started,
    tagged,
)


def test_attempt_is_recorded_before_the_work(rig: StoreRig) -> None:
    """A post that begins has a running job with one attempt, so that a crash counts."""
    rig.insert({"_id": "p1", "text": "雨", "images": ["http://a/1"], "videos": {"url": "http://v"}})
    begun = started(rig.store, "p1", priority=4)
    assert begun.post.text == "雨"
    assert begun.post.media == (Media("image", "http://a/1"), Media("video", "http://v"))
    assert (begun.attempt, begun.document_id, begun.priority) == (1, "p1", 4)
    job = rig.the_job("p1")
    assert (job.state, job.attempts, job.owner) == ("running", 1, "k1")
    assert (job.first_at, job.lease_until, job.priority) == (NOW, NOW + 60, 4)


def test_tagged_post_gets_its_result_and_loses_its_job(rig: StoreRig) -> None:
    """The result sub-document has the contract's keys."""
    rig.insert({"_id": "p1", "text": "x"})
    [recorded] = rig.store.finish([tagged(started(rig.store, "p1"))], context())
    assert isinstance(recorded, jobs.Tagged)
    result = rig.result("p1")
    assert abs(result.pop("tagged_at") - datetime.now(timezone.utc)) < timedelta(seconds=20)
    assert result == {
        "model": BUNDLE[0],
        "version": BUNDLE[1],
        "status": "tagged",
        "tags": [{"id": 0, "name": "雨", "score": 0.75}],
        "modalities": {"video": "missing", "image": "failed", "text": "ok"},
        "failures": {"image": {"stage": "fetch", "type": "FetchRefused", "message": "HTTP 404"}},
        "error": None,
        "attempts": 1,
        "timings_ms": {"fetch": 3, "total": 9},
    }
    assert rig.job("p1") is None


def test_repeated_write_of_an_outcome_changes_nothing(rig: StoreRig) -> None:
    """A write whose reply was lost is written again: the very same result, to the millisecond."""
    rig.insert({"_id": "p1", "text": "x"})
    outcome = tagged(started(rig.store, "p1"))
    rig.store.finish([outcome], context())
    first = rig.result("p1")
    time.sleep(0.01)
    rig.store.finish([outcome], context(NOW + 5))
    assert rig.result("p1") == first


def tried(outcome: jobs.Tagged, version: str, tag_id: int = 0) -> jobs.Tagged:
    """The same outcome with the result of a bundle on trial."""
    tags = (Tag(tag_id, "sun", 0.5),)
    trial = replace(outcome.result, model="trial", version=version, tags=tags)
    return replace(outcome, result=replace(outcome.result, shadow=trial))


def test_a_bundle_on_trial_has_a_document_of_its_own(rig: StoreRig) -> None:
    """The latest trial's, even of an older bundle; none for a post that a newer one has tagged."""
    rig.insert({"_id": "p1"}, {"_id": "p2"})
    begun = started(rig.store, "p1")
    rig.store.finish([tagged(begun)], context())
    plain = rig.result("p1")
    assert rig.result("p1", "insight_shadow") is None
    for version in ("20260301T000000Z-cc", "20260201T000000Z-bb"):
        outcome = tried(tagged(begun, ended_at=plain["tagged_at"].timestamp()), version)
        rig.store.finish([outcome], context())
        assert rig.result("p1") == plain
        trial = rig.result("p1", "insight_shadow")
        assert (trial["model"], trial["version"]) == ("trial", version)
        assert trial.keys() == plain.keys()
    newer = context(bundle=("demo", "20270101T000000Z-aa"))
    begun = started(rig.store, "p2", newer)
    rig.store.finish([tagged(begun, newer.bundle[1])], newer)
    begun = started(rig.store, "p2", force=True)
    [recorded] = rig.store.finish([tried(tagged(begun), "20260301T000000Z-cc")], context())
    assert isinstance(recorded, jobs.Superseded)
    assert rig.result("p2", "insight_shadow") is None


def test_every_type_of_id_that_the_database_takes_is_tagged_on_every_path(rig: StoreRig) -> None:
    """Listed, published, begun, written, shown; `tests/unit/king/test_ids.py` has the others."""
    values = ["p1", " x ", ObjectId(), 42, -7, Int64(1212092628029698048), 43.0, 2.0**31 + 2, 1.5]
    values.append(datetime(2026, 1, 1, tzinfo=timezone.utc))
    rig.insert(*({"_id": value, "text": "t"} for value in values))
    ids = [id_text(value) for value in values]
    assert sorted(rig.store.untagged_ids()) == sorted(ids)
    verdicts = rig.store.begin([claim(post_id) for post_id in ids], context())
    outcomes = [tagged(v, BUNDLE[1], v.post_id) for v in verdicts if isinstance(v, jobs.Started)]
    rig.store.finish(outcomes, context())
    results = {id_text(key): r and r["tags"][0]["name"] for key, r in rig.results().items()}
    assert results == {post_id: post_id for post_id in ids}
    if isinstance(rig.real, Store):
        for post_id in ids:
            stored: Any = rig.real.queries.post(post_id)
            assert stored.result is not None
        assert list(rig.real.queries.among([*ids, "absent"], {})) == ids


def test_unknown_post_that_appears_later_is_tagged(rig: StoreRig) -> None:
    """An unknown ID is a dead letter; published again it starts over, redelivered it does not."""
    verdict = begin_one(rig.store, "p1")
    assert isinstance(verdict, jobs.Rejected)
    assert verdict.failure.type == "PostNotFound"
    job = rig.the_job("p1")
    assert (job.state, job.payload) == ("dead", "p1")
    assert (job.last_error or {})["stage"] == "load"
    rig.insert({"_id": "p1"})
    assert begin_one(rig.store, "p1", redelivered=True) == jobs.Settled("p1", "dead")
    assert started(rig.store, "p1").attempt == 1


def test_same_bundle_tags_once_unless_forced(rig: StoreRig) -> None:
    rig.insert({"_id": "p1"})
    rig.store.finish([tagged(started(rig.store, "p1"))], context())
    assert begin_one(rig.store, "p1") == jobs.Settled("p1", "tagged")
    newer = context(bundle=("demo", "20270101T000000Z-bb"))
    assert isinstance(begin_one(rig.store, "p1", newer), jobs.Started)
    assert rig.job("p1") is not None
    assert begin_one(rig.store, "p1") == jobs.Settled(
        "p1", "tagged"
    )  # the older one has nothing to do
    assert isinstance(begin_one(rig.store, "p1", force=True), jobs.Started)


def test_partial_tags_are_tried_again_after_a_pause_a_few_times(rig: StoreRig) -> None:
    """Too early, the message is settled; then each try is one attempt, until they are used up."""
    rig.insert({"_id": "p1"}, {"_id": "whole"})
    rig.store.finish([tagged(started(rig.store, "whole"))], context())
    now, ended = NOW, 0
    for attempt in range(1, 7):
        run = context(now)
        begun = started(rig.store, "p1", run)
        assert begun.attempt == attempt
        if attempt < 3:  # the attempts of its first message
            failure = Failure("fetch", "FetchRetryable", "HTTP 503", retryable=True)
            rig.store.finish([jobs.Retry(begun, failure, now + 1)], run)
            now += 2
            continue
        rig.store.finish([tagged(begun, partial=True, ended_at=now)], run)
        assert rig.result("p1")["attempts"] == attempt
        assert rig.job("p1") is None
        for later in (0, 3599 * 2**ended):
            assert begin_one(rig.store, "p1", context(now + later)) == jobs.Settled("p1", "tagged")
            assert list(rig.store.partial_ids(context(now + later))) == []
        now += 3600 * 2**ended + 1
        ended += 1
        is_due = attempt < 6
        assert list(rig.store.partial_ids(context(now))) == (["p1"] if is_due else [])
        newer = context(now, bundle=("demo", "20270101T000000Z-bb"))
        assert list(rig.store.partial_ids(newer)) == []
    assert begin_one(rig.store, "p1", context(now + 1e6)) == jobs.Settled("p1", "tagged")
    assert started(rig.store, "p1", context(now), force=True).attempt == 1


def test_older_bundle_never_overwrites_a_newer_one(rig: StoreRig) -> None:
    rig.insert({"_id": "p1"}, {"_id": "p2"}, {"_id": "p3"}, {"_id": "p4"})
    old, new = "20250101T000000Z-00", "20270101T000000Z-ff"
    for post_id, first, second in (("p1", new, old), ("p2", old, new)):
        for version in (first, second):
            run = context(bundle=("demo", version))
            done = tagged(started(rig.store, post_id, run, force=True), version)
            [recorded] = rig.store.finish([done], run)
            if (version, second) == (old, old):
                assert isinstance(recorded, jobs.Superseded)
                assert recorded.version == new
            else:
                assert isinstance(recorded, jobs.Tagged)
        assert rig.result(post_id)["version"] == new
        assert rig.job(post_id) is None
    permanent = Failure("decode", "MediaError", "broken")
    for post_id, version, status in (("p3", BUNDLE[1], "tagged"), ("p4", old, "failed")):
        done = tagged(started(rig.store, post_id, force=True), version)
        rig.store.finish([done], context())
        rig.store.finish([jobs.Dead(started(rig.store, post_id, force=True), permanent)], context())
        assert rig.result(post_id)["status"] == status


def test_retry_waits_then_one_king_publishes_it(rig: StoreRig) -> None:
    """A failed attempt is due at its time, is claimed by one King only, and counts on."""
    rig.insert({"_id": "p1"})
    rig.store.finish([jobs.Retry(started(rig.store, "p1", force=True), BROKEN, 8)], context())
    job = rig.the_job("p1")
    assert (job.state, job.attempts, job.due_at) == ("waiting", 1, NOW + 8)
    assert job.last_error == BROKEN.as_dict()
    assert begin_one(rig.store, "p1", context(NOW + 1)) == jobs.Settled("p1", "waiting")
    assert rig.store.claim_due(context(NOW + 7), 10) == []
    [due] = rig.store.claim_due(context(NOW + 9), 10)
    assert due.message.force
    assert rig.store.claim_due(context(NOW + 9, owner="k2"), 10) == []
    rig.store.published(["p1"], context(NOW + 9))
    after = rig.the_job("p1")
    assert (after.state, after.owner, after.due_at) == ("queued", None, NOW + 9 + jobs.QUEUED_FOR_S)
    assert started(rig.store, "p1", context(NOW + 10)).attempt == 2


@pytest.mark.parametrize("step_s", [-7200.0, 7200.0])
def test_a_clock_that_is_set_delays_no_retry(rig: StoreRig, step_s: float) -> None:
    """A retry that was due in 8 s is not due in two hours, by the queue or by the reconciler."""
    rig.insert({"_id": "p1"}, {"_id": "p2"})
    for post_id in ("p1", "p2"):
        rig.store.finish([jobs.Retry(started(rig.store, post_id), BROKEN, 8)], context())
    [due] = rig.store.claim_due(context(NOW + step_s), 1)
    assert due.post_id in ("p1", "p2")
    [other] = {"p1", "p2"} - {due.post_id}
    assert started(rig.store, other, context(NOW + step_s)).attempt == 2


@pytest.mark.parametrize("step_s", [-7200.0, 7200.0])
def test_a_king_whose_clock_is_wrong_goes_by_the_database(
    mongo: Store, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    """Else it would take jobs from the Kings of other hosts, or hold its own against them."""
    true_time = time.time
    mongo.client.posts.insert_one({"_id": "p1"})
    started(mongo, "p1", context(mongo.now))
    monkeypatch.setattr(time, "time", lambda: true_time() + step_s)
    other = Store(StoreClient(mongo.client.settings))
    other.connect()
    assert abs(other.now - true_time()) < 30
    assert isinstance(begin_one(other, "p1", context(other.now, owner="k2")), jobs.HeldElsewhere)
    other.close()


def test_claimed_but_never_published_is_due_again(rig: StoreRig) -> None:
    rig.insert({"_id": "p1"})
    rig.store.finish([jobs.Retry(started(rig.store, "p1"), BROKEN, 0)], context())
    assert len(rig.store.claim_due(context(NOW + 1), 10)) == 1
    assert len(rig.store.claim_due(context(NOW + 70, owner="k2"), 10)) == 1


def test_attempts_are_used_up(rig: StoreRig) -> None:
    rig.insert({"_id": "p1"})
    for attempt in (1, 2, 3):
        begun = started(rig.store, "p1", context(NOW + attempt * 10))
        assert begun.attempt == attempt
        rig.store.finish([jobs.Retry(begun, BROKEN, 0)], context(NOW + attempt * 10))
    verdict = begin_one(rig.store, "p1", context(NOW + 99))
    assert isinstance(verdict, jobs.Rejected)
    assert verdict.failure.type == "Exhausted"
    assert BROKEN.message in verdict.failure.message
    assert rig.result("p1")["status"] == "failed"
    assert rig.result("p1")["error"]["type"] == "Exhausted"
    job = rig.the_job("p1")
    assert (job.state, job.attempts) == ("dead", 3)


def test_a_crash_counts_as_an_attempt(rig: StoreRig) -> None:
    rig.insert({"_id": "p1"})
    started(rig.store, "p1", context(owner="dead"))
    assert begin_one(rig.store, "p1", context(NOW + 5)) == jobs.HeldElsewhere("p1", NOW + 60)
    known = context(NOW + 5, is_dead=lambda owner: owner == "dead")
    assert started(rig.store, "p1", known).attempt == 2  # seen to be dead: no waiting
    late = context(NOW + 66, owner="k3")
    assert started(rig.store, "p1", late).attempt == 3  # its lease has run out
    verdict = begin_one(rig.store, "p1", context(NOW + 200, owner="k4"))
    assert isinstance(verdict, jobs.Rejected)
    assert "died each time" in verdict.failure.message


def test_leases_are_renewed_only_by_their_owner(rig: StoreRig) -> None:
    rig.insert({"_id": "p1"})
    started(rig.store, "p1")
    rig.store.renew(["p1"], context(NOW + 50, owner="k2"))
    rig.store.renew(["p1"], context(NOW + 40))
    assert begin_one(rig.store, "p1", context(NOW + 90, owner="k2")) == jobs.HeldElsewhere(
        "p1", NOW + 100
    )
    assert rig.store.claim_due(context(NOW + 159, owner="k2"), 10) == []
    # Its message is lost and its King too: it is published again by itself.
    assert [j.post_id for j in rig.store.claim_due(context(NOW + 161, owner="k2"), 10)] == ["p1"]


def test_late_outcome_of_a_lost_job_leaves_the_new_owner_alone(rig: StoreRig) -> None:
    """A King that was taken for dead writes its tags, and not over the other's job."""
    rig.insert({"_id": "p1"})
    slow = started(rig.store, "p1")
    started(rig.store, "p1", context(NOW + 61, owner="k2"))
    rig.store.finish([tagged(slow)], context(NOW + 62))
    assert rig.result("p1")["status"] == "tagged"
    job = rig.the_job("p1")
    assert (job.state, job.owner) == ("running", "k2")


def test_own_claim_whose_reply_was_lost_is_resumed(rig: StoreRig) -> None:
    rig.insert({"_id": "p1"})
    assert started(rig.store, "p1").attempt == 1
    assert started(rig.store, "p1").attempt == 1


def test_interrupted_attempt_is_given_back(rig: StoreRig) -> None:
    """A drain costs no attempt: a first one leaves no trace, a later one goes back by one."""
    rig.insert({"_id": "p1"}, {"_id": "p2"})
    rig.store.finish([jobs.Retry(started(rig.store, "p2"), BROKEN, 0)], context())
    both = [started(rig.store, "p1"), started(rig.store, "p2", context(NOW + 1))]
    for _ in range(2):  # written twice, as after a lost reply
        rig.store.finish([jobs.Released(begun) for begun in both], context(NOW + 2))
    assert rig.job("p1") is None
    job = rig.the_job("p2")
    assert (job.state, job.attempts, job.owner) == ("queued", 1, None)
    assert started(rig.store, "p2", context(NOW + 3)).attempt == 2


def test_jobs_of_dead_kings_are_released(rig: StoreRig) -> None:
    """Posts of a King that is known to be dead are due at once; the living keep theirs."""
    rig.insert({"_id": "p1"}, {"_id": "p2"})
    started(rig.store, "p1", context(owner="dead"))
    started(rig.store, "p2", context(owner="alive"))
    assert rig.store.release_dead(context(NOW + 5, is_dead=lambda owner: owner == "dead")) == 1
    assert [j.post_id for j in rig.store.claim_due(context(NOW + 5), 10)] == ["p1"]
    assert rig.store.open_jobs() == 2


def test_unreadable_message_is_one_dead_letter(rig: StoreRig) -> None:
    """The same body again is the same letter, with its payload and reason."""
    outcome = jobs.Unreadable("\\xff{", Failure("message", "MessageError", "not UTF-8"))
    rig.store.finish([outcome], context())
    rig.store.finish([outcome], context(NOW + 9))
    job = rig.the_job(jobs.message_key("\\xff{"))
    assert (job.state, job.payload, job.names_a_post) == ("dead", "\\xff{", False)
    assert rig.store.open_jobs() == 0


def test_two_kings_that_claim_at_once_share_out(rig: StoreRig) -> None:
    rig.insert({"_id": "p1"})
    rig.set_job(jobs.Job("p1", "queued", attempts=1, due_at=NOW + 900))
    verdicts = [begin_one(rig.store, "p1", context(owner=f"k{i}")) for i in range(3)]
    assert [type(v) for v in verdicts] == [jobs.Started, jobs.HeldElsewhere, jobs.HeldElsewhere]


def test_claims_after_reading_are_seen(mongo: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A King that loses the race after it has read the job learns it from the write."""
    mongo.client.posts.insert_many([{"_id": "new"}, {"_id": "old"}, {"_id": "free"}])
    mongo.client.jobs.insert_one(
        jobs.Job("old", "queued", attempts=1, due_at=NOW + 900).as_document()
    )
    read = mongo.read_jobs
    rival = Store(StoreClient(mongo.client.settings))

    def read_then_lose(post_ids: list[str]) -> dict[str, jobs.Job]:
        before = read(post_ids)
        monkeypatch.setattr(mongo, "read_jobs", read)
        rival.begin([claim("new"), claim("old")], context(owner="rival"))
        return before

    monkeypatch.setattr(mongo, "read_jobs", read_then_lose)
    verdicts = mongo.begin([claim("new"), claim("old"), claim("free")], context())
    rival.close()
    assert [type(v) for v in verdicts] == [jobs.HeldElsewhere, jobs.HeldElsewhere, jobs.Started]
    assert [job.attempts for job in map(mongo.queries.job, ("new", "old")) if job] == [1, 2]
