"""The backend that a URL names, behind a guard: a cache never costs a post more than a moment.

A failure of the backend is a miss; after it the backend is left alone for a while (a circuit
breaker), and the log has one line for that and one when it works again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import structlog

from common.errors import CacheUnavailable, ConfigError, one_line
from common.urls import redact
from config.settings import CacheSettings
from workers.cache.base import CacheStore
from workers.cache.entry import CorruptEntry, Entry, decode, encode

MIB = 1 << 20
_Result = TypeVar("_Result")
_log = structlog.get_logger()


def open_store(settings: CacheSettings) -> CacheStore:
    """Return the store that ``cache.url`` names; nothing is reached or made yet.

    Raises:
        ConfigError: There is no such backend, or its package is missing.
    """
    url = settings.url
    if url is None:
        raise ConfigError("cache.url: there is no cache; set it to a folder, redis:// or s3://")
    scheme = urlsplit(url).scheme if "://" in url else ""
    limit = settings.max_mb * MIB
    if scheme in ("", "file"):
        from workers.cache.folder import FolderStore

        path = unquote(url.partition("://")[2]) if scheme else url
        return FolderStore(Path(path).expanduser(), limit)
    if scheme in ("redis", "rediss"):
        from workers.cache.redis_store import RedisStore

        return RedisStore(url, limit, ttl_s=settings.ttl_s, timeout_s=settings.timeout_s)
    from workers.cache.remote import RemoteStore

    try:
        return RemoteStore(url, limit, settings.options, timeout_s=settings.timeout_s)
    except (ImportError, ValueError) as error:
        reason = one_line(error, 200)
        hint = "; install insighttag[s3]" if scheme in ("s3", "s3a") else ""
        raise ConfigError(f"cache.url: {redact(url)} cannot be used: {reason}{hint}") from error


class GuardedStore:
    """Entries of a store; nothing here raises. Safe between threads."""

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
        """Return the guarded store that the settings name; nothing is reached yet.

        Raises:
            ConfigError: There is no such backend.
        """
        where = redact(settings.url or "")
        return cls(open_store(settings), retry_s=settings.retry_s, where=where)

    @property
    def available(self) -> bool:
        """Tell whether the next call would reach the backend."""
        return time.monotonic() >= self._closed_until

    def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        """Return the good entries of these keys; a bad one is deleted."""
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
        """Store an entry, if the backend can."""
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
        """Close connections."""
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
