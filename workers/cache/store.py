"""Where entries lie: one Protocol, and which backend a URL names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from config.cache import CacheSettings
from config.errors import ConfigError
from config.urls import redact

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Stats:
    """How much a store holds; ``max_bytes`` is its limit."""

    entries: int
    bytes: int
    max_bytes: int


class CacheStore(Protocol):
    """Bytes by key, for many threads and processes at once.

    Keys are 64 hex digits. What is put may be evicted at any time. Every method raises
    `CacheUnavailable` when the backend does not do it.
    """

    def get_many(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        """What is there of these; what is missing is left out."""
        ...

    def put(self, key: str, value: bytes) -> None:
        """Keep a value, whole or not at all; evicts now and then."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Forget these; one that is not there is no mistake."""
        ...

    def stats(self) -> Stats:
        """Count entries and bytes; may take long."""
        ...

    def prune(self, max_bytes: int) -> Stats:
        """Evict down to so many bytes; gives what went, as entries and bytes."""
        ...

    def close(self) -> None:
        """Close connections."""
        ...


def open_store(settings: CacheSettings) -> CacheStore:
    """The store that ``cache.url`` names; nothing is reached or made yet.

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
        reason = " ".join(str(error).split())[:200]
        hint = "; install insighttag[s3]" if scheme in ("s3", "s3a") else ""
        raise ConfigError(f"cache.url: {redact(url)} cannot be used: {reason}{hint}") from error
