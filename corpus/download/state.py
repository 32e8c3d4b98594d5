"""The result of each URL, in a SQLite file that survives a kill, written by one process."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from common.errors import ConfigError
from common.post import MEDIA_KINDS
from corpus.databases import open_state
from corpus.download.values import Status, UrlResult

_VERSION = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS urls (
    key BLOB PRIMARY KEY, status TEXT NOT NULL, run INTEGER NOT NULL, sha256 BLOB NOT NULL,
    extension TEXT NOT NULL, size_bytes INTEGER NOT NULL, kinds TEXT NOT NULL,
    what TEXT NOT NULL, type TEXT NOT NULL, message TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
"""
_COLUMNS = "status, run, sha256, extension, size_bytes, kinds, what, type, message"


class State:
    """The URLs of one output folder; closed at the end, or left to a kill.

    Everything raises `ConfigError` when the file is damaged, and OSError when the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._edge():
            self._db = open_state(path, _TABLES, _VERSION)
            self.run = self._next_run()

    def get(self, key: str) -> UrlResult | None:
        """Return what a URL gave; None when it was never asked for."""
        row = self._row(key)
        return None if row is None else _result_of_row(row)

    def settled(self, key: str) -> tuple[UrlResult, bool] | None:
        """Return what a URL gave, and True if in this run; None where a try is worth it."""
        row = self._row(key)
        if row is None or (row[0] == "retryable" and row[1] < self.run):
            return None
        return _result_of_row(row), row[1] == self.run

    def put(self, results: Iterable[tuple[str, UrlResult]]) -> None:
        """Keep results, in one transaction."""
        insert = (
            f"INSERT OR REPLACE INTO urls (key, {_COLUMNS}) "  # noqa: S608 - our constant
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        )
        with self._edge(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(insert, (_row(key, self.run, result) for key, result in results))

    def forget(self, key: str) -> None:
        """Ask for a URL again: its file is gone or broken."""
        with self._edge():
            self._db.execute("DELETE FROM urls WHERE key = ?", (bytes.fromhex(key),))

    def forget_refused(self) -> None:
        """Ask again for all that was refused."""
        with self._edge():
            self._db.execute("DELETE FROM urls WHERE status = 'refused'")

    def totals(self) -> tuple[int, int]:
        """Count the distinct contents, and their bytes."""
        with self._edge():
            cursor = self._db.execute(
                "SELECT COUNT(*), COALESCE(SUM(size_bytes), 0) FROM "
                "(SELECT DISTINCT sha256, size_bytes FROM urls WHERE status = 'ok')"
            )
            files, size_bytes = cursor.fetchone()
        return int(files), int(size_bytes)

    def close(self) -> None:
        with suppress(sqlite3.Error):
            self._db.close()

    def _row(self, key: str) -> tuple[Any, ...] | None:
        with self._edge():
            cursor = self._db.execute(
                f"SELECT {_COLUMNS} FROM urls WHERE key = ?",  # noqa: S608 - our constant
                (bytes.fromhex(key),),
            )
            return cast("tuple[Any, ...] | None", cursor.fetchone())

    def _next_run(self) -> int:
        self._db.execute(
            "INSERT INTO facts VALUES ('run', 1) ON CONFLICT(name) DO UPDATE SET value = value + 1"
        )
        (run,) = self._db.execute("SELECT value FROM facts WHERE name = 'run'").fetchone()
        return int(run)

    @contextmanager
    def _edge(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(f"{self._path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                f"{self._path}: not the state of a download, or damaged ({error}); "
                "delete it to verify everything again"
            ) from error


def _row(key: str, run: int, result: UrlResult) -> tuple[Any, ...]:
    return (
        bytes.fromhex(key),
        result.status,
        run,
        bytes.fromhex(result.sha256),
        result.extension,
        result.size_bytes,
        ",".join(kind for kind in MEDIA_KINDS if kind in result.kinds),
        result.what,
        *result.reason,
    )


def _result_of_row(row: tuple[Any, ...]) -> UrlResult:
    status, _, sha256, extension, size_bytes, kinds, what, kind, message = row
    return UrlResult(
        cast(Status, status),
        sha256=bytes(sha256).hex(),
        extension=extension,
        size_bytes=size_bytes,
        kinds=frozenset(kind for kind in MEDIA_KINDS if kind in kinds.split(",")),
        what=what,
        reason=(kind, message),
    )
