"""A document of the platform -> a post of the file, or why it is none; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from bson import ObjectId, json_util

from common.post import clean
from common.times import moment_of
from config.settings import FieldMap, StoreSettings
from corpus.records import CorpusPost
from king.messages import MAX_ID_BYTES
from king.store.documents import dig, read_post, sources


class NoPost(Exception):
    """A document that is no post; says why."""


def convert(document: Mapping[str, Any], fields: FieldMap) -> CorpusPost:
    """A post out of a document.

    Raises:
        NoPost: It has no usable ID, or nothing to tag.
    """
    post_id = _post_id(dig(document, fields.id), fields.id)
    post = read_post(post_id, document, fields)
    if not post.text.strip() and not post.media:
        raise NoPost("neither text nor media")
    labels = tuple(dict.fromkeys(map(clean, _labels(dig(document, fields.labels)))))
    media = tuple(replace(one, source=clean(one.source)) for one in post.media)
    author = dig(document, fields.author) if fields.author else None
    return CorpusPost(
        replace(post, labels=labels, media=media),
        author=_name(author),
        created=iso(created_at(document, fields)),
    )


def created_at(document: Mapping[str, Any], fields: FieldMap) -> float | None:
    """When a post was made, Unix seconds: by ``store.fields.created``, or by its ObjectId."""
    value = dig(document, fields.created or "_id")
    if fields.created is None and not isinstance(value, ObjectId):
        return None  # a number that counts posts is no time
    try:
        return moment_of(value)
    except (OverflowError, ValueError, OSError):
        return None


def iso(seconds: float | None) -> str | None:
    """Unix seconds as ISO 8601 in UTC; None for what no calendar holds."""
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).isoformat()
    except (OverflowError, ValueError, OSError):
        return None


def projection(store: StoreSettings) -> dict[str, int]:
    """Return the top-level fields to read, see `king.store.embedded_quirks`."""
    fields = store.fields
    paths = ("_id", fields.id, fields.text, fields.images, fields.videos, fields.audios)
    more = (fields.labels, fields.author, fields.created)
    return {path.split(".")[0]: 1 for path in (*paths, *more) if path}


def shown_id(document: Mapping[str, Any]) -> str:
    """The ``_id`` for a person."""
    value = document.get("_id")
    return str(value) if isinstance(value, (str, int, ObjectId)) else json_util.dumps(value)


def _post_id(value: Any, path: str) -> str:
    if value is None:
        raise NoPost(f"no {path}")
    if isinstance(value, bool) or not isinstance(value, (str, int, ObjectId)):
        raise NoPost(f"{path} is a {type(value).__name__}")
    text = str(value)
    if not text.strip():
        raise NoPost(f"{path} is empty")
    if clean(text) != text or "\0" in text:
        raise NoPost(f"{path} is no text")
    if len(text.encode()) > MAX_ID_BYTES:
        raise NoPost(f"{path} is longer than {MAX_ID_BYTES} bytes")
    return text


def _labels(value: Any) -> list[str]:
    """As `sources`, and ``{name: text}`` too: many platforms keep tags as objects."""
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return sources(value["name"])
    if isinstance(value, list):
        return [name for item in value if not isinstance(item, list) for name in _labels(item)]
    return sources(value)


def _name(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, ObjectId)):
        return None
    return clean(str(value)) or None
