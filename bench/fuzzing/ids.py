"""Post IDs of every BSON type: posts in the embedded database, and random values past the codec."""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from types import MappingProxyType
from typing import Any

import bson
from bson import Binary, Code, Decimal128, Int64, MaxKey, MinKey, ObjectId, Timestamp
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.datetime_ms import DatetimeMS

from king.messages import PostMessage, parse_message
from king.store.documents import NoIdError, id_text, match_ids

ODD_IDS: tuple[Any, ...] = (
    *(7, -7, Int64(1212092628029698048), 43.0, float(2**31 + 1), 1.5, 1e22, float("nan")),
    *(Decimal128("4.50"), ObjectId(b"0123456789ab"), " spaced ", "", "nul\0", '{"$gt":""}'),
    *(Binary(b"\1" * 16, 4), Binary(b"\2" * 16, 3), b"bytes", True, {"a": 1, "b": "x"}),
    *(datetime(2026, 1, 1, tzinfo=timezone.utc), Timestamp(5, 1), MinKey(), MaxKey(), Code("f")),
)
"""IDs of posts. Those that the embedded database cannot hold or find are unknown to it."""

_OPTIONS: CodecOptions[dict[str, Any]] = CodecOptions(
    tz_aware=True, datetime_conversion=DatetimeConversion.DATETIME_AUTO
)
_TEXTS = string.printable + "\0\x1b\x7f\u2028\u202e\ufeff字é\U0010ffff"


def _text(rng: random.Random) -> str:
    return "".join(rng.choices(_TEXTS, k=rng.randrange(40)))


def _double(rng: random.Random) -> float:
    """Return any double: every pattern of its bits is as likely."""
    return float(memoryview(rng.randbytes(8)).cast("d")[0])


def _decimal(rng: random.Random) -> Decimal128:
    """Return any decimal, as drivers write it: several patterns of bits have the same value."""
    return Decimal128(str(Decimal128.from_bid(rng.randbytes(16))))


def _document(rng: random.Random) -> dict[str, Any]:
    return {f"k{i}": _TYPES[rng.choice(list(_TYPES))](rng) for i in range(rng.randrange(1, 4))}


_TYPES: Mapping[str, Callable[[random.Random], Any]] = MappingProxyType(
    {
        "string": _text,
        "int32": lambda rng: rng.randrange(-(2**31), 2**31),
        "int64": lambda rng: Int64(rng.randrange(-(2**63), 2**63)),
        "double": _double,
        "whole double": lambda rng: float(rng.randrange(2**53)),
        "Decimal128": _decimal,
        "ObjectId": lambda rng: ObjectId(rng.randbytes(12)),
        "UUID": lambda rng: Binary.from_uuid(uuid.UUID(bytes=rng.randbytes(16))),
        "binary": lambda rng: Binary(rng.randbytes(rng.randrange(40)), rng.randrange(256)),
        "bool": lambda rng: rng.random() < 0.5,
        "date": lambda rng: DatetimeMS(rng.randrange(-(2**62), 2**62)),
        "timestamp": lambda rng: Timestamp(rng.randrange(2**32), rng.randrange(2**32)),
        "code": lambda rng: Code(_text(rng)),
        "document": _document,
    }
)


def lost_ids(seed: int, count: int) -> list[str]:
    """Return random IDs that have no text by which a message finds them, and no reason why."""
    rng = random.Random(f"{seed}/ids")
    lost = []
    for i in range(count):
        name = list(_TYPES)[i % len(_TYPES)]
        value = _TYPES[name](rng)
        document = bson.decode(bson.encode({"_id": value}), _OPTIONS)
        try:
            text = id_text(document["_id"])
            asked = parse_message(PostMessage(text).encode()).post_id
            if asked not in match_ids([document], [asked], "_id"):
                lost.append(f"{name}: {value!r}")
        except NoIdError:
            pass  # its reason is what a person is told
        except Exception as error:  # noqa: BLE001 - what a fuzzer looks for
            lost.append(f"{name}: {value!r}: {error!r}")
    return lost
