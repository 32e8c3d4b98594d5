"""Entries in Redis, with an index of our own: bounded whatever ``maxmemory`` says.

``insighttag:cache:{c}:<key>`` holds the entry; two more keys hold when each was used last and how
large it is, and one the sum. The scripts run on the server in one step, so that the sum is true
whoever is killed. Set ``maxmemory`` above ``cache.max_mb`` and leave ``maxmemory-policy`` at
``noeviction`` or ``volatile-*``: with ``allkeys-*`` the server may evict the index itself, which
costs a round of evictions and no more.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError
from redis.retry import Retry

from common.errors import CacheUnavailable, one_line
from common.urls import redact
from workers.cache.base import Stats

# One hash tag: on a cluster all keys lie on one node, which is what the scripts need.
_PREFIX = "insighttag:cache:{c}:"
_USED, _SIZES, _TOTAL = _PREFIX + "used", _PREFIX + "sizes", _PREFIX + "bytes"
_STEP = 64

_FORGET = """
local function forget(key)
  local size = tonumber(redis.call('HGET', KEYS[2], key) or 0)
  redis.call('UNLINK', ARGV[1] .. key)
  redis.call('ZREM', KEYS[1], key)
  redis.call('HDEL', KEYS[2], key)
  redis.call('DECRBY', KEYS[3], size)
  return size
end
"""
_EVICT = """
local function evict(limit, most)
  local entries, bytes = 0, 0
  while tonumber(redis.call('GET', KEYS[3]) or 0) > limit and entries < most do
    local oldest = redis.call('ZRANGE', KEYS[1], 0, 0)[1]
    if not oldest then
      redis.call('SET', KEYS[3], 0)
      break
    end
    bytes = bytes + forget(oldest)
    entries = entries + 1
  end
  return {entries, bytes}
end
"""
_PUT_SCRIPT = f"""{_FORGET}{_EVICT}
forget(ARGV[2])
redis.call('SET', ARGV[1] .. ARGV[2], ARGV[3])
if tonumber(ARGV[6]) > 0 then redis.call('PEXPIRE', ARGV[1] .. ARGV[2], ARGV[6]) end
local size = string.len(ARGV[3])
redis.call('ZADD', KEYS[1], ARGV[4], ARGV[2])
redis.call('HSET', KEYS[2], ARGV[2], size)
redis.call('INCRBY', KEYS[3], size)
return evict(tonumber(ARGV[5]), 1000)
"""
_EVICT_SCRIPT = f"""{_FORGET}{_EVICT}
return evict(tonumber(ARGV[2]), tonumber(ARGV[3]))
"""
_DELETE_SCRIPT = f"""{_FORGET}
for i = 2, #ARGV do forget(ARGV[i]) end
"""


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
        keys = [_USED, _SIZES, _TOTAL]
        self._keys = keys
        self._put = self._client.register_script(_PUT_SCRIPT)
        self._evict = self._client.register_script(_EVICT_SCRIPT)
        self._delete = self._client.register_script(_DELETE_SCRIPT)

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """See `CacheStore.get_many`: one round trip."""
        if not keys:
            return {}
        now = time.time()
        with self._edge():
            pipeline = self._client.pipeline(transaction=False)
            pipeline.mget([_PREFIX + key for key in keys])
            pipeline.zadd(_USED, dict.fromkeys(keys, now), xx=True)
            if self._ttl_ms:
                for key in keys:
                    pipeline.pexpire(_PREFIX + key, self._ttl_ms)
            values = pipeline.execute()[0]
        return {k: bytes(v) for k, v in zip(keys, values, strict=True) if v is not None}

    def put(self, key: str, value: bytes) -> None:
        """See `CacheStore.put`."""
        with self._edge():
            now = time.time()
            self._put(
                keys=self._keys, args=[_PREFIX, key, value, now, self._max_bytes, self._ttl_ms]
            )

    def delete(self, keys: Iterable[str]) -> None:
        """See `CacheStore.delete`."""
        with self._edge():
            self._delete(keys=self._keys, args=[_PREFIX, *keys])

    def stats(self) -> Stats:
        """See `CacheStore.stats`; entries whose time has run out count until they are met."""
        with self._edge():
            entries, total = int(self._client.zcard(_USED)), int(self._client.get(_TOTAL) or 0)
        return Stats(entries, total, self._max_bytes)

    def prune(self, max_bytes: int) -> Stats:
        """See `CacheStore.prune`; a few at a time, so that nobody waits for the server."""
        entries = total = 0
        while True:
            with self._edge():
                done = self._evict(keys=self._keys, args=[_PREFIX, max_bytes, _STEP])
            entries, total = entries + int(done[0]), total + int(done[1])
            if int(done[0]) < _STEP:
                return Stats(entries, total, self._max_bytes)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    @contextlib.contextmanager
    def _edge(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise CacheUnavailable(f"{self._where} refuses the password") from error
        except (RedisError, OSError) as error:
            reason = one_line(error, 200)
            raise CacheUnavailable(f"{self._where}: {reason}") from error
