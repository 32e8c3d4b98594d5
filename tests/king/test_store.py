"""The store's contract, held by the fake and by MongoDB's protocol alike."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import pytest
from bson import ObjectId, decode, encode
from bson.datetime_ms import DatetimeMS

from config.errors import ConfigError, StoreUnavailable
from config.settings import FieldMap, StoreSettings
from extractors.post import Failure, Media
from king.jobs import (
    QUEUED_FOR_S,
    Buried,
    Dead,
    Elsewhere,
    GivenBack,
    Job,
    Retry,
    Settled,
    Started,
    Tagged,
    Unreadable,
    message_key,
)
from king.store import MongoStore
from tests.conftest import MONGO_KINDS
from tests.fakes.store import FakeStore
from tests.king.store_rig import (
    BUNDLE,
    NOW,
    StoreRig,
    begin_one,
    claim,
    mongo_store,
    started,
    tagged,
    terms,
)
from tests.services import MongoServer

BROKEN = Failure("extract", "WorkerDied", "worker extract-0 died", retryable=True)


@pytest.fixture(params=["fake", "real"])
def rig(request: pytest.FixtureRequest, unique_name: str) -> Iterator[StoreRig]:
    """An empty store of each kind."""
    if request.param == "fake":
        yield StoreRig(FakeStore())
        return
    server: MongoServer = request.getfixturevalue("mongo_server")
    store = mongo_store(server.url, unique_name)
    yield StoreRig(store)
    store.close()


@pytest.fixture
def mongo(mongo_url: str, unique_name: str) -> Iterator[MongoStore]:
    """The real store; with MongoDB too where INSIGHTTAG_TEST_MONGO_URL names one."""
    store = mongo_store(mongo_url, unique_name)
    yield store
    store.close()


def test_attempt_is_recorded_before_the_work(rig: StoreRig) -> None:
    """A post that begins has a running job with one attempt, so that a crash counts."""
    rig.insert({"_id": "p1", "text": "雨", "images": ["http://a/1"], "videos": {"url": "http://v"}})
    begun = started(rig.store, "p1", priority=4)
    assert begun.post.text == "雨"
    assert begun.post.media == (Media("image", "http://a/1"), Media("video", "http://v"))
    assert (begun.attempt, begun.document_id, begun.priority) == (1, "p1", 4)
    job = rig.job("p1")
    assert job is not None
    assert (job.state, job.attempts, job.owner) == ("running", 1, "k1")
    assert (job.first_at, job.lease_until, job.priority) == (NOW, NOW + 60, 4)


def test_tagged_post_gets_its_result_and_loses_its_job(rig: StoreRig) -> None:
    """The result sub-document has the contract's keys."""
    rig.insert({"_id": "p1", "text": "x"})
    [recorded] = rig.store.finish([tagged(started(rig.store, "p1"))], terms())
    assert isinstance(recorded, Tagged)
    result = rig.result("p1")
    tagged_at = result.pop("tagged_at")
    assert abs(tagged_at - datetime.now(timezone.utc)) < timedelta(seconds=20)
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
    rig.store.finish([outcome], terms())
    first = rig.result("p1")
    time.sleep(0.01)
    rig.store.finish([outcome], terms(NOW + 5))
    assert rig.result("p1") == first


def test_the_very_document_is_written_whatever_its_id_is(rig: StoreRig) -> None:
    """Text, ObjectId and number: the result lands in the document that the post was read from."""
    oid = ObjectId()
    rig.insert({"_id": "p1"}, {"_id": oid}, {"_id": 42}, {"_id": "bystander"})
    ids = ["p1", str(oid), "42"]
    verdicts = rig.store.begin([claim(i) for i in ids], terms())
    outcomes = [tagged(v, BUNDLE[1], v.post_id) for v in verdicts if isinstance(v, Started)]
    rig.store.finish(outcomes, terms())
    names = {key: r and r["tags"][0]["name"] for key, r in rig.results().items()}
    assert names == {"p1": "p1", oid: str(oid), 42: "42", "bystander": None}


def test_unknown_post_is_a_dead_letter(rig: StoreRig) -> None:
    """An ID that is not in the database is set aside with its reason and payload."""
    verdict = begin_one(rig.store, "nobody")
    assert isinstance(verdict, Buried)
    assert verdict.failure.type == "PostNotFound"
    job = rig.job("nobody")
    assert job is not None
    assert (job.state, job.payload) == ("dead", "nobody")
    assert job.last_error is not None
    assert job.last_error["stage"] == "load"


def test_unknown_post_that_appears_later_is_tagged(rig: StoreRig) -> None:
    """Publishing a dead letter's ID again starts it over; a mere redelivery does not."""
    begin_one(rig.store, "p1")
    rig.insert({"_id": "p1"})
    assert begin_one(rig.store, "p1", redelivered=True) == Settled("p1", "dead")
    assert started(rig.store, "p1").attempt == 1


def test_same_bundle_tags_once_unless_forced(rig: StoreRig) -> None:
    """A message for a post that this bundle has tagged is settled, and forced it runs."""
    rig.insert({"_id": "p1"})
    rig.store.finish([tagged(started(rig.store, "p1"))], terms())
    assert begin_one(rig.store, "p1") == Settled("p1", "tagged")
    newer = terms(bundle=("demo", "20270101T000000Z-bb"))
    assert isinstance(begin_one(rig.store, "p1", newer), Started)
    assert rig.job("p1") is not None
    assert begin_one(rig.store, "p1") == Settled("p1", "tagged")  # the older one has nothing to do
    assert isinstance(begin_one(rig.store, "p1", force=True), Started)


def test_older_bundle_never_overwrites_a_newer_one(rig: StoreRig) -> None:
    """The fence is the bundle's version, for tags and for failures; superseded is success."""
    rig.insert({"_id": "p1"}, {"_id": "p2"}, {"_id": "p3"}, {"_id": "p4"})
    old, new = "20250101T000000Z-00", "20270101T000000Z-ff"
    for post_id, first, second in (("p1", new, old), ("p2", old, new)):
        for version in (first, second):
            run = terms(bundle=("demo", version))
            done = tagged(started(rig.store, post_id, run, force=True), version)
            assert isinstance(rig.store.finish([done], run)[0], Tagged)
        assert rig.result(post_id)["version"] == new
        assert rig.job(post_id) is None
    permanent = Failure("decode", "MediaError", "broken")
    for post_id, version, kept in (("p3", BUNDLE[1], "tagged"), ("p4", old, "failed")):
        done = tagged(started(rig.store, post_id, force=True), version)
        rig.store.finish([done], terms())
        rig.store.finish([Dead(started(rig.store, post_id, force=True), permanent)], terms())
        assert rig.result(post_id)["status"] == kept


def test_retry_waits_then_one_king_publishes_it(rig: StoreRig) -> None:
    """A failed attempt is due at its time, is claimed by one King only, and counts on."""
    rig.insert({"_id": "p1"})
    rig.store.finish([Retry(started(rig.store, "p1", force=True), BROKEN, NOW + 8)], terms())
    job = rig.job("p1")
    assert job is not None
    assert (job.state, job.attempts, job.due_at) == ("waiting", 1, NOW + 8)
    assert job.last_error == BROKEN.as_dict()
    assert begin_one(rig.store, "p1", terms(NOW + 1)) == Settled("p1", "waiting")
    assert rig.store.claim_due(terms(NOW + 7), 10) == []
    [due] = rig.store.claim_due(terms(NOW + 9), 10)
    assert due.message.force
    assert rig.store.claim_due(terms(NOW + 9, owner="k2"), 10) == []
    rig.store.published(["p1"], terms(NOW + 9))
    after = rig.job("p1")
    assert after is not None
    assert (after.state, after.owner, after.due_at) == ("queued", None, NOW + 9 + QUEUED_FOR_S)
    assert started(rig.store, "p1", terms(NOW + 10)).attempt == 2


def test_claimed_but_never_published_is_due_again(rig: StoreRig) -> None:
    """A King that dies between claim and publication loses no retry."""
    rig.insert({"_id": "p1"})
    rig.store.finish([Retry(started(rig.store, "p1"), BROKEN, NOW)], terms())
    assert len(rig.store.claim_due(terms(NOW + 1), 10)) == 1
    assert len(rig.store.claim_due(terms(NOW + 70, owner="k2"), 10)) == 1


def test_attempts_are_used_up(rig: StoreRig) -> None:
    """After the last attempt the post is a dead letter with its last reason and says so."""
    rig.insert({"_id": "p1"})
    for attempt in (1, 2, 3):
        begun = started(rig.store, "p1", terms(NOW + attempt * 10))
        assert begun.attempt == attempt
        rig.store.finish([Retry(begun, BROKEN, NOW + attempt * 10)], terms())
    verdict = begin_one(rig.store, "p1", terms(NOW + 99))
    assert isinstance(verdict, Buried)
    assert verdict.failure.type == "Exhausted"
    assert BROKEN.message in verdict.failure.message
    assert rig.result("p1")["status"] == "failed"
    assert rig.result("p1")["error"]["type"] == "Exhausted"
    job = rig.job("p1")
    assert job is not None
    assert (job.state, job.attempts) == ("dead", 3)


def test_a_crash_counts_as_an_attempt(rig: StoreRig) -> None:
    """A King that dies with a post leaves a running job; whoever takes it over counts on."""
    rig.insert({"_id": "p1"})
    started(rig.store, "p1", terms(owner="dead"))
    waiting = begin_one(rig.store, "p1", terms(NOW + 5))
    assert waiting == Elsewhere("p1", NOW + 60)
    known = terms(NOW + 5, is_dead=lambda owner: owner == "dead")
    assert started(rig.store, "p1", known).attempt == 2  # seen to be dead: no waiting
    late = terms(NOW + 66, owner="k3")
    assert started(rig.store, "p1", late).attempt == 3  # its lease has run out
    verdict = begin_one(rig.store, "p1", terms(NOW + 200, owner="k4"))
    assert isinstance(verdict, Buried)
    assert "died each time" in verdict.failure.message


def test_leases_are_renewed_only_by_their_owner(rig: StoreRig) -> None:
    """A renewed lease keeps others away; a King that lost its job cannot renew it."""
    rig.insert({"_id": "p1"})
    started(rig.store, "p1")
    rig.store.renew(["p1"], terms(NOW + 50, owner="k2"))
    rig.store.renew(["p1"], terms(NOW + 40))
    assert begin_one(rig.store, "p1", terms(NOW + 90, owner="k2")) == Elsewhere("p1", NOW + 100)
    assert rig.store.claim_due(terms(NOW + 159, owner="k2"), 10) == []
    # Its message is lost and its King too: it is published again by itself.
    assert [j.post_id for j in rig.store.claim_due(terms(NOW + 161, owner="k2"), 10)] == ["p1"]


def test_late_outcome_of_a_lost_job_leaves_the_new_owner_alone(rig: StoreRig) -> None:
    """A King that was taken for dead writes its tags, and not over the other's job."""
    rig.insert({"_id": "p1"})
    slow = started(rig.store, "p1")
    started(rig.store, "p1", terms(NOW + 61, owner="k2"))
    rig.store.finish([tagged(slow)], terms(NOW + 62))
    assert rig.result("p1")["status"] == "tagged"
    job = rig.job("p1")
    assert job is not None
    assert (job.state, job.owner) == ("running", "k2")


def test_own_claim_whose_reply_was_lost_is_resumed(rig: StoreRig) -> None:
    """Claiming again after a lost reply does not count a second attempt."""
    rig.insert({"_id": "p1"})
    assert started(rig.store, "p1").attempt == 1
    assert started(rig.store, "p1").attempt == 1


def test_interrupted_attempt_is_given_back(rig: StoreRig) -> None:
    """A drain costs no attempt: a first one leaves no trace, a later one goes back by one."""
    rig.insert({"_id": "p1"}, {"_id": "p2"})
    rig.store.finish([Retry(started(rig.store, "p2"), BROKEN, NOW)], terms())
    both = [started(rig.store, "p1"), started(rig.store, "p2", terms(NOW + 1))]
    for _ in range(2):  # written twice, as after a lost reply
        rig.store.finish([GivenBack(begun) for begun in both], terms(NOW + 2))
    assert rig.job("p1") is None
    job = rig.job("p2")
    assert job is not None
    assert (job.state, job.attempts, job.owner) == ("queued", 1, None)
    assert started(rig.store, "p2", terms(NOW + 3)).attempt == 2


def test_jobs_of_dead_kings_are_released(rig: StoreRig) -> None:
    """What a King that is known to be dead was doing is due at once; the living keep theirs."""
    rig.insert({"_id": "p1"}, {"_id": "p2"})
    started(rig.store, "p1", terms(owner="dead"))
    started(rig.store, "p2", terms(owner="alive"))
    assert rig.store.release_dead(terms(NOW + 5, is_dead=lambda owner: owner == "dead")) == 1
    assert [j.post_id for j in rig.store.claim_due(terms(NOW + 5), 10)] == ["p1"]
    assert rig.store.open_jobs() == 2


def test_unreadable_message_is_one_dead_letter(rig: StoreRig) -> None:
    """The same body again is the same letter, with its payload and reason."""
    outcome = Unreadable("\\xff{", Failure("message", "MessageError", "not UTF-8"))
    rig.store.finish([outcome], terms())
    rig.store.finish([outcome], terms(NOW + 9))
    job = rig.job(message_key("\\xff{"))
    assert job is not None
    assert (job.state, job.payload, job.names_a_post) == ("dead", "\\xff{", False)
    assert rig.store.open_jobs() == 0


def test_two_kings_that_claim_at_once_share_out(rig: StoreRig) -> None:
    """Of several claims for one post exactly one begins, whatever state its job is in."""
    rig.insert({"_id": "p1"})
    rig.set_job(Job("p1", "queued", attempts=1, due_at=NOW + 900))
    verdicts = [begin_one(rig.store, "p1", terms(owner=f"k{i}")) for i in range(3)]
    assert [type(v) for v in verdicts] == [Started, Elsewhere, Elsewhere]


def test_claims_between_reading_and_writing_are_seen(
    mongo: MongoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A King that loses the race after it has read the job learns it from the write."""
    mongo.posts.insert_many([{"_id": "new"}, {"_id": "old"}, {"_id": "free"}])
    mongo.jobs.insert_one(Job("old", "queued", attempts=1, due_at=NOW + 900).as_document())
    read = mongo._jobs
    rival = MongoStore(mongo.settings)

    def read_then_lose(post_ids: list[str]) -> dict[str, Job]:
        found = read(post_ids)
        monkeypatch.setattr(mongo, "_jobs", read)
        rival.begin([claim("new"), claim("old")], terms(owner="rival"))
        return found

    monkeypatch.setattr(mongo, "_jobs", read_then_lose)
    verdicts = mongo.begin([claim("new"), claim("old"), claim("free")], terms())
    rival.close()
    assert [type(v) for v in verdicts] == [Elsewhere, Elsewhere, Started]
    assert [job.attempts for job in map(mongo.job, ("new", "old")) if job] == [1, 2]


def test_platform_paths_and_result_path_are_settings(mongo_url: str, unique_name: str) -> None:
    """Posts in a shape of their own are read, and written to the place that is asked for."""
    fields = FieldMap(id="pid", text="body.text", images="media.pics", videos="files.url")
    store = mongo_store(mongo_url, unique_name, fields=fields, result_path="meta.insight")
    store.posts.insert_one(
        {
            "pid": 7,
            "body": {"text": "hello"},
            "media": {"pics": ["http://a/1"]},
            "files": [{"url": "http://v/1"}],
        }
    )
    begun = started(store, "7")
    assert begun.post.text == "hello"
    assert [m.source for m in begun.post.media] == ["http://a/1", "http://v/1"]
    store.finish([tagged(begun)], terms())
    assert begin_one(store, "7") == Settled("7", "tagged")
    stored = store.post("7")
    assert stored is not None
    assert stored.result is not None
    assert stored.result["status"] == "tagged"
    assert list(store.untagged_ids()) == []
    store.close()


def test_one_result_that_cannot_be_written_does_not_hold_up_the_others(mongo: MongoStore) -> None:
    """A result that no document can hold kills its own post only."""
    mongo.posts.insert_many([{"_id": f"p{i}"} for i in range(3)])
    begun = [started(mongo, f"p{i}") for i in range(3)]
    outcomes = [tagged(begun[0]), tagged(begun[1], BUNDLE[1], "half \ud800"), tagged(begun[2])]
    recorded = mongo.finish(outcomes, terms())
    assert [type(outcome) for outcome in recorded] == [Tagged, Dead, Tagged]
    assert mongo.counts()["tagged"] == 2
    job = mongo.job("p1")
    assert job is not None
    assert job.state == "dead"
    assert job.last_error is not None
    assert job.last_error["stage"] == "store"


def test_commands_see_posts_letters_and_counts(mongo: MongoStore) -> None:
    """What `publish --untagged`, `status`, `show` and `dead` ask for."""
    mongo.posts.insert_many([{"_id": f"p{i}", "text": "t"} for i in range(4)] + [{"_id": 5}])
    mongo.finish([tagged(started(mongo, "p0"))], terms())
    failure = Failure("decode", "MediaError", "no picture")
    mongo.finish([Dead(started(mongo, "p1"), failure)], terms(NOW + 1))
    begin_one(mongo, "nobody")
    mongo.finish([Unreadable("{", Failure("message", "MessageError", "no JSON"))], terms(NOW + 2))
    started(mongo, "p2")

    assert sorted(mongo.untagged_ids()) == ["5", "p3"]
    assert len(list(mongo.untagged_ids(limit=1))) == 1
    assert sorted(mongo.untagged_ids(bundle=("demo", "9"))) == ["5", "p0", "p3"]
    assert mongo.counts() == {
        "posts": 5,
        "tagged": 1,
        "failed": 1,
        "untagged": 3,
        "jobs": {"running": 1, "waiting": 0, "queued": 0, "dead": 3},
    }
    stored = mongo.post("p1")
    assert stored is not None
    assert stored.result is not None
    assert stored.result["error"] == failure.as_dict()
    assert mongo.post("nobody") is None
    letters = [job.post_id for job in mongo.dead_letters()]
    assert letters == [message_key("{"), "p1", "nobody"]
    assert [j.post_id for j in mongo.dead_letters(stage="decode")] == ["p1"]
    assert [j.post_id for j in mongo.dead_letters(type="PostNotFound")] == ["nobody"]
    assert len(mongo.dead_letters(since=NOW + 0.5)) == 2
    since = datetime.fromtimestamp(NOW + 1.5, timezone.utc)
    assert len(mongo.dead_letters(since=since)) == 1
    assert len(mongo.dead_letters(limit=2)) == 2

    messages = mongo.replay([message_key("{"), "p1", "p2", "absent"])
    assert [m.post_id for m in messages] == ["p1"]
    assert started(mongo, "p1", redelivered=True).attempt == 1
    assert mongo.drop([message_key("{"), "nobody", "p2"]) == 2
    assert mongo.dead_letters() == []


def test_unreachable_database_is_named_without_its_password() -> None:
    """The error names the URL, hides the password, and comes within the time-out."""
    url = "mongodb://reader:secret@127.0.0.1:9/"
    store = MongoStore(StoreSettings(url=url, timeout_s=0.3))
    for call in (store.connect, store.open_jobs, lambda: begin_one(store, "p1")):
        with pytest.raises(StoreUnavailable) as caught:
            call()
        assert "reader:***@127.0.0.1:9" in str(caught.value)
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)
    store.close()


def test_malformed_url_is_a_configuration_error() -> None:
    """A URL that pymongo cannot read is the user's mistake: one line, no password."""
    store = MongoStore(StoreSettings(url="mongodb://u:secret@h:notaport/"))
    with pytest.raises(ConfigError, match=r"store\.url") as caught:
        store.connect()
    assert "secret" not in str(caught.value)


def test_documents_that_python_has_no_names_for_are_read() -> None:
    """Dates after the year 9999 and text that is no UTF-8 come from other drivers."""
    store = MongoStore(StoreSettings(url="mongodb://127.0.0.1:1"))
    encoded = encode({"seen": DatetimeMS(10**15), "text": "ab"}).replace(b"ab\0", b"\xff\xfe\0")
    try:
        document = decode(encoded, store.posts.codec_options)
    finally:
        store.close()
    assert document == {"seen": DatetimeMS(10**15), "text": "\ufffd\ufffd"}


def test_restarted_database_is_used_again(mongo_server: MongoServer, unique_name: str) -> None:
    """After a kill and a restart the same store object works on, with what it had written."""
    store = mongo_store(mongo_server.url, unique_name)
    store.posts.insert_one({"_id": "p1"})
    begun = started(store, "p1")
    mongo_server.kill()
    with pytest.raises(StoreUnavailable):
        store.finish([tagged(begun)], terms())
    mongo_server.start()
    store.finish([tagged(begun)], terms())
    assert store.counts()["tagged"] == 1
    store.close()


def test_kinds_of_database() -> None:
    """The protocol server always takes part; MongoDB itself where it is named."""
    assert MONGO_KINDS[0] == "nx"
