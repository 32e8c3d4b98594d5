"""Post documents of the platform -> `Post`; pure but for one log line for each new shape.

The platform's documents are not ours: what is missing is absent, what has a shape that cannot be
read is left out and reported as `Unread`, and nothing raises an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple

import structlog

from common.post import Media, MediaKind, Post, clean
from common.retry import RetryPolicy
from config.settings import FieldMap
from king.jobs import Bundle

# A platform has a handful of shapes; more than this are documents whose keys are data, and a line
# in the log for each would bury the rest.
_MAX_REPORTED = 200
_SHOWN_KEYS = 5

log = structlog.get_logger()


class Unread(NamedTuple):
    """A part of a document that was left out: our name of the field, its path, what stood there."""

    field: str
    path: str
    shape: str


def values_at(document: Mapping[str, Any], path: str, lost: list[str] | None = None) -> list[Any]:
    """Return the values at a dotted path.

    Lists on the way are searched item by item, nested ones too; a number takes one item of a list.
    ``lost`` receives the shapes of values on the way that the path does not lead into.
    """
    nodes: list[Any] = [document]
    for key in path.split("."):
        nodes = [value for node in nodes for value in _step(node, key, lost)]
    return nodes


def _step(node: Any, key: str, lost: list[str] | None) -> Iterator[Any]:
    if isinstance(node, Mapping):
        if key in node:
            yield node[key]
    elif isinstance(node, list):
        if key.isdecimal() and int(key) < len(node):
            yield node[int(key)]
        else:
            for item in node:
                yield from _step(item, key, lost)
    elif node is not None and lost is not None:
        lost.append(f"{_shape(node)} before .{key}")


def dig(document: Mapping[str, Any], path: str) -> Any:
    """Return the first value at a dotted path, or None."""
    return next(iter(values_at(document, path)), None)


def projection(fields: FieldMap, result_path: str) -> dict[str, int]:
    """Return the projection that a post and its result are read with."""
    paths = ("_id", fields.id, fields.text, fields.images, fields.videos, fields.audios)
    return whole_fields((*paths, result_path))


def whole_fields(paths: Iterable[str]) -> dict[str, int]:
    """Return a projection of the top-level fields that dotted paths lead into.

    MongoDB, too, refuses a projection that names both a path and a part of it.
    """
    return {path.split(".")[0]: 1 for path in paths}


_reported: set[tuple[str, str]] = set()


def read_post(post_id: str, document: Mapping[str, Any], fields: FieldMap) -> Post:
    """Return the post that a document describes; log what cannot be read, each shape once."""
    post, unread = read_fields(post_id, document, fields)
    for field, path, shape in unread:
        if (field, shape) not in _reported and len(_reported) < _MAX_REPORTED:
            _reported.add((field, shape))
            log.warning(
                "store.field_unread", field=field, path=path, shape=shape, first_post=post_id
            )
    return post


def read_fields(
    post_id: str, document: Mapping[str, Any], fields: FieldMap
) -> tuple[Post, list[Unread]]:
    """Return the post that a document describes, and what could not be read."""
    unread: list[Unread] = []

    def texts(field: str, path: str, key: str = "") -> list[str]:
        lost: list[str] = []
        found = [text for v in values_at(document, path, lost) for text in _texts(v, key, lost)]
        unread.extend(Unread(field, path, shape) for shape in lost)
        return found

    paths: tuple[tuple[MediaKind, str, str], ...] = (
        ("image", "images", fields.images),
        ("video", "videos", fields.videos),
        ("audio", "audios", fields.audios),
    )
    post = Post(
        post_id=post_id,
        text="\n".join(texts("text", fields.text)),
        media=tuple(
            Media(kind, source.strip())
            for kind, field, path in paths
            for source in texts(field, path, "url")
        ),
        labels=tuple(label.strip() for label in texts("labels", fields.labels, "name")),
    )
    return post, unread


def _texts(value: Any, key: str, lost: list[str]) -> Iterator[str]:
    """Yield the texts in a text, ``{key: text}``, or lists of these, however deep."""
    if isinstance(value, str):
        if value.strip():
            yield clean(value)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key, lost)
    elif isinstance(value, Mapping) and key in value:
        yield from _texts(value[key], key, lost)
    elif value is not None and value != {}:
        lost.append(_shape(value))


def _shape(value: Any) -> str:
    if isinstance(value, Mapping):
        keys = sorted(value)
        return f"object with {', '.join(keys[:_SHOWN_KEYS])}{', ...' * (len(keys) > _SHOWN_KEYS)}"
    return type(value).__name__


def tagged_by(document: Mapping[str, Any], result_path: str, bundle: Bundle) -> bool:
    """Return True when the document carries the tags of exactly this bundle."""
    stored = [dig(document, f"{result_path}.{key}") for key in ("status", "model", "version")]
    return stored == ["tagged", *bundle]


def partial_attempts(
    document: Mapping[str, Any], result_path: str, retry: RetryPolicy, now: float
) -> int:
    """Return the attempts of a post tagged in part that may be tried again now; else 0."""
    partial, attempts, tagged_at = (
        dig(document, f"{result_path}.{key}") for key in ("partial", "attempts", "tagged_at")
    )
    if partial is not True or not isinstance(attempts, int) or not isinstance(tagged_at, datetime):
        return 0
    delay_s = retry.partial_delay_s(attempts)
    return attempts if delay_s is not None and now - tagged_at.timestamp() >= delay_s else 0
