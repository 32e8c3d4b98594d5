"""Post IDs: the text that the queue, the jobs and people use <-> the values in the database.

Values are compared as MongoDB compares them: numbers of every type by their value, everything else
by type and bytes. Each value has one text:

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
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from decimal import Decimal, DecimalException
from typing import Any, TypeAlias

import bson
import structlog
from bson import Binary, Code, Decimal128, Int64, MaxKey, MinKey, ObjectId, Timestamp
from bson.binary import UuidRepresentation
from bson.codec_options import DatetimeConversion
from bson.datetime_ms import DatetimeMS
from bson.json_util import DatetimeRepresentation, JSONMode, JSONOptions, dumps, loads

from common.errors import MessageError
from king.messages import MAX_ID_BYTES, PostMessage, parse_message
from king.store.documents import dig

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
# Types that are values in a question. Others are not asked for, whatever a message names: a
# regular expression would match every post, a document of operators break the whole question.
_VALUES = (
    *(str, bool, int, float, Decimal128, ObjectId, bytes, datetime, DatetimeMS),
    *(Timestamp, MinKey, MaxKey, Code),
)

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
    """Return True when a message gives back the very text: most do, and are quick to check."""
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
    elif _NUMBER.fullmatch(post_id):
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
        found = [by_key[key] for key in keys if key in by_key]
        if found:
            matched[post_id] = found[0]
        if len(found) > 1:
            kinds = [type(dig(document, path)).__name__ for document in found]
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
