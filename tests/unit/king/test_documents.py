"""Post documents are the platform's: whatever stands in them is read without an error."""

from __future__ import annotations

from typing import Any

import pytest
from bson import ObjectId

from common.post import Media
from config.settings import FieldMap
from king.store.documents import (
    dig,
    id_candidates,
    match_ids,
    projection,
    read_post,
    sources,
    tagged_by,
)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("http://a/1", ["http://a/1"]),
        ("  http://a/1 ", ["http://a/1"]),
        ("", []),
        (None, []),
        (7, []),
        (["http://a/1", "", None, 3, {"url": "http://a/2"}, {"href": "x"}, ["y"]],
         ["http://a/1", "http://a/2"]),
        ({"url": "http://a/1"}, ["http://a/1"]),
        ({"url": ["http://a/1"]}, []),
        ({}, []),
    ],
)  # fmt: skip
def test_media_come_in_many_shapes(value: Any, found: list[str]) -> None:
    """A text, an object with a URL, or a list of either; all else is no media."""
    assert sources(value) == found


@pytest.mark.parametrize("text", [None, 5, ["a"], {"a": 1}, b"x"])
def test_text_of_another_type_is_no_text(text: Any) -> None:
    post = read_post("p", {"_id": "p", "text": text, "images": "http://a/1"}, FieldMap())
    assert post.text == ""
    assert post.media == (Media("image", "http://a/1"),)


def test_dotted_paths_reach_into_lists() -> None:
    """Nested documents and lists of documents are read, and a path that leads nowhere is None."""
    fields = FieldMap(text="body.text", images="media.pics", videos="files.url")
    document = {
        "body": {"text": "雨"},
        "media": {"pics": ["http://a/1"]},
        "files": [{"url": "http://v/1"}, {"x": 1}, 3, {"url": "http://v/2"}],
    }
    post = read_post("p", document, fields)
    assert post.text == "雨"
    assert [media.source for media in post.media] == ["http://a/1", "http://v/1", "http://v/2"]
    assert dig({"a": "text"}, "a.b.c") is None
    assert dig({}, "a.b") is None


def test_ids_are_tried_as_text_then_object_id_then_number() -> None:
    """An ID on the queue is text; in the database it may be of three types, text first."""
    oid = ObjectId()
    assert id_candidates("p1") == ["p1"]
    assert id_candidates(str(oid)) == [str(oid), oid]
    assert id_candidates("42") == ["42", 42]
    assert id_candidates("٤٢") == ["٤٢"]  # digits, but none that a driver would have written
    both: list[dict[str, Any]] = [
        {"_id": 42, "n": "number"},
        {"_id": "42", "n": "text"},
        {"_id": oid},
        {"_id": True},
    ]
    found = match_ids(both, ["42", str(oid), "1"], "_id")
    assert found["42"]["n"] == "text"
    assert found[str(oid)]["_id"] == oid
    assert "1" not in found
    assert match_ids(both[:1], ["42"], "_id")["42"]["n"] == "number"


def test_projection_names_whole_fields() -> None:
    """No path and a part of it (MongoDB refuses it), none through a list (nx-27017 loses it)."""
    fields = FieldMap(id="pid", text="post.text", images="post", videos="post.v")
    assert projection(fields, "meta.insight") == {
        "_id": 1,
        "pid": 1,
        "post": 1,
        "audios": 1,
        "meta": 1,
    }


def test_only_this_very_bundle_counts_as_tagged() -> None:
    """Another version, another model, a failure, or junk do not."""
    bundle = ("demo", "2")
    assert tagged_by(
        {"insight": {"status": "tagged", "model": "demo", "version": "2"}}, "insight", bundle
    )
    for other in (
        {"status": "failed", "model": "demo", "version": "2"},
        {"status": "tagged", "model": "demo", "version": "1"},
        {"status": "tagged", "model": "other", "version": "2"},
        "junk",
        None,
    ):
        assert not tagged_by({"insight": other}, "insight", bundle)
