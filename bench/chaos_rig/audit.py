"""A change counter inside the database: every result that a post has ever had.

nx-27017 keeps its documents in SQLite. A trigger on the table of the posts copies each changed
result into a table of our own, within the very transaction that changes it. So nothing that is
written can miss it: not by a King that is killed before it logs, not over a connection that the
proxies have cut. The same result written again (after a lost reply) is no change and no row.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

_TABLE = """
CREATE TABLE chaos_audit (number INTEGER PRIMARY KEY, post TEXT, status TEXT, version TEXT)
"""
_TRIGGER = """
CREATE TRIGGER chaos_audit_update AFTER UPDATE ON {posts}
WHEN json_extract(json(NEW.data), '$.{path}') IS NOT json_extract(json(OLD.data), '$.{path}')
BEGIN
  INSERT INTO chaos_audit (post, status, version) VALUES (
    NEW._id,
    json_extract(json(NEW.data), '$.{path}.status'),
    json_extract(json(NEW.data), '$.{path}.version'));
END
"""


class Audit:
    """The rows of the trigger."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def install(self, collection: str, result_path: str) -> None:
        """Add table and trigger; the posts' table must be there."""
        with self._open() as database:
            database.execute(_TABLE)
            database.execute(_TRIGGER.format(posts=collection, path=result_path))

    @property
    def rows(self) -> int:
        """Return the number of results that were written up to now."""
        with self._open() as database:
            row = database.execute("SELECT max(number) FROM chaos_audit").fetchone()
        return int(row[0] or 0)

    def tagged_twice(self) -> set[str]:
        """Return posts whose result was changed after they had been tagged, by the same bundle."""
        with self._open() as database:
            rows = database.execute(
                "SELECT post, status, version FROM chaos_audit ORDER BY number"
            ).fetchall()
        histories: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for post, status, version in rows:
            histories[_plain(post)].append((status, version))
        twice = set()
        for post_id, history in histories.items():
            for i, (status, version) in enumerate(history[:-1]):
                if status == "tagged" and any(v == version for _, v in history[i + 1 :]):
                    twice.add(post_id)
        return twice

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self._file, timeout=10)
        try:
            with database:
                yield database
        finally:
            database.close()


def _plain(post: str) -> str:
    try:
        return str(json.loads(post))
    except ValueError:
        return str(post)
