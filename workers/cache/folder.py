"""Entries as files: ``<root>/<first two hex of the key>/<the rest>``.

A file appears by rename, so that readers and a kill meet it whole or not at all. It is not pushed
to the disk: what a power cut leaves in pieces does not fit its digest, and is a miss.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from common.errors import CacheUnavailable
from workers.cache.base import Stats
from workers.cache.eviction import SHARDS, Evictor, Held, evict, is_entry

_PARTIAL = ".partial"
_PART = re.compile(r"[0-9a-f]{16}\.partial")
_PARTIAL_S = 3600.0
_TOUCH_S = 3600.0
"""A file's time is renewed by use at most this often: LRU to the hour for a tenth of the cost."""


class FolderStore:
    """`CacheStore` in a folder, which is made with the first entry."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        """Describe it; touches nothing."""
        self._root = str(root)
        self._max_bytes = max_bytes
        self._evictor = Evictor(max_bytes, self._held, self._unlink)

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """See `CacheStore.get_many`."""
        found: dict[str, bytes] = {}
        for key in keys:
            path = self._path(key)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise _unavailable(self._root, error) from error
            try:
                facts = os.fstat(descriptor)
                found[key] = _read(descriptor, facts.st_size)
                if facts.st_mtime < time.time() - _TOUCH_S:
                    with contextlib.suppress(OSError):  # a read-only cache serves too
                        os.utime(path)
            except OSError as error:
                raise _unavailable(self._root, error) from error
            finally:
                os.close(descriptor)
        return found

    def put(self, key: str, value: bytes) -> None:
        """See `CacheStore.put`."""
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
            raise _unavailable(self._root, error) from error
        self._evictor.put(key[:2], len(value))

    def delete(self, keys: Iterable[str]) -> None:
        """See `CacheStore.delete`."""
        self._unlink([self._path(key) for key in keys])

    def stats(self) -> Stats:
        """See `CacheStore.stats`."""
        entries = total = 0
        for held in self._all():
            entries, total = entries + 1, total + held.size
        return Stats(entries, total, self._max_bytes)

    def prune(self, max_bytes: int) -> Stats:
        """See `CacheStore.prune`."""
        return Stats(*evict(list(self._all()), max_bytes, self._unlink), self._max_bytes)

    def close(self) -> None:
        """Nothing to close."""

    # Parts ------------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        return f"{self._root}/{key[:2]}/{key[2:]}"

    def _write(self, path: str, value: bytes) -> None:
        with open(path, "xb", buffering=0) as file:  # noqa: PTH123  ten thousand a minute
            # A full disk or a limit may take a part and say nothing; the next write then tells.
            rest = memoryview(value)
            while rest and (written := file.write(rest)):
                rest = rest[written:]
        if rest:
            raise OSError(errno.EIO, f"{len(rest)} bytes could not be written")

    def _all(self) -> Iterator[Held]:
        for shard in SHARDS:
            yield from self._held(shard)

    def _held(self, shard: str) -> Iterator[Held]:
        """The entries of a shard; removes what a killed writer has left."""
        try:
            with os.scandir(f"{self._root}/{shard}") as files:
                for file in files:
                    with contextlib.suppress(FileNotFoundError):  # another process evicts too
                        facts = file.stat(follow_symlinks=False)
                        if is_entry(f"{shard}/{file.name}"):
                            yield Held(file.path, facts.st_size, facts.st_mtime)
                        elif _PART.fullmatch(file.name) and _old(facts.st_mtime):
                            Path(file.path).unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unavailable(self._root, error) from error

    def _unlink(self, paths: Sequence[str]) -> None:
        for path in paths:
            try:
                Path(path).unlink(missing_ok=True)
            except OSError as error:
                raise _unavailable(self._root, error) from error


def _old(modified_at: float) -> bool:
    return modified_at < time.time() - _PARTIAL_S


def _read(descriptor: int, size: int) -> bytes:
    """A whole file; a file object would cost more than the reading."""
    content = os.read(descriptor, size)
    while len(content) < size and (more := os.read(descriptor, size - len(content))):
        content += more  # beyond 2 GiB, or interrupted
    return content


def _unavailable(root: str, error: OSError) -> CacheUnavailable:
    return CacheUnavailable(f"{root}: {error.strerror or error}")
