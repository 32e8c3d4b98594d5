"""Stores of the feature cache: a folder, Redis, or any file system that fsspec reaches.

An entry is bytes under a key; it may be evicted at any time. A damaged one does not fit its digest
(`workers.cache.entries`), and is a miss.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from common.errors import CacheUnavailable, ConfigError, one_line
from common.urls import redact
from config.settings import CacheSettings

_ENTRY = re.compile(r"(?:.*/)?[0-9a-f]{2}/[0-9a-f]{62}", re.DOTALL)
_MIB = 1 << 20

_SHARDS = tuple(f"{i:02x}" for i in range(256))
_PARTIAL = ".partial"
_PART = re.compile(r"[0-9a-f]{16}\.partial")

_PARTIAL_S = 3600.0
"""Age at which a partial file is that of a killed writer. Writing one takes milliseconds."""

_TOUCH_S = 3600.0
"""A file's time is renewed by use at most this often: LRU to the hour, for a tenth of the cost of
renewing it at each use."""

_SHARD_BY_SHARD_BYTES = 4 << 30
"""Size from which a sweep lists only one shard. Keys spread evenly, so each shard has its share; in
smaller caches a share would hold too few entries for that, and listing them all is quick."""

_SWEEP = 1 / 16
"""Part of the limit that is put between two sweeps. Each process may pass the limit by as much;
half would list twice as often."""

_LOW_MARK = 7 / 8
"""Size after a sweep, as a part of the limit: far enough below that not each sweep evicts."""

_KEYS_A_TRIP = 500
"""Keys of one round trip when entries are counted or deleted: some milliseconds of the server's one
thread. Ten times as many would be felt by the look-ups in between."""

_FILES_A_TRIP = 500
"""Files of one delete request. S3 takes 1000 at once; with fewer, pruning a full bucket would take
as many more round trips."""

_TIMES = ("LastModified", "mtime", "updated", "last_modified", "created")


@dataclass(frozen=True, slots=True)
class Stats:
    """Size of a store; ``max_bytes`` is `cache.max_mb`."""

    entries: int
    bytes: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """One stored entry.

    Attributes:
        name: Path or key.
        size: In bytes.
        used_at: Greater is later: of its last use, or of its writing where that is not known.
    """

    name: str
    size: int
    used_at: float


class CacheStore(ABC):
    """Bytes by key, for many threads and processes at once.

    Keys are 64 hex digits. An entry may be evicted at any time. Every method raises
    `CacheUnavailable` when the backend fails.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes

    @abstractmethod
    def get_many(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        """Return the values of these keys; missing ones are left out."""

    @abstractmethod
    def put(self, key: str, value: bytes) -> None:
        """Store a value, whole or not at all."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete these; missing ones are ignored."""
        self._remove([self._name(key) for key in keys])

    def stats(self) -> Stats:
        """Count entries and bytes; may take long."""
        entries = total = 0
        for entry in self._entries():
            entries, total = entries + 1, total + entry.size
        return Stats(entries, total, self.max_bytes)

    def prune(self, max_bytes: int) -> Stats:
        """Delete the oldest entries down to a size; return what was deleted."""
        return self._evict(self._entries(), max_bytes)

    def close(self) -> None:  # noqa: B027 - most have nothing open
        """Close connections."""

    @abstractmethod
    def _name(self, key: str) -> str:
        """Return the path or the backend's key of an entry."""

    @abstractmethod
    def _entries(self) -> Iterable[StoredEntry]: ...

    @abstractmethod
    def _remove(self, names: Sequence[str]) -> None: ...

    def _evict(self, entries: Iterable[StoredEntry], max_bytes: int) -> Stats:
        by_age = sorted(entries, key=lambda entry: entry.used_at)
        size = sum(entry.size for entry in by_age)
        count = removed = 0
        while count < len(by_age) and size - removed > max_bytes:
            removed += by_age[count].size
            count += 1
        self._remove([entry.name for entry in by_age[:count]])
        return Stats(count, removed, self.max_bytes)


def _is_entry(path: str) -> bool:
    """Tell whether a path ends as those of entries do; other files are not ours to delete."""
    return _ENTRY.fullmatch(path) is not None


def open_store(settings: CacheSettings) -> CacheStore:
    """Return the store that ``cache.url`` names, not yet reached; ConfigError without a backend."""
    url = settings.url
    if url is None:
        raise ConfigError("cache.url: there is no cache; set it to a folder, redis:// or s3://")
    scheme = urlsplit(url).scheme if "://" in url else ""
    limit = settings.max_mb * _MIB
    if scheme in ("", "file"):
        path = unquote(url.partition("://")[2]) if scheme else url
        return FolderStore(Path(path).expanduser(), limit)
    if scheme in ("redis", "rediss"):
        return RedisStore(url, limit, ttl_s=settings.ttl_s, timeout_s=settings.timeout_s)
    try:
        return RemoteStore(url, limit, settings.options, timeout_s=settings.timeout_s)
    except (ImportError, ValueError) as error:
        reason = one_line(error, 200)
        hint = "; pip install '.[s3]'" if scheme in ("s3", "s3a") else ""
        raise ConfigError(f"cache.url: {redact(url)} cannot be used: {reason}{hint}") from error


class FolderStore(CacheStore):
    """`CacheStore` in a folder, which is made with the first entry."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = str(root)
        super().__init__(max_bytes)
        whole = max_bytes < _SHARD_BY_SHARD_BYTES
        self._groups = [_SHARDS] if whole else [(shard,) for shard in _SHARDS]
        self._group_bytes = max_bytes // len(self._groups)
        self._lock = threading.Lock()
        # From a random point on, so that many short processes sweep as often as a long one.
        self._unswept_bytes = random.random() * self._group_bytes * _SWEEP  # noqa: S311 - no secret
        self._next_group = random.randrange(len(self._groups))  # noqa: S311

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        values: dict[str, bytes] = {}
        for key in keys:
            path = self._name(key)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self._unavailable(error) from error
            try:
                stat = os.fstat(descriptor)
                values[key] = _read_file(descriptor, stat.st_size)
                if stat.st_mtime < time.time() - _TOUCH_S:
                    with contextlib.suppress(OSError):  # a read-only cache serves too
                        os.utime(path)
            except OSError as error:
                raise self._unavailable(error) from error
            finally:
                os.close(descriptor)
        return values

    def put(self, key: str, value: bytes) -> None:
        folder = f"{self._root}/{key[:2]}"
        partial = f"{folder}/{secrets.token_hex(8)}{_PARTIAL}"
        try:
            try:
                self._write(partial, value)
            except FileNotFoundError:
                Path(folder).mkdir(parents=True, exist_ok=True)
                self._write(partial, value)
            os.rename(partial, self._name(key))  # noqa: PTH104  as below
        except OSError as error:
            with contextlib.suppress(OSError):
                Path(partial).unlink()
            raise self._unavailable(error) from error
        self._sweep_when_due(len(value))

    def _name(self, key: str) -> str:
        return f"{self._root}/{key[:2]}/{key[2:]}"

    def _write(self, path: str, value: bytes) -> None:
        with open(path, "xb", buffering=0) as file:  # noqa: PTH123  ten thousand a minute
            # A full disk or a limit may take a part without an error; the next write then fails.
            rest = memoryview(value)
            while rest and (written := file.write(rest)):
                rest = rest[written:]
        if rest:
            raise OSError(errno.EIO, f"{len(rest)} bytes could not be written")

    def _sweep_when_due(self, size: int) -> None:
        with self._lock:
            self._unswept_bytes += size
            if self._unswept_bytes < self._group_bytes * _SWEEP:
                return
            self._unswept_bytes = 0.0
            group = self._groups[self._next_group]
            self._next_group = (self._next_group + 1) % len(self._groups)
        entries = list(self._entries(group))
        if sum(entry.size for entry in entries) > self._group_bytes * (1 - _SWEEP):
            self._evict(entries, int(self._group_bytes * _LOW_MARK))

    def _entries(self, shards: Iterable[str] = _SHARDS) -> Iterator[StoredEntry]:
        """Yield the entries of some shards; removes partial files of killed writers."""
        for shard in shards:
            try:
                with os.scandir(f"{self._root}/{shard}") as files:
                    for file in files:
                        with contextlib.suppress(FileNotFoundError):  # another process evicts too
                            stat = file.stat(follow_symlinks=False)
                            if _is_entry(f"{shard}/{file.name}"):
                                yield StoredEntry(file.path, stat.st_size, stat.st_mtime)
                            elif _PART.fullmatch(file.name) and _is_old(stat.st_mtime):
                                Path(file.path).unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self._unavailable(error) from error

    def _remove(self, names: Sequence[str]) -> None:
        for path in names:
            try:
                Path(path).unlink(missing_ok=True)
            except OSError as error:
                raise self._unavailable(error) from error

    def _unavailable(self, error: OSError) -> CacheUnavailable:
        return CacheUnavailable(f"{self._root}: {error.strerror or error}")


def _is_old(modified_at: float) -> bool:
    return modified_at < time.time() - _PARTIAL_S


def _read_file(descriptor: int, size: int) -> bytes:
    """Read a whole file; a file object would cost more than the reading."""
    content = os.read(descriptor, size)
    while len(content) < size and (more := os.read(descriptor, size - len(content))):
        content += more  # beyond 2 GiB, or interrupted
    return content


class RedisStore(CacheStore):
    """`CacheStore` in Redis 6 or newer; connects on first use."""

    def __init__(self, url: str, max_bytes: int, *, ttl_s: float | None, timeout_s: float) -> None:
        # Here, as fsspec below: redis takes a tenth of the start of each process of the pool.
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._where = redact(url)
        super().__init__(max_bytes)
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
            pipeline.mget([self._name(key) for key in keys])
            if self._ttl_ms:
                for key in keys:
                    pipeline.pexpire(self._name(key), self._ttl_ms)
            values = pipeline.execute()[0]
        return {k: bytes(v) for k, v in zip(keys, values, strict=True) if v is not None}

    def put(self, key: str, value: bytes) -> None:
        with self._edge():
            self._client.set(self._name(key), value, px=self._ttl_ms or None)

    def close(self) -> None:
        self._client.close()

    def _name(self, key: str) -> str:
        return f"insighttag:features:{key}"

    def _entries(self) -> Iterator[StoredEntry]:
        """Yield all entries; the less time one has to live, the longer ago was its last use."""
        cursor = 0
        while True:
            with self._edge():
                cursor, keys = self._client.scan(cursor, match=self._name("*"), count=_KEYS_A_TRIP)
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

    def _remove(self, names: Sequence[str]) -> None:
        for start in range(0, len(names), _KEYS_A_TRIP):
            with self._edge():
                self._client.unlink(*names[start : start + _KEYS_A_TRIP])

    @contextlib.contextmanager
    def _edge(self) -> Iterator[None]:
        from redis.exceptions import AuthenticationError, RedisError

        try:
            yield
        except AuthenticationError as error:
            raise CacheUnavailable(f"{self._where} refuses the password") from error
        except (RedisError, OSError) as error:
            raise CacheUnavailable(f"{self._where}: {one_line(error, 200)}") from error


class RemoteStore(CacheStore):
    """`CacheStore` on an fsspec file system."""

    def __init__(
        self, url: str, max_bytes: int, options: Mapping[str, Any], *, timeout_s: float
    ) -> None:
        """Describe it; reaches nothing.

        Raises:
            ValueError: fsspec does not know the scheme, or cannot read the URL.
            ImportError: The scheme's package is not installed.
        """
        import fsspec
        from fsspec.core import url_to_fs

        own: dict[str, Any] = {"use_listings_cache": False}
        if url.startswith(("s3://", "s3a://")):
            limits = {"connect_timeout": timeout_s, "read_timeout": timeout_s}
            own["config_kwargs"] = {**limits, "retries": {"max_attempts": 1}}
        fsspec.get_filesystem_class(url.partition("://")[0])
        self._fs, root = url_to_fs(url, **{**own, **options})
        self._root = str(root).rstrip("/")
        self._where = redact(url)
        super().__init__(max_bytes)

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        paths = {self._name(key): key for key in keys}
        if not paths:
            return {}
        with self._edge():
            contents = self._fs.cat(list(paths), on_error="return")
        by_name = {self._strip(path): content for path, content in contents.items()}
        values: dict[str, bytes] = {}
        for path, key in paths.items():
            content = by_name.get(self._strip(path))
            if isinstance(content, bytes):
                values[key] = content
            elif content is not None and not isinstance(content, FileNotFoundError):
                raise self._unavailable(content) from content
        return values

    def put(self, key: str, value: bytes) -> None:
        with self._edge():
            try:
                self._fs.pipe_file(self._name(key), value)
            except FileNotFoundError:  # a file system with real folders
                self._fs.makedirs(f"{self._root}/{key[:2]}", exist_ok=True)
                self._fs.pipe_file(self._name(key), value)

    def _name(self, key: str) -> str:
        return f"{self._root}/{key[:2]}/{key[2:]}"

    @staticmethod
    def _strip(path: str) -> str:
        """Return shard and name: paths come back with or without a protocol."""
        return "/".join(path.rsplit("/", 2)[-2:])

    def _entries(self) -> list[StoredEntry]:
        with self._edge():
            try:
                files = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                return []
        return [
            StoredEntry(str(path), int(info.get("size") or 0), _time(info))
            for path, info in files.items()
            if self._is_ours(str(path))
        ]

    def _is_ours(self, path: str) -> bool:
        """Tell whether it is an entry directly below our root; deeper down it belongs to others."""
        strip = self._fs._strip_protocol
        folder = str(strip(path)).rpartition("/")[0].rpartition("/")[0]
        return _is_entry(path) and folder == str(strip(self._root)).rstrip("/")

    def _remove(self, names: Sequence[str]) -> None:
        for start in range(0, len(names), _FILES_A_TRIP):
            with self._edge():
                try:
                    self._fs.rm(list(names[start : start + _FILES_A_TRIP]))
                except FileNotFoundError:
                    for path in names[start : start + _FILES_A_TRIP]:
                        with contextlib.suppress(FileNotFoundError):
                            self._fs.rm_file(path)

    @contextlib.contextmanager
    def _edge(self) -> Iterator[None]:
        """Join the errors of all file systems, which have no base class in common."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: BaseException) -> CacheUnavailable:
        reason = one_line(error, 200)
        return CacheUnavailable(f"{self._where}: {reason}")


def _time(info: Mapping[str, Any]) -> float:
    value = next((info[name] for name in _TIMES if info.get(name)), 0.0)
    return value.timestamp() if isinstance(value, datetime) else float(value)
