"""Entries as files: ``<root>/<first two hex of the key>/<the rest>``.

A file appears by rename, so that readers and a kill meet it whole or not at all. It is not pushed
to the disk: an entry that a power cut has damaged does not fit its digest, and is a miss.
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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from common.errors import CacheUnavailable
from workers.cache.base import Stats, StoredEntry, is_entry, oldest_beyond

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


class FolderStore:
    """`CacheStore` in a folder, which is made with the first entry."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        """Describe it; touches nothing."""
        self._root = str(root)
        self._max_bytes = max_bytes
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
            path = self._path(key)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self._unavailable(error) from error
            try:
                stat = os.fstat(descriptor)
                values[key] = _read(descriptor, stat.st_size)
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
            os.rename(partial, self._path(key))  # noqa: PTH104  as below
        except OSError as error:
            with contextlib.suppress(OSError):
                Path(partial).unlink()
            raise self._unavailable(error) from error
        self._sweep_when_due(len(value))

    def delete(self, keys: Iterable[str]) -> None:
        self._unlink(self._path(key) for key in keys)

    def stats(self) -> Stats:
        entries = total = 0
        for entry in self._entries(_SHARDS):
            entries, total = entries + 1, total + entry.size
        return Stats(entries, total, self._max_bytes)

    def prune(self, max_bytes: int) -> Stats:
        return self._evict(list(self._entries(_SHARDS)), max_bytes)

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def _path(self, key: str) -> str:
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

    def _evict(self, entries: Sequence[StoredEntry], max_bytes: int) -> Stats:
        oldest = oldest_beyond(entries, max_bytes)
        self._unlink(entry.name for entry in oldest)
        return Stats(len(oldest), sum(entry.size for entry in oldest), self._max_bytes)

    def _entries(self, shards: Iterable[str]) -> Iterator[StoredEntry]:
        """Yield the entries of some shards; removes partial files of killed writers."""
        for shard in shards:
            try:
                with os.scandir(f"{self._root}/{shard}") as files:
                    for file in files:
                        with contextlib.suppress(FileNotFoundError):  # another process evicts too
                            stat = file.stat(follow_symlinks=False)
                            if is_entry(f"{shard}/{file.name}"):
                                yield StoredEntry(file.path, stat.st_size, stat.st_mtime)
                            elif _PART.fullmatch(file.name) and _is_old(stat.st_mtime):
                                Path(file.path).unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self._unavailable(error) from error

    def _unlink(self, paths: Iterable[str]) -> None:
        for path in paths:
            try:
                Path(path).unlink(missing_ok=True)
            except OSError as error:
                raise self._unavailable(error) from error

    def _unavailable(self, error: OSError) -> CacheUnavailable:
        return CacheUnavailable(f"{self._root}: {error.strerror or error}")


def _is_old(modified_at: float) -> bool:
    return modified_at < time.time() - _PARTIAL_S


def _read(descriptor: int, size: int) -> bytes:
    """Read a whole file; a file object would cost more than the reading."""
    content = os.read(descriptor, size)
    while len(content) < size and (more := os.read(descriptor, size - len(content))):
        content += more  # beyond 2 GiB, or interrupted
    return content
