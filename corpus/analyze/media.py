"""Facts about the media of a corpus, in a SQLite file that survives a kill.

A file is hashed and measured once: later runs, and runs after a kill, take what is there. Files
that a manifest names are known by its hashes; others are measured anew when size or time change.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.post import MediaKind, Post
from common.urls import is_url
from corpus.analyze.measure import Measured, MediaFact, Task, class_of, measure_all
from corpus.databases import open_state
from fusion.data.data_file import local_path

_VERSION = 1
_COMMIT_S, _COMMIT_FILES = 0.5, 16  # whichever comes first
_MAX_ASKED = 4096  # far more than are in flight
_TABLES = """
CREATE TABLE IF NOT EXISTS files (
    name TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    sha256 TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (
    sha256 TEXT, kind TEXT, size_bytes INTEGER, reason TEXT, width INTEGER, height INTEGER,
    duration_s REAL, codec TEXT, sound TEXT, look BLOB, PRIMARY KEY (sha256, kind)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sources (
    source TEXT, kind TEXT, path TEXT, sha256 TEXT, reason TEXT, PRIMARY KEY (source, kind)
) WITHOUT ROWID;
CREATE TEMP TABLE unreadable (name TEXT PRIMARY KEY, reason TEXT) WITHOUT ROWID;
"""
NOT_DOWNLOADED, NO_FILE = "not downloaded", "no such file"


class MediaBase:
    """The media of one corpus, and how many this process has hashed and measured.

    `folder` is the output of ``download_mp`` with its manifest, or any folder of media; local
    sources may lie relative to the posts file, too.
    """

    def __init__(self, state: Path, posts: Path, folder: Path) -> None:
        self._posts, self._folder = posts, folder
        self._manifest = folder / "manifest.jsonl"
        self.measured = 0
        try:
            self._base = open_state(state, _TABLES, _VERSION)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{state}: not a state file ({error}); delete it") from error

    def read_manifest(self, tick: Callable[[], None]) -> None:
        """Take over what the manifest says, where there is one."""
        self._base.execute("BEGIN")
        self._base.execute("DELETE FROM sources")
        for number, line in enumerate(self._manifest_lines(), 1):
            tick()
            try:
                self._base.executemany(
                    # A source that failed once and was there once, was there.
                    "INSERT INTO sources VALUES (?, ?, ?, ?, ?) ON CONFLICT(source, kind) "
                    "DO UPDATE SET path = excluded.path, sha256 = excluded.sha256, "
                    "reason = excluded.reason WHERE excluded.sha256 != ''",
                    _rows(json.loads(line)),
                )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{self._manifest}: line {number}: {error!r}") from error
        self._base.execute("COMMIT")

    def measure(self, posts: Iterable[Post], processes: int) -> None:
        """Measure every file of some posts that is not known yet."""
        self._base.execute("BEGIN")
        since = time.monotonic()
        try:
            for result in measure_all(self._unknown(posts), processes):
                if isinstance(result, Measured):
                    self._keep(result)
                else:
                    row = (result.task.name, class_of(result.reason))
                    self._base.execute("INSERT OR REPLACE INTO unreadable VALUES (?, ?)", row)
                if not self.measured % _COMMIT_FILES or time.monotonic() - since > _COMMIT_S:
                    self._base.execute("COMMIT")
                    self._base.execute("BEGIN")
                    since = time.monotonic()
        finally:
            with suppress(sqlite3.Error):
                self._base.execute("COMMIT")

    def fact(self, source: str, kind: MediaKind) -> MediaFact:
        """Return what is known of a source that a post uses as `kind`."""
        located = self._locate(source, kind)
        if isinstance(located, MediaFact):
            return located
        row = self._row(located.sha256 or self._known(located), kind)
        if row is not None:
            return MediaFact(*row)
        query = "SELECT reason FROM unreadable WHERE name = ?"
        reason = self._base.execute(query, (located.name,)).fetchone()
        return MediaFact("", kind, reason=NO_FILE if reason is None else reason[0])

    def path_of(self, source: str, kind: MediaKind) -> Path | None:
        """Return where the file of a source lies; None where none is."""
        located = self._locate(source, kind)
        return located.path if isinstance(located, Task) else None

    def any_fact(self, source: str) -> MediaFact | None:
        """Return what is known of a source, whatever it is used as."""
        facts = (self.fact(source, kind) for kind in ("image", "video", "audio"))
        return next((fact for fact in facts if fact.sha256), None)

    def close(self) -> None:
        with suppress(sqlite3.Error):
            self._base.close()

    def _manifest_lines(self) -> Iterator[str]:
        try:
            with self._manifest.open(encoding="utf-8") as file:
                yield from file
        except FileNotFoundError:
            return
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._manifest}: cannot be read: {error}") from error

    def _unknown(self, posts: Iterable[Post]) -> Iterator[Task]:
        asked: dict[tuple[str, str], None] = {}  # in flight, and not in the tables yet
        for post in posts:
            for media in post.media:
                task = self._locate(media.source, media.kind)
                if isinstance(task, MediaFact) or (task.name, task.kind) in asked:
                    continue
                sha256 = task.sha256 or self._known(task)
                if self._row(sha256, task.kind) is None and task.path.is_file():
                    asked[task.name, task.kind] = None
                    if len(asked) > _MAX_ASKED:
                        asked.pop(next(iter(asked)))
                    yield replace(task, sha256=sha256)

    def _locate(self, source: str, kind: MediaKind) -> Task | MediaFact:
        row = self._base.execute(
            "SELECT path, sha256, reason FROM sources WHERE source = ? AND kind = ?", (source, kind)
        ).fetchone()
        if row is not None:
            path, sha256, reason = row
            if reason:
                return MediaFact("", kind, reason=reason)
            return Task(path, self._folder / path, kind, sha256)
        if is_url(source) or "\0" in source:
            return MediaFact("", kind, reason=NOT_DOWNLOADED)
        beside = self._folder / source
        try:
            path = beside if beside.exists() else local_path(source, self._posts) or beside
        except OSError:  # a name that is too long for the file system
            return MediaFact("", kind, reason=NO_FILE)
        return Task(os.path.abspath(path), path, kind)  # noqa: PTH100 - links stay as they are

    def _known(self, task: Task) -> str:
        """Return the hash of a file that is unchanged since it was measured; empty for others."""
        row = self._base.execute(
            "SELECT sha256, size_bytes, mtime_ns FROM files WHERE name = ?", (task.name,)
        ).fetchone()
        if row is None:
            return ""
        try:
            stat = task.path.stat()
        except OSError:
            return ""
        return str(row[0]) if (stat.st_size, stat.st_mtime_ns) == tuple(row[1:]) else ""

    def _row(self, sha256: str, kind: str) -> tuple[Any, ...] | None:
        query = "SELECT * FROM facts WHERE sha256 = ? AND kind = ?"
        row: tuple[Any, ...] | None = self._base.execute(query, (sha256, kind)).fetchone()
        return row

    def _keep(self, measured: Measured) -> None:
        self.measured += 1
        if not measured.task.sha256:
            fact = measured.fact
            row = (measured.task.name, fact.size_bytes, measured.mtime_ns, fact.sha256)
            self._base.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", row)
        insert = "INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        self._base.execute(insert, astuple(measured.fact))


def _rows(line: dict[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield rows of a line of the manifest: by its source, and by its path in local posts."""
    kind = str(line["kind"])
    if line["status"] == "ok":
        path, sha256 = str(line["path"]), str(line["sha256"])
        bytes.fromhex(sha256)
        yield str(line["source"]), kind, path, sha256, ""
        yield path, kind, path, sha256, ""
    else:
        why = line["reason"]
        reason = class_of(f"{why['type']}: {why['message']}")
        yield str(line["source"]), kind, "", "", reason
