"""Where entries lie: one Protocol, and which backend a URL names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from common.errors import ConfigError, one_line
from common.urls import redact
from config.cache import CacheSettings
from workers.cache.base import CacheStore

MIB = 1 << 20


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
        reason = one_line(error, 200)
        hint = "; install insighttag[s3]" if scheme in ("s3", "s3a") else ""
        raise ConfigError(f"cache.url: {redact(url)} cannot be used: {reason}{hint}") from error
