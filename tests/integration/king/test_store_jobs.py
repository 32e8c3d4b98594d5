"""Retries, leases, claims, and jobs of dead Kings."""

import time

import pytest

from common.post import Failure
from king.jobs import (
    QUEUED_FOR_S,
    HeldElsewhere,
    Job,
    Rejected,
    Released,
    Retry,
    Settled,
    Started,
    Unreadable,
    message_key,
)
from king.store.client import StoreClient
from king.store.store import Store
from tests.support.king.store_rig import (
    BROKEN,
    NOW,
    StoreRig,
    begin_one,
    claim,
    context,
    started,
    tagged,
)


def test_retry_waits_then_one_king_publishes_it(rig: StoreRig) -> None:
    """A failed attempt is due at its time, is claimed by one King only, and counts on."""
    rig.insert({"_id": "p1"})
    rig.store.finish([Retry(started(rig.store, "p1", force=True), BROKEN, 8)], context())
    job = rig.the_job("p1")
    assert (job.state, job.attempts, job.due_at) == ("waiting", 1, NOW + 8)
    assert job.last_error == BROKEN.as_dict()
    assert begin_one(rig.store, "p1", context(NOW + 1)) == Settled("p1", "waiting")
    assert rig.store.claim_due(context(NOW + 7), 10) == []
    [due] = rig.store.claim_due(context(NOW + 9), 10)
    assert due.message.force
    assert rig.store.claim_due(context(NOW + 9, owner="k2"), 10) == []
    rig.store.published(["p1"], context(NOW + 9))
    after = rig.the_job("p1")
    assert (after.state, after.owner, after.due_at) == ("queued", None, NOW + 9 + QUEUED_FOR_S)
    assert started(rig.store, "p1", context(NOW + 10)).attempt == 2


@pytest.mark.parametrize("step_s", [-7200.0, 7200.0])
def test_a_clock_that_is_set_delays_no_retry(rig: StoreRig, step_s: float) -> None:
    """A retry that was due in 8 s is not due in two hours, by the queue or by the reconciler."""
    rig.insert({"_id": "p1"}, {"_id": "p2"})
    for post_id in ("p1", "p2"):
        rig.store.finish([Retry(started(rig.store, post_id), BROKEN, 8)], context())
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
    assert isinstance(begin_one(other, "p1", context(other.now, owner="k2")), HeldElsewhere)
    other.close()


def test_claimed_but_never_published_is_due_again(rig: StoreRig) -> None:
    rig.insert({"_id": "p1"})
    rig.store.finish([Retry(started(rig.store, "p1"), BROKEN, 0)], context())
    assert len(rig.store.claim_due(context(NOW + 1), 10)) == 1
    assert len(rig.store.claim_due(context(NOW + 70, owner="k2"), 10)) == 1


def test_attempts_are_used_up(rig: StoreRig) -> None:
    """After the last attempt the post is a dead letter with its last reason and says so."""
    rig.insert({"_id": "p1"})
    for attempt in (1, 2, 3):
        begun = started(rig.store, "p1", context(NOW + attempt * 10))
        assert begun.attempt == attempt
        rig.store.finish([Retry(begun, BROKEN, 0)], context(NOW + attempt * 10))
    verdict = begin_one(rig.store, "p1", context(NOW + 99))
    assert isinstance(verdict, Rejected)
    assert verdict.failure.type == "Exhausted"
    assert BROKEN.message in verdict.failure.message
    assert rig.result("p1")["status"] == "failed"
    assert rig.result("p1")["error"]["type"] == "Exhausted"
    job = rig.the_job("p1")
    assert (job.state, job.attempts) == ("dead", 3)


def test_a_crash_counts_as_an_attempt(rig: StoreRig) -> None:
    """A King that dies with a post leaves a running job; whoever takes it over counts on."""
    rig.insert({"_id": "p1"})
    started(rig.store, "p1", context(owner="dead"))
    waiting = begin_one(rig.store, "p1", context(NOW + 5))
    assert waiting == HeldElsewhere("p1", NOW + 60)
    known = context(NOW + 5, is_dead=lambda owner: owner == "dead")
    assert started(rig.store, "p1", known).attempt == 2  # seen to be dead: no waiting
    late = context(NOW + 66, owner="k3")
    assert started(rig.store, "p1", late).attempt == 3  # its lease has run out
    verdict = begin_one(rig.store, "p1", context(NOW + 200, owner="k4"))
    assert isinstance(verdict, Rejected)
    assert "died each time" in verdict.failure.message


def test_leases_are_renewed_only_by_their_owner(rig: StoreRig) -> None:
    rig.insert({"_id": "p1"})
    started(rig.store, "p1")
    rig.store.renew(["p1"], context(NOW + 50, owner="k2"))
    rig.store.renew(["p1"], context(NOW + 40))
    assert begin_one(rig.store, "p1", context(NOW + 90, owner="k2")) == HeldElsewhere(
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
    rig.store.finish([Retry(started(rig.store, "p2"), BROKEN, 0)], context())
    both = [started(rig.store, "p1"), started(rig.store, "p2", context(NOW + 1))]
    for _ in range(2):  # written twice, as after a lost reply
        rig.store.finish([Released(begun) for begun in both], context(NOW + 2))
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
    outcome = Unreadable("\\xff{", Failure("message", "MessageError", "not UTF-8"))
    rig.store.finish([outcome], context())
    rig.store.finish([outcome], context(NOW + 9))
    job = rig.the_job(message_key("\\xff{"))
    assert (job.state, job.payload, job.names_a_post) == ("dead", "\\xff{", False)
    assert rig.store.open_jobs() == 0


def test_two_kings_that_claim_at_once_share_out(rig: StoreRig) -> None:
    """Of several claims for one post exactly one begins, whatever state its job is in."""
    rig.insert({"_id": "p1"})
    rig.set_job(Job("p1", "queued", attempts=1, due_at=NOW + 900))
    verdicts = [begin_one(rig.store, "p1", context(owner=f"k{i}")) for i in range(3)]
    assert [type(v) for v in verdicts] == [Started, HeldElsewhere, HeldElsewhere]


def test_claims_between_reading_and_writing_are_seen(
    mongo: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A King that loses the race after it has read the job learns it from the write."""
    mongo.client.posts.insert_many([{"_id": "new"}, {"_id": "old"}, {"_id": "free"}])
    mongo.client.jobs.insert_one(Job("old", "queued", attempts=1, due_at=NOW + 900).as_document())
    read = mongo.read_jobs
    rival = Store(StoreClient(mongo.client.settings))

    def read_then_lose(post_ids: list[str]) -> dict[str, Job]:
        found = read(post_ids)
        monkeypatch.setattr(mongo, "read_jobs", read)
        rival.begin([claim("new"), claim("old")], context(owner="rival"))
        return found

    monkeypatch.setattr(mongo, "read_jobs", read_then_lose)
    verdicts = mongo.begin([claim("new"), claim("old"), claim("free")], context())
    rival.close()
    assert [type(v) for v in verdicts] == [HeldElsewhere, HeldElsewhere, Started]
    assert [job.attempts for job in map(mongo.queries.job, ("new", "old")) if job] == [1, 2]
