"""Post documents of the platform -> `Post`; pure.

The platform's documents are not ours: what is missing or of another type is read as absent, and
never raises an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bson import ObjectId

from common.post import Media, MediaKind, Post, clean
from config.settings import FieldMap
from king.jobs import Bundle

_INT64_DIGITS = 18  # every number of 18 digits fits into the int64 of BSON; of 19 digits, some


def dig(document: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path, or None; on the way, lists are searched item by item."""
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
    """Return the values that an ID on the queue (always text) may have in the database.

    The likeliest comes first: text, then an ObjectId, then a number.
    """
    candidates: list[Any] = [post_id]
    if len(post_id) == 24 and ObjectId.is_valid(post_id):
        candidates.append(ObjectId(post_id))
    if post_id.isascii() and post_id.isdigit() and len(post_id) <= _INT64_DIGITS:
        candidates.append(int(post_id))
    return candidates


def is_id(value: object) -> bool:
    """Return True for a value of the types that `id_candidates` gives."""
    return isinstance(value, (str, int, ObjectId)) and not isinstance(value, bool)


def match_ids(
    documents: Iterable[Mapping[str, Any]], post_ids: Iterable[str], path: str
) -> dict[str, Mapping[str, Any]]:
    """Return the document of each ID; where several match, the likeliest type of ID wins."""
    by_value: dict[tuple[type, Any], Mapping[str, Any]] = {}
    for document in documents:
        value = dig(document, path)
        if is_id(value):
            by_value.setdefault((type(value), value), document)
    matched: dict[str, Mapping[str, Any]] = {}
    for post_id in post_ids:
        for candidate in id_candidates(post_id):
            document_of = by_value.get((type(candidate), candidate))
            if document_of is not None:
                matched[post_id] = document_of
                break
    return matched


def projection(fields: FieldMap, result_path: str) -> dict[str, int]:
    """Return the projection that a post and its result are read with."""
    paths = ("_id", fields.id, fields.text, fields.images, fields.videos, fields.audios)
    return whole_fields((*paths, result_path))


def whole_fields(paths: Iterable[str]) -> dict[str, int]:
    """Return a projection of the top-level fields that dotted paths lead into.

    MongoDB, too, refuses a projection that names both a path and a part of it.
    """
    return {path.split(".")[0]: 1 for path in paths}


def read_post(post_id: str, document: Mapping[str, Any], fields: FieldMap) -> Post:
    """Return the post that a document describes."""
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
    """Return the texts in a text, ``{url: text}``, or a list of these; ignore everything else."""
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    if isinstance(value, Mapping):
        return sources(value.get("url")) if isinstance(value.get("url"), str) else []
    if isinstance(value, list):
        return [text for item in value if not isinstance(item, list) for text in sources(item)]
    return []


def tagged_by(document: Mapping[str, Any], result_path: str, bundle: Bundle) -> bool:
    """Return True when the document carries the tags of exactly this bundle."""
    stored = [dig(document, f"{result_path}.{key}") for key in ("status", "model", "version")]
    return stored == ["tagged", *bundle]
