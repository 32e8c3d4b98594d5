"""The result of each URL, in a SQLite file that survives a kill, written by one process."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from common.errors import ConfigError
from corpus.databases import open_state
from corpus.download.values import UrlResult

_VERSION = 2
_TABLES = """
CREATE TABLE IF NOT EXISTS urls (
    key BLOB PRIMARY KEY, status TEXT NOT NULL, run INTEGER NOT NULL, result BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
"""
# Of equal contents equal texts: `totals` counts them.
_encode = msgspec.json.Encoder(order="deterministic").encode
_decode = msgspec.json.Decoder(UrlResult).decode


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
        return row and row[0]

    def settled(self, key: str) -> tuple[UrlResult, bool] | None:
        """Return what a URL gave, and True if in this run; None where a try is worth it."""
        row = self._row(key)
        if row is None or (row[0].status == "retryable" and not row[1]):
            return None
        return row

    def put(self, results: Iterable[tuple[str, UrlResult]]) -> None:
        """Keep results, in one transaction."""
        rows = ((bytes.fromhex(key), r.status, self.run, _encode(r)) for key, r in results)
        with self._edge(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR REPLACE INTO urls VALUES (?, ?, ?, ?)", rows)

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
                "SELECT COUNT(*), COALESCE(SUM(json_extract(result, '$.size_bytes')), 0) FROM "
                "(SELECT DISTINCT CAST(result AS TEXT) AS result FROM urls WHERE status = 'ok')"
            )
            files, size_bytes = cursor.fetchone()
        return int(files), int(size_bytes)

    def close(self) -> None:
        with suppress(sqlite3.Error):
            self._db.close()

    def _row(self, key: str) -> tuple[UrlResult, bool] | None:
        query = "SELECT result, run FROM urls WHERE key = ?"
        with self._edge():
            row = self._db.execute(query, (bytes.fromhex(key),)).fetchone()
            return None if row is None else (_decode(row[0]), row[1] == self.run)

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
        except (sqlite3.DatabaseError, msgspec.MsgspecError) as error:
            raise ConfigError(
                f"{self._path}: not the state of a download, or damaged ({error}); "
                "delete it to verify everything again"
            ) from error
