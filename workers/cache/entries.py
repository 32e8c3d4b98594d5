"""Entries of the feature cache: their bytes, and the guarded store that holds them.

An entry is magic, 16 bytes BLAKE2b over key and body, length of the header, header (JSON), arrays
(float16, little-endian, one after the other). No pickle: a cache may be shared.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import structlog

from common.errors import CacheUnavailable
from common.post import FeatureArray
from common.urls import redact
from config.settings import CacheSettings
from workers.cache.store import CacheStore, open_store

_MAGIC = b"ITC1"
_DIGEST_BYTES = 16  # finds damage, which even half would; it is no protection against an attacker
_LENGTH = struct.Struct("<I")
_BODY_AT = len(_MAGIC) + _DIGEST_BYTES

_Result = TypeVar("_Result")
_log = structlog.get_logger()


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
    """Return the entry in the bytes; CorruptEntry when they were changed or hold no features."""
    body = memoryview(content)[_BODY_AT:]
    if content[:4] != _MAGIC or content[4:_BODY_AT] != _digest(key, body):
        raise CorruptEntry("the digest does not match")
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


class GuardedStore:
    """Entries of a store; nothing here raises. Safe between threads.

    A failure of the backend is a miss; after it the backend is left alone for a while (a circuit
    breaker), and the log has one line for that and one when it works again.
    """

    def __init__(self, store: CacheStore, *, retry_s: float, where: str = "") -> None:
        """Guard a store; ``where`` is its address for the log, without credentials."""
        self._store = store
        self._retry_s = retry_s
        self._where = where
        self._closed_until = 0.0
        self._failed = False
        self._lock = threading.Lock()

    @classmethod
    def open(cls, settings: CacheSettings) -> GuardedStore:
        """Return the guarded store of the settings, not yet reached; ConfigError without any."""
        where = redact(settings.url or "")
        return cls(open_store(settings), retry_s=settings.retry_s, where=where)

    @property
    def available(self) -> bool:
        """Tell whether the next call would reach the backend."""
        return time.monotonic() >= self._closed_until

    def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        nothing: Mapping[str, bytes] = {}
        contents = self._try(lambda: self._store.get_many(keys), nothing) if keys else nothing
        entries: dict[str, Entry] = {}
        bad: list[str] = []
        for key, content in contents.items():
            try:
                entries[key] = decode(key, content)
            except CorruptEntry as error:
                bad.append(key)
                _log.warning("cache.corrupt_entry_deleted", key=key, reason=str(error))
        if bad:
            self._try(lambda: self._store.delete(bad), None)
        return entries

    def put(self, key: str, entry: Entry) -> None:
        if self.available:
            content = encode(key, entry)
            self._try(lambda: self._store.put(key, content), None)

    def failed(self, reason: str) -> None:
        """Leave the backend alone for a while; also called when one of its calls hangs."""
        with self._lock:
            first, self._failed = not self._failed, True
            self._closed_until = time.monotonic() + self._retry_s
        if first:
            _log.warning(
                "cache.unavailable", cache=self._where, reason=reason, retry_s=self._retry_s
            )

    def close(self) -> None:
        self._try(self._store.close, None)

    def _try(self, call: Callable[[], _Result], otherwise: _Result) -> _Result:
        if not self.available:
            return otherwise
        try:
            result = call()
        except CacheUnavailable as error:
            self.failed(str(error))
            return otherwise
        if self._failed:
            with self._lock:
                back, self._failed = self._failed, False
            if back:
                _log.info("cache.available_again", cache=self._where)
        return result
