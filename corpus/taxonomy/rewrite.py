"""Data files that follow a label map's changes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import file_digest, part_of, publish, write_whole
from config.labels import LabelMap
from corpus.lines import AtomicLines, DataFile
from corpus.taxonomy.migrations import Migration


@dataclass(frozen=True)
class Applied:
    """What became of one data file.

    Attributes:
        posts: All of them.
        changed: Those whose labels changed.
        bare: Those without a label now; they stay in the file.
        relabel: Those that carried a tag that was split, and that nobody has said more of.
        version: Of the label map that the file follows now.
    """

    posts: int
    changed: int
    bare: int
    relabel: int
    version: int


def note_path(data: Path) -> Path:
    """Where it stands which version of the label map a data file follows."""
    return data.with_name(f"{data.name}.taxonomy.json")


def relabel_path(data: Path) -> Path:
    """The posts that people must look at after a split."""
    return data.with_name(f"{data.stem}.relabel.jsonl")


def followed_version(data: Path) -> int:
    """The version that a data file follows; 0 when it was never rewritten.

    Raises:
        ConfigError: The note is broken.
    """
    note = _note(data)
    if note.get("pending_sha256") and _digest(data) == note["pending_sha256"]:
        return int(note["pending_version"])
    return int(note.get("version", 0))


def apply(
    data: Path, migrations: Sequence[Migration], by_post: Mapping[str, Sequence[str]]
) -> Applied:
    """Rewrite the labels of a data file by the changes that it has not seen.

    The note of the coming content is written before the file takes its place: killed at any
    moment, the next run knows whether the change was made.

    Args:
        data: ``*.json``, a list, or ``*.jsonl``.
        migrations: All changes of the map, oldest first.
        by_post: post_id -> the parts that it has of tags that were split, now or before.

    Raises:
        ConfigError: The file cannot be read or written.
    """
    before, after = followed_version(data), len(migrations)
    if before > after:
        raise ConfigError(f"{data}: follows version {before}, the label map has only {after}")
    if before == after and not by_post:
        return Applied(0, 0, 0, 0, after)
    answers = {post_id: _said(names, migrations) for post_id, names in by_post.items()}
    asked = [row for row in _asked(data) if not answers.get(str(row["post_id"]))]
    counts = {"posts": 0, "changed": 0, "bare": 0, "relabel": 0}
    part = part_of(data)
    try:
        with AtomicLines(relabel_path(data)) as relabel, AtomicLines(part) as out:
            for row in asked:
                relabel.write(json.dumps(row, ensure_ascii=False))
            lines = _rewritten(data, migrations[before:], answers, counts, relabel)
            file = DataFile(out, "json" if data.suffix.lower() == ".json" else "jsonl")
            for line in lines:
                file.add(line)
            file.end()
        _finish(data, part, before, after)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"{data}: cannot be rewritten: {error.strerror or error}") from error
    if not counts["relabel"] and not asked:
        relabel_path(data).unlink(missing_ok=True)
    return Applied(**counts, version=after)


def _finish(data: Path, part: Path, before: int, after: int) -> None:
    note = {"version": before, "pending_version": after, "pending_sha256": file_digest(part)}
    write_whole(note_path(data), json.dumps(note))
    publish(part, data)
    write_whole(note_path(data), json.dumps({"version": after}))


def _said(names: Sequence[str], migrations: Sequence[Migration]) -> list[str]:
    """What people said of a post, as those tags are called by now; other tags do not count."""
    now: list[str] = []
    for migration in migrations:
        if migration.operation == "split":
            parts = [name for name in names if name in migration.new]
            now += follow(parts, migrations[migration.version :])[0]
    return list(dict.fromkeys(now))


def _asked(data: Path) -> list[dict[str, Any]]:
    """Posts that an earlier run has listed for people to look at."""
    path = relabel_path(data)
    return list(_entries(path)) if path.exists() else []


def _rewritten(
    data: Path,
    migrations: Sequence[Migration],
    answers: Mapping[str, Sequence[str]],
    counts: dict[str, int],
    relabel: AtomicLines,
) -> Iterator[dict[str, Any]]:
    for entry in _entries(data):
        before = [str(name) for name in entry.get("labels") or []]
        answer = answers.get(str(entry.get("post_id")), ())
        followed, unsaid = follow(before, migrations)
        labels = list(dict.fromkeys([*followed, *answer]))
        counts["posts"] += 1
        counts["changed"] += labels != before
        counts["bare"] += bool(before) and not labels
        if unsaid and not answer:
            counts["relabel"] += 1
            note = {"post_id": entry.get("post_id"), "labels": labels, "split": unsaid}
            relabel.write(json.dumps(note, ensure_ascii=False))
        yield {**entry, "labels": labels}


def follow(labels: Sequence[str], migrations: Sequence[Migration]) -> tuple[list[str], list[str]]:
    """Labels after some changes, oldest first, and those that a split has taken away."""
    now, gone = list(labels), []
    for migration in migrations:
        touched = [name for name in now if name in migration.old]
        if not touched:
            continue
        if migration.operation == "split":
            gone += touched
        new = () if migration.operation == "split" else migration.new
        rest = [name for name in now if name not in migration.old]
        ahead = sum(name in rest for name in now[: now.index(touched[0])])
        now = list(dict.fromkeys([*rest[:ahead], *new, *rest[ahead:]]))
    return now, gone


def read_by_post(
    path: Path | None, labels: LabelMap, migrations: Sequence[Migration]
) -> dict[str, list[str]]:
    """``{post_id, labels}`` lines: what people said of the posts whose tag was split.

    Raises:
        ConfigError: The file cannot be read, or names a tag that never was.
    """
    if path is None:
        return {}
    known = {*labels.names, *(name for m in migrations for name in (*m.old, *m.new))}
    said = {str(entry["post_id"]): list(entry.get("labels") or []) for entry in _entries(path)}
    for post_id, names in said.items():
        for name in names:
            if name not in known:
                raise ConfigError(f"{path}: post {post_id!r}: tag {name!r} is not in the label map")
    return said


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """Entries of a list or of JSON lines, all their keys kept."""
    try:
        if path.suffix.lower() == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, list):
                raise ConfigError(f"{path}: must be a list of posts")
            yield from (_checked(entry, f"{path}: entry {i}") for i, entry in enumerate(content))
            return
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _checked(json.loads(line), f"{path}: line {number}")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such data file") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error


def _checked(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get("post_id"), str):
        raise ConfigError(f"{where}: must have a post_id, a text")
    if not isinstance(entry.get("labels") or [], list):
        raise ConfigError(f"{where}: labels must be a list")
    return entry


def _note(data: Path) -> dict[str, Any]:
    path = note_path(data)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be an object with a version")
    return content


def _digest(data: Path) -> str:
    try:
        return file_digest(data)
    except FileNotFoundError as error:
        raise ConfigError(f"{data}: no such data file") from error
