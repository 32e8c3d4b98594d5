"""The one document of a result: the same keys and scores wherever it goes."""

import json
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np

from common.post import Failure, Features, NearMiss, Tag, TagResult, Tags
from fusion.infer.outputs import JsonLines, Result

TAGS = Tags("p1", "demo", "2", (Tag(3, "猫", 0.1234567890),), np.array([0.1234567], np.float32))
BROKEN = Failure("decode", "MediaError", "half a \ud800 character")
FEATURES = Features("p1", {}, statuses={"text": "ok"}, failures={"image": BROKEN})


def test_the_documents_of_tagged_and_failed_posts_have_the_same_keys() -> None:
    """In the order of the contract; a file gets no times, which would make runs differ."""
    at = datetime(2026, 1, 2, tzinfo=timezone.utc)
    tagged, failed = (
        result.measured({"total": 9}, attempts=2, ended_at=at.timestamp()).document()
        for result in (
            TagResult.tagged(TAGS, FEATURES),
            TagResult.failed("p1", ("demo", "2"), BROKEN),
        )
    )
    assert list(tagged) == list(failed)
    assert tagged == {
        "model": "demo",
        "version": "2",
        "status": "tagged",
        "tags": [{"id": 3, "name": "猫", "score": 0.123457}],
        "modalities": {"text": "ok"},
        "failures": {
            "image": {"stage": "decode", "type": "MediaError", "message": "half a ? character"}
        },
        "error": None,
        "attempts": 2,
        "tagged_at": at,
        "timings_ms": {"total": 9},
    }
    assert failed["status"] == "failed"
    assert failed["error"] == tagged["failures"]["image"]
    assert "tagged_at" not in TagResult.tagged(TAGS, FEATURES).document()


def test_rules_and_near_misses_have_keys_only_where_there_are_any() -> None:
    near = (NearMiss("t-9", "狗", 0.40000000001, 0.5),)
    document = TagResult.tagged(
        replace(TAGS, rules="12345678", near_misses=near), FEATURES
    ).document()
    plain = TagResult.tagged(TAGS, FEATURES).document()
    assert document == {
        **plain,
        "rules": "12345678",
        "near_misses": [{"id": "t-9", "name": "狗", "score": 0.4, "threshold": 0.5}],
    }


def test_the_result_of_a_bundle_on_trial_goes_along_and_into_no_document_but_its_own() -> None:
    trial = replace(TAGS, model="trial", version="3", tags=())
    alone = TagResult.tagged(TAGS, FEATURES).measured({"total": 9}, attempts=2, ended_at=5.0)
    both = TagResult.tagged(replace(TAGS, shadow=trial), FEATURES)
    both = both.measured({"total": 9}, attempts=2, ended_at=5.0)
    assert both.document() == alone.document()
    assert both.shadow is not None
    changed = {"model": "trial", "version": "3", "tags": []}
    assert both.shadow.document() == {**alone.document(), **changed}


def test_tags_that_lack_what_may_come_are_partial() -> None:
    """A file that is broken for good is the post's; a key of its own says the rest, and no more."""
    down = Failure("fetch", "FetchRetryable", "HTTP 503", retryable=True)
    partial = TagResult.tagged(
        TAGS, replace(FEATURES, failures={"image": down, "video": BROKEN})
    ).document()
    whole = TagResult.tagged(TAGS, FEATURES).document()
    assert partial["partial"] is True
    assert set(partial) == {*whole, "partial"}


def test_a_line_of_json_is_the_answer_and_all_scores() -> None:
    """The tags are rounded as everywhere; the scores of all classes keep every digit."""
    tagged = TagResult.tagged(TAGS, FEATURES)
    result = Result(tagged, TAGS.scores, labels=("猫",))
    line = json.loads(JsonLines().text(result))
    assert next(iter(line)) == "post_id"
    assert line == {**tagged.answer(), "labels": ["猫"], "scores": [float(np.float32(0.1234567))]}
