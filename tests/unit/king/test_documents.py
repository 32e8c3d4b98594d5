"""Post documents are the platform's: whatever stands in them is read without an error."""

from typing import Any

import pytest
import structlog

from common.post import Media
from config.settings import FieldMap
from king.store.documents import dig, projection, read_fields, read_post, tagged_by

URL = "http://h/a.jpg"


@pytest.mark.parametrize(
    ("document", "paths", "sources"),
    [
        ({"images": URL}, {}, [URL]),
        ({"images": f"  {URL} "}, {}, [URL]),
        ({"images": ""}, {}, []),
        ({"images": None}, {}, []),
        ({"images": {}}, {}, []),
        ({"images": {"url": URL}}, {}, [URL]),
        ({"images": {"url": [URL]}}, {}, [URL]),
        ({"images": [URL, "", None, {"url": "b"}]}, {}, [URL, "b"]),
        ({"images": [[URL], [["b"]]]}, {}, [URL, "b"]),
        ({"media": {"pics": [URL]}}, {"images": "media.pics"}, [URL]),
        ({"blocks": [{"images": [URL]}, {"x": 1}]}, {"images": "blocks.images"}, [URL]),
        ({"blocks": [{"images": [{"url": URL}]}]}, {"images": "blocks.images.url"}, [URL]),
        ({"blocks": [[{"images": {"url": URL}}]]}, {"images": "blocks.images"}, [URL]),
        ({"images": [{"url": URL}, {"url": "b"}]}, {"images": "images.0.url"}, [URL]),
        ({"images": [{"url": URL}, {"url": "b"}]}, {"images": "images.1"}, ["b"]),
        ({"images": [{"url": URL}]}, {"images": "images.7.url"}, []),
        ({"pages": [{"0": URL}]}, {"images": "pages.0.0"}, [URL]),
    ],
)
def test_media_come_in_many_shapes(
    document: dict[str, Any], paths: dict[str, str], sources: list[str]
) -> None:
    """Texts, objects with a URL, lists of either however deep, at paths through lists."""
    post, unread = read_fields("p", document, FieldMap(**paths))
    assert [media.source for media in post.media] == sources
    assert unread == []


@pytest.mark.parametrize(
    ("document", "paths", "text"),
    [
        ({"text": " a "}, {}, " a "),
        ({"text": ["a", ["b"], None, " "]}, {}, "a\nb"),
        ({"blocks": [{"text": "a"}, {"text": "b"}]}, {"text": "blocks.text"}, "a\nb"),
        ({"body": {"text": "a"}}, {"text": "body.text"}, "a"),
        ({"text": {"zh": "a", "en": "b"}}, {"text": "text.zh"}, "a"),
    ],
)
def test_texts_of_many_shapes(document: dict[str, Any], paths: dict[str, str], text: str) -> None:
    post, unread = read_fields("p", document, FieldMap(**paths))
    assert (post.text, unread) == (text, [])


@pytest.mark.parametrize(
    ("document", "paths", "unread"),
    [
        ({"text": 5}, {}, ("text", "text", "int")),
        ({"text": {"zh": "a"}}, {}, ("text", "text", "object with zh")),
        ({"text": b"x"}, {}, ("text", "text", "bytes")),
        ({"images": [{"src": "a", "id": 1}]}, {}, ("images", "images", "object with id, src")),
        ({"images": [7]}, {}, ("images", "images", "int")),
        ({"images": {"url": True}}, {}, ("images", "images", "bool")),
        ({"body": "a"}, {"text": "body.text"}, ("text", "body.text", "str before .text")),
        ({"labels": [{"id": 1}]}, {}, ("labels", "labels", "object with id")),
    ],
)
def test_shape_that_cannot_be_read_is_named_once(
    document: dict[str, Any], paths: dict[str, str], unread: tuple[str, str, str]
) -> None:
    fields = FieldMap(**{**paths, "videos": "clips"})
    document = {**document, "clips": "v"}
    post, problems = read_fields("p", document, fields)
    assert problems == [unread]
    assert post.media == (Media("video", "v"),)
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            read_post("p", document, fields)
    assert len([line for line in logs if line["event"] == "store.field_unread"]) <= 1


def test_path_that_leads_nowhere_is_none() -> None:
    assert dig({"a": "text"}, "a.b.c") is None
    assert dig({}, "a.b") is None


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
