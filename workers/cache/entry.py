"""One cache entry as bytes: feature arrays, text or facts, with a digest over all of it.

Layout: magic, 16 bytes BLAKE2b over key and body, length of the header, header (JSON), arrays
(float16, little-endian, one after the other). No pickle: a cache may be shared.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.post import FeatureArray

_MAGIC = b"ITC1"
_DIGEST_BYTES = 16  # finds damage, which even half would; it is no protection against an attacker
_LENGTH = struct.Struct("<I")
_BODY_AT = len(_MAGIC) + _DIGEST_BYTES


class CorruptEntry(Exception):
    """The bytes are no entry of this key."""


@dataclass(frozen=True)
class Entry:
    """The value of one key.

    Attributes:
        arrays: Stream -> float16 ``(n, dim)``.
        text: Read by OCR.
        facts: JSON values of entries that hold no features.
    """

    arrays: Mapping[str, FeatureArray] = field(default_factory=dict)
    text: str | None = None
    facts: Mapping[str, Any] | None = None


def encode(key: str, entry: Entry) -> bytes:
    """Return the bytes of an entry; they belong to its key."""
    arrays = {name: np.ascontiguousarray(a, "<f2") for name, a in entry.arrays.items()}
    header = json.dumps(
        {
            "arrays": [[name, *array.shape] for name, array in arrays.items()],
            "text": entry.text,
            "facts": entry.facts,
        },
        separators=(",", ":"),
    ).encode("ascii")
    body = b"".join([_LENGTH.pack(len(header)), header, *(a.tobytes() for a in arrays.values())])
    return _MAGIC + _digest(key, body) + body


def decode(key: str, content: bytes) -> Entry:
    """Return the entry in the bytes.

    Raises:
        CorruptEntry: They were cut, changed or mixed up, or hold values that are no features.
    """
    body = memoryview(content)[_BODY_AT:]
    if content[:4] != _MAGIC or content[4:_BODY_AT] != _digest(key, body):
        raise CorruptEntry("the digest does not fit")
    try:
        (length,) = _LENGTH.unpack_from(body)
        at = _LENGTH.size + length
        header = json.loads(bytes(body[_LENGTH.size : at]))
        arrays: dict[str, FeatureArray] = {}
        for name, rows, columns in header["arrays"]:
            array = np.frombuffer(body, "<f2", rows * columns, at).reshape(rows, columns)
            at += array.nbytes
            if not np.isfinite(array).all():
                raise CorruptEntry(f"{name} holds values that are not finite")
            arrays[str(name)] = array
        text, facts = header["text"], header["facts"]
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise CorruptEntry("its parts do not fit") from error
    if at != len(body) or not isinstance(text, str | None) or not isinstance(facts, dict | None):
        raise CorruptEntry("its parts do not fit")
    return Entry(arrays, text, facts)


def _digest(key: str, body: bytes | memoryview) -> bytes:
    total = hashlib.blake2b(key.encode("ascii"), digest_size=_DIGEST_BYTES)
    total.update(body)
    return total.digest()
