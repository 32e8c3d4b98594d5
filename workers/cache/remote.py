"""Entries in any file system that fsspec reaches: S3 and its like, GCS, Azure, HDFS, memory.

Nothing is evicted here: a life-cycle rule of the bucket bounds it, or ``insighttag cache prune``,
which deletes the entries that were written first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from common.errors import CacheUnavailable, one_line
from common.urls import redact
from workers.cache.base import Stats, StoredEntry, is_entry, oldest_beyond

_BATCH = 500
"""Files of one delete request. S3 takes 1000 at once; with fewer, pruning a full bucket would take
as many more round trips."""

_TIMES = ("LastModified", "mtime", "updated", "last_modified", "created")


class RemoteStore:
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
        self._max_bytes = max_bytes

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        paths = {self._path(key): key for key in keys}
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
                self._fs.pipe_file(self._path(key), value)
            except FileNotFoundError:  # a file system with real folders
                self._fs.makedirs(f"{self._root}/{key[:2]}", exist_ok=True)
                self._fs.pipe_file(self._path(key), value)

    def delete(self, keys: Iterable[str]) -> None:
        self._remove([self._path(key) for key in keys])

    def stats(self) -> Stats:
        entries = self._entries()
        return Stats(len(entries), sum(entry.size for entry in entries), self._max_bytes)

    def prune(self, max_bytes: int) -> Stats:
        oldest = oldest_beyond(self._entries(), max_bytes)
        self._remove([entry.name for entry in oldest])
        return Stats(len(oldest), sum(entry.size for entry in oldest), self._max_bytes)

    def close(self) -> None:
        """Do nothing: fsspec keeps its own connections."""

    def _path(self, key: str) -> str:
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
        return is_entry(path) and folder == str(strip(self._root)).rstrip("/")

    def _remove(self, paths: Sequence[str]) -> None:
        for start in range(0, len(paths), _BATCH):
            with self._edge():
                try:
                    self._fs.rm(list(paths[start : start + _BATCH]))
                except FileNotFoundError:
                    for path in paths[start : start + _BATCH]:
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
