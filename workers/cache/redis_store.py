"""Entries in Redis, one key each with a time to live that each use renews.

The server bounds the memory: set ``maxmemory`` and ``maxmemory-policy`` ``allkeys-lru`` (or
``volatile-lru`` where other data lives there too). With ``noeviction`` a full server refuses
writes, and the cache is left alone for `cache.retry_s` each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError
from redis.retry import Retry

from common.errors import CacheUnavailable, one_line
from common.urls import redact
from workers.cache.base import Stats, StoredEntry, oldest_beyond

_PREFIX = "insighttag:features:"

_BATCH = 500
"""Keys of one round trip when entries are counted or deleted: some milliseconds of the server's one
thread. Ten times as many would be felt by the look-ups in between."""


class RedisStore:
    """`CacheStore` in Redis 6 or newer; connects on first use."""

    def __init__(self, url: str, max_bytes: int, *, ttl_s: float | None, timeout_s: float) -> None:
        """Describe it; ``ttl_s`` is renewed when an entry is used."""
        self._where = redact(url)
        self._max_bytes = max_bytes
        self._ttl_ms = int((ttl_s or 0) * 1000)
        self._client = redis.Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 1),  # one: a connection that the server has closed meanwhile
            health_check_interval=0,
        )

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        if not keys:
            return {}
        with self._edge():
            pipeline = self._client.pipeline(transaction=False)
            pipeline.mget([_PREFIX + key for key in keys])
            if self._ttl_ms:
                for key in keys:
                    pipeline.pexpire(_PREFIX + key, self._ttl_ms)
            values = pipeline.execute()[0]
        return {k: bytes(v) for k, v in zip(keys, values, strict=True) if v is not None}

    def put(self, key: str, value: bytes) -> None:
        with self._edge():
            self._client.set(_PREFIX + key, value, px=self._ttl_ms or None)

    def delete(self, keys: Iterable[str]) -> None:
        self._unlink([_PREFIX + key for key in keys])

    def stats(self) -> Stats:
        entries = total = 0
        for entry in self._entries():
            entries, total = entries + 1, total + entry.size
        return Stats(entries, total, self._max_bytes)

    def prune(self, max_bytes: int) -> Stats:
        oldest = oldest_beyond(self._entries(), max_bytes)
        self._unlink([entry.name for entry in oldest])
        return Stats(len(oldest), sum(entry.size for entry in oldest), self._max_bytes)

    def close(self) -> None:
        self._client.close()

    def _entries(self) -> Iterator[StoredEntry]:
        """Yield all entries; the less time one has to live, the longer ago was its last use."""
        cursor = 0
        while True:
            with self._edge():
                cursor, keys = self._client.scan(cursor, match=f"{_PREFIX}*", count=_BATCH)
                pipeline = self._client.pipeline(transaction=False)
                for key in keys:
                    pipeline.strlen(key)
                    pipeline.pttl(key)
                answers = pipeline.execute()
            names = [key.decode() if isinstance(key, bytes) else key for key in keys]
            for name, size, ttl_ms in zip(names, answers[::2], answers[1::2], strict=True):
                if ttl_ms != -2:  # -2: it is gone since the scan
                    yield StoredEntry(name, int(size), float(ttl_ms))
            if cursor == 0:
                return

    def _unlink(self, names: Sequence[str]) -> None:
        for start in range(0, len(names), _BATCH):
            with self._edge():
                self._client.unlink(*names[start : start + _BATCH])

    @contextlib.contextmanager
    def _edge(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise CacheUnavailable(f"{self._where} refuses the password") from error
        except (RedisError, OSError) as error:
            raise CacheUnavailable(f"{self._where}: {one_line(error, 200)}") from error
