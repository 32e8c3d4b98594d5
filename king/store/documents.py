"""Post documents of the platform -> `Post`, and their IDs <-> the text that messages carry.

The platform's documents are not ours: what is missing is absent, what has a shape that cannot be
read is left out and reported as `Unread`, and nothing raises an error. Pure but for log lines.

IDs are compared as MongoDB compares them: numbers of every type by their value, everything else
by type and bytes. Each has one text, in the queue, in the jobs and for people:

    string                          itself, or as a JSON string where no message can carry it
    int32, int64, double, decimal   its digits: 42 and 42.0 are "42"
    ObjectId                        24 hexadecimal digits
    UUID (binary subtypes 3, 4)     8-4-4-4-12 hexadecimal digits
    everything else                 canonical extended JSON: {"$date":{"$numberLong":"1"}}

null, lists and values whose text exceeds MAX_ID_BYTES name no post: `NoIdError` says why.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from decimal import Decimal, DecimalException
from typing import Any, NamedTuple, TypeAlias

import bson
import structlog
from bson import Binary, Code, Decimal128, Int64, MaxKey, MinKey, ObjectId, Timestamp
from bson.binary import UuidRepresentation
from bson.codec_options import DatetimeConversion
from bson.datetime_ms import DatetimeMS
from bson.json_util import DatetimeRepresentation, JSONMode, JSONOptions, dumps, loads

from common.errors import MessageError
from common.post import Media, MediaKind, Post, clean
from common.retry import RetryPolicy
from config.settings import FieldMap, StoreSettings
from king.jobs import Bundle
from king.messages import MAX_ID_BYTES, PostMessage, parse_message

_JSON = JSONOptions(
    json_mode=JSONMode.CANONICAL,
    datetime_representation=DatetimeRepresentation.NUMBERLONG,
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
    tz_aware=True,
)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_UUID_BYTES = 16
# C# and Java wrote UUIDs of subtype 3 in byte orders of their own.
_LEGACY = (
    UuidRepresentation.PYTHON_LEGACY,
    UuidRepresentation.JAVA_LEGACY,
    UuidRepresentation.CSHARP_LEGACY,
)
# An exponent of more digits is none that any type holds, and from 19 on Decimal refuses it.
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?(e[+-]?[0-9]{1,9})?", re.IGNORECASE)
_INT64 = 1 << 63
# Types that are values in a query. Others are not looked for, whatever a message names: a regular
# expression would match every post, a document of operators break the whole query.
_VALUES = (
    *(str, bool, int, float, Decimal128, ObjectId, bytes, datetime, DatetimeMS),
    *(Timestamp, MinKey, MaxKey, Code),
)
# A platform has a handful of shapes; more than this are documents whose keys are data, and a line
# in the log for each would bury the rest.
_MAX_REPORTED = 200
_SHOWN_KEYS = 5

_Key: TypeAlias = str | bytes | Decimal

log = structlog.get_logger()


class NoIdError(ValueError):
    """A value by which no message can name a post."""


def id_text(value: object) -> str:
    """Return the text of an ID; NoIdError for a value that names no post."""
    text = _text(value)
    if len(text.encode()) > MAX_ID_BYTES:
        raise NoIdError(f"its text is longer than {MAX_ID_BYTES} bytes")
    return text


def _text(value: object) -> str:
    match value:
        case Code():
            pass
        case str():
            return value if _is_carried(value) else json.dumps(value)
        case ObjectId():
            return str(value)
        case Binary(subtype=3 | 4) if len(value) == _UUID_BYTES:
            return str(uuid.UUID(bytes=bytes(value)))
        case int() | float() | Decimal128() if not isinstance(value, bool):
            number = _decimal(value)
            if number.is_finite() and abs(number.adjusted()) < MAX_ID_BYTES:
                if number == number.to_integral_value():
                    return str(int(number))
                return repr(value) if isinstance(value, float) else f"{number:f}".rstrip("0")
        case None:
            raise NoIdError("it is null")
        case list():
            raise NoIdError("it is a list")
        case _:
            pass
    text = dumps(value, json_options=_JSON, separators=(",", ":"))
    if not _from_json(text):
        raise NoIdError(f"it is a {type(value).__name__}")
    return text


def _decimal(value: float | Decimal128) -> Decimal:
    return value.to_decimal() if isinstance(value, Decimal128) else Decimal(value)


def _is_carried(text: str) -> bool:
    """Return True if a message keeps the text as it is: most do, and this is quick to check."""
    if text.isprintable() and len(text) < MAX_ID_BYTES // 4 and text and text.strip() == text:
        return True
    try:
        return parse_message(PostMessage(text).encode()).post_id == text
    except MessageError:
        return False


def id_candidates(post_id: str) -> list[Any]:
    """Return the values that an ID on the queue (always text) may have, the likeliest first."""
    candidates: list[Any] = [post_id]
    if len(post_id) == 24 and ObjectId.is_valid(post_id):
        candidates.append(ObjectId(post_id))
    if _NUMBER.fullmatch(post_id):  # 24 digits are both
        candidates += _numbers(post_id)
    elif _UUID.fullmatch(post_id):
        named = uuid.UUID(post_id)
        candidates += [Binary.from_uuid(named)]
        candidates += [Binary.from_uuid(named, order) for order in _LEGACY]
    elif post_id.startswith(("{", '"')) or post_id in {"true", "false"}:
        candidates += _from_json(post_id)
    return candidates


def _numbers(text: str) -> list[Any]:
    number = Decimal(text)
    numbers: list[Any] = []
    if number.adjusted() < 20 and number == number.to_integral_value():
        whole = int(number)
        if -_INT64 <= whole < _INT64:
            numbers.append(Int64(whole))
    real = float(text)
    # MongoDB finds a number of any type by any other; the embedded database a double by a double.
    if repr(real) == text or Decimal(real) == number:
        numbers.append(real)
    with suppress(DecimalException):  # more than its 34 digits
        numbers.append(Decimal128(number))
    return numbers


def _from_json(text: str) -> list[Any]:
    try:
        value = loads(text, json_options=_JSON)
    except Exception:  # noqa: BLE001 - bson raises whatever a value's type raises
        return []
    if isinstance(value, dict):
        return [] if any(str(key).startswith("$") for key in value) else [value]
    return [value] if isinstance(value, _VALUES) else []


def match_ids(
    documents: Iterable[Mapping[str, Any]], post_ids: Iterable[str], path: str
) -> dict[str, Mapping[str, Any]]:
    """Return the document of each ID; where several match, the likeliest type of ID wins."""
    by_key: dict[_Key, Mapping[str, Any]] = {}
    for document in documents:
        by_key.setdefault(_key(dig(document, path)), document)
    matched: dict[str, Mapping[str, Any]] = {}
    for post_id in post_ids:
        keys = dict.fromkeys(map(_key, id_candidates(post_id)))
        matches = [by_key[key] for key in keys if key in by_key]
        if matches:
            matched[post_id] = matches[0]
        if len(matches) > 1:
            kinds = [type(dig(document, path)).__name__ for document in matches]
            log.warning("store.id_ambiguous", post_id=post_id, used=kinds[0], ignored=kinds[1:])
    return matched


def _key(value: object) -> _Key:
    """Return what two values share exactly when MongoDB takes them for the same."""
    match value:
        case bool() | Code():
            pass
        case str():
            return value
        case int() | float() | Decimal128():
            number = _decimal(value)
            return b"NaN" if number.is_nan() else number
        case _:
            pass
    return bson.encode({"": value})


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


def shadow_path(settings: StoreSettings) -> str:
    """Return the path of the result of a bundle on trial."""
    return f"{settings.result_path}_shadow"


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
        read = [text for v in values_at(document, path, lost) for text in _texts(v, key, lost)]
        unread.extend(Unread(field, path, shape) for shape in lost)
        return read

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
    """Return the attempts of a partial result that may be tried again now; else 0."""
    partial, attempts, tagged_at = (
        dig(document, f"{result_path}.{key}") for key in ("partial", "attempts", "tagged_at")
    )
    if partial is not True or not isinstance(attempts, int) or not isinstance(tagged_at, datetime):
        return 0
    delay_s = retry.partial_delay_s(attempts)
    return attempts if delay_s is not None and now - tagged_at.timestamp() >= delay_s else 0
