"""Post documents as the platform keeps them ─► `Post`, and results ─► the sub-document; pure.

The platform's documents are not ours: whatever is missing or of another type is read as absent,
and never an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

from bson import ObjectId

from common.post import Failure, Media, MediaKind, Post, clean
from common.result import TagResult
from config.settings import FieldMap
from king.jobs import Bundle, Tagged

_INT64_DIGITS = 18


def dig(document: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, or None; a list on the way is looked into item by item."""
    node: Any = document
    for key in path.split("."):
        if isinstance(node, list):
            node = [item[key] for item in node if isinstance(item, Mapping) and key in item]
        elif isinstance(node, Mapping):
            node = node.get(key)
        else:
            return None
    return node


def id_candidates(post_id: str) -> list[Any]:
    """What an ID on the queue, which is always text, may be in the database; likeliest first."""
    found: list[Any] = [post_id]
    if len(post_id) == 24 and ObjectId.is_valid(post_id):
        found.append(ObjectId(post_id))
    if post_id.isascii() and post_id.isdigit() and len(post_id) <= _INT64_DIGITS:
        found.append(int(post_id))
    return found


def match_ids(
    documents: Iterable[Mapping[str, Any]], post_ids: Iterable[str], path: str
) -> dict[str, Mapping[str, Any]]:
    """Which document belongs to which ID; where several do, the likeliest type of ID wins."""
    by_value: dict[tuple[type, Any], Mapping[str, Any]] = {}
    for document in documents:
        value = dig(document, path)
        if isinstance(value, (str, int, ObjectId)) and not isinstance(value, bool):
            by_value.setdefault((type(value), value), document)
    found: dict[str, Mapping[str, Any]] = {}
    for post_id in post_ids:
        for candidate in id_candidates(post_id):
            document_of = by_value.get((type(candidate), candidate))
            if document_of is not None:
                found[post_id] = document_of
                break
    return found


def projection(fields: FieldMap, result_path: str) -> dict[str, int]:
    """The top-level fields that a post is read from.

    Whole ones: MongoDB refuses a projection that names both a path and a part of it, and the
    embedded database loses paths that lead through a list.
    """
    paths = ("_id", fields.id, fields.text, fields.images, fields.videos, fields.audios)
    return {path.split(".")[0]: 1 for path in (*paths, result_path)}


def read_post(post_id: str, document: Mapping[str, Any], fields: FieldMap) -> Post:
    """A post from its document."""
    text = dig(document, fields.text)
    paths: tuple[tuple[MediaKind, str], ...] = (
        ("image", fields.images),
        ("video", fields.videos),
        ("audio", fields.audios),
    )
    media = [Media(kind, source) for kind, path in paths for source in sources(dig(document, path))]
    return Post(
        post_id=post_id,
        text=clean(text) if isinstance(text, str) else "",
        media=tuple(media),
        labels=tuple(sources(dig(document, fields.labels))),
    )


def sources(value: Any) -> list[str]:
    """The texts in a value: a text, ``{url: text}``, or a list of these; all else is left out."""
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    if isinstance(value, Mapping):
        return sources(value.get("url")) if isinstance(value.get("url"), str) else []
    if isinstance(value, list):
        return [text for item in value if not isinstance(item, list) for text in sources(item)]
    return []


def tagged_by(document: Mapping[str, Any], result_path: str, bundle: Bundle) -> bool:
    """Whether the document carries this very bundle's tags."""
    found = [dig(document, f"{result_path}.{key}") for key in ("status", "model", "version")]
    return found == ["tagged", *bundle]


def tagged_result(outcome: Tagged) -> dict[str, Any]:
    """Return the result sub-document of a tagged post."""
    return TagResult.tagged(
        outcome.tags,
        outcome.statuses,
        outcome.failures,
        attempts=outcome.started.attempt,
        tagged_at=datetime.fromtimestamp(outcome.ended_at, timezone.utc),
        timings_ms=outcome.timings_ms,
    ).document()


def failed_result(
    post_id: str, failure: Failure, attempts: int, bundle: Bundle, timings_ms: Mapping[str, int]
) -> dict[str, Any]:
    """Return the result sub-document of a post that failed for good."""
    return TagResult.failed(
        post_id,
        bundle,
        failure,
        attempts=attempts,
        tagged_at=datetime.now(timezone.utc),
        timings_ms=timings_ms,
    ).document()
