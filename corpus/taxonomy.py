"""Changes of the taxonomy: label maps, and data files that follow them from version to version.

The changes of a map stand next to it, ``<map>.migrations.jsonl``, one JSON object a line, only ever
appended: ``{version, operation, from: [name], to: [name], ids: {old id: new id | null}, before}``.
The ids of a map run from 0 without gaps, because a model has an output for each; a change therefore
renumbers, and ``ids`` says how. The map's version is the number of lines.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from common.errors import ConfigError
from common.files import file_digest, part_of, publish, write_whole
from config.labels import LabelMap
from corpus.records import AtomicLines, DataFile
from fusion.data.data_file import BadLine, objects, read_posts, record_of

Operation = Literal["rename", "merge", "split", "retire"]


@dataclass(frozen=True)
class Migration:
    """One change of a label map, to `version` (from 1).

    Attributes:
        old: Names that it takes away.
        new: Names that stand for them; of a split at least two, of a retirement none.
        ids: Index before -> index after, None where the tag is gone.
        before: sha256 of the map's names before it.
    """

    version: int
    operation: Operation
    old: tuple[str, ...]
    new: tuple[str, ...]
    ids: tuple[int | None, ...]
    before: str = ""

    def line(self) -> str:
        """Return the migration as a line of the record."""
        content = {
            "version": self.version,
            "operation": self.operation,
            "from": list(self.old),
            "to": list(self.new),
            "ids": {str(before): after for before, after in enumerate(self.ids)},
            "before": self.before,
        }
        return json.dumps(content, ensure_ascii=False)


def migrations_path(labels: Path) -> Path:
    return labels.with_name(f"{labels.stem}.migrations.jsonl")


def read_migrations(labels: Path) -> tuple[Migration, ...]:
    """Read the changes of a label map, oldest first."""
    path = migrations_path(labels)
    if not path.exists():
        return ()
    migrations = tuple(_parse(content, where) for where, content in objects(path))
    for number, migration in enumerate(migrations, 1):
        if migration.version != number:
            raise ConfigError(f"{path}: line {number}: version {migration.version} is out of order")
    return migrations


def _parse(content: Mapping[str, Any], where: str) -> Migration:
    try:
        if content["operation"] not in get_args(Operation):
            raise ValueError(f"operation {content['operation']!r}")
        ids = content["ids"]
        return Migration(
            int(content["version"]),
            cast("Operation", content["operation"]),
            tuple(str(name) for name in content["from"]),
            tuple(str(name) for name in content["to"]),
            tuple(ids[str(i)] for i in range(len(ids))),
            str(content["before"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: no migration: {error!r}") from error


def change(
    labels: LabelMap, operation: Operation, old: Sequence[str], new: Sequence[str], version: int
) -> tuple[LabelMap, Migration]:
    """Return the map after a change, and the record of the change.

    ``rename`` A to B; ``merge`` A, B... to C, which may be one of them or another tag of the map;
    ``split`` A to B, C..., of which one may be A; ``retire`` A.... `version` is that of the result.
    ConfigError names what is not possible.
    """
    _check(labels, operation, old, new)
    old_names = list(labels.names)
    heir = next((name for name in new if name in old), new[0] if new else None)
    target: dict[str, str | None] = dict.fromkeys(old, heir)
    after: list[str] = []  # what is merged stands where the first of it stood
    for name in old_names:
        moved = target.get(name, name)
        if moved is not None and moved not in after:
            after.append(moved)
    after += [name for name in new if name not in after]  # further parts of a split
    if not after:
        raise ConfigError("no tag would be left in the map")
    if operation == "split" and heir not in old:
        target = dict.fromkeys(old)  # no single part is the tag that was
    ids = tuple(
        None if (moved := target.get(name, name)) is None else after.index(moved)
        for name in old_names
    )
    return LabelMap(tuple(after)), Migration(
        version, operation, tuple(old), tuple(new), ids, names_digest(labels)
    )


def _check(labels: LabelMap, operation: Operation, old: Sequence[str], new: Sequence[str]) -> None:
    for name in old:
        if name not in labels.index:
            raise ConfigError(f"tag {name!r} is not in the label map")
    if any(len(set(names)) != len(names) for names in (old, new)):
        raise ConfigError(f"{operation}: a name appears twice")
    if any(not name.strip() for name in new):
        raise ConfigError(f"{operation}: a new name is empty")
    may_exist = set(old) if operation == "split" else set(labels.names)
    clash = [name for name in new if name in labels.index and name not in may_exist]
    if operation == "rename" and new[0] in labels.index:
        clash = [new[0]]
    if clash:
        hint = "; merge joins two tags" if operation == "rename" else ""
        raise ConfigError(f"{operation}: tag {clash[0]!r} is in the label map already{hint}")


def record(labels: Path, changed: LabelMap, migrations: Iterable[Migration]) -> None:
    """Write the map and its changes; the record comes first.

    Killed between the two, the map lacks the last recorded change: `lacks_last` finds that, and the
    next command that changes something completes it.
    """
    try:
        write_whole(migrations_path(labels), "\n".join(m.line() for m in migrations))
        text = json.dumps(changed.as_json(), ensure_ascii=False, indent=2)
        write_whole(labels, text)
    except OSError as error:
        raise ConfigError(f"{labels}: cannot be written: {error.strerror or error}") from error


def load(labels: Path, *, complete: bool = False) -> tuple[LabelMap, tuple[Migration, ...]]:
    """Load a label map and its changes; `complete` makes a recorded change that the map lacks."""
    present, migrations = LabelMap.load(labels), read_migrations(labels)
    if complete and lacks_last(present, migrations):
        last = migrations[-1]
        present, _ = change(present, last.operation, last.old, last.new, last.version)
        record(labels, present, migrations)
    return present, migrations


def lacks_last(labels: LabelMap, migrations: Sequence[Migration]) -> bool:
    """Return True when the map is still as it was before its last recorded change."""
    return bool(migrations) and migrations[-1].before == names_digest(labels)


def names_digest(labels: LabelMap) -> str:
    """Return the sha256 of the names in their order."""
    text = json.dumps(list(labels.names), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Applied:
    """Counts of posts of one rewritten data file, which follows this version of the map now.

    `bare` have no label now, and stay; of those to `relabel`, nobody has said which part of a split
    tag they have.
    """

    posts: int
    changed: int
    bare: int
    relabel: int
    version: int


def note_path(data: Path) -> Path:
    return data.with_name(f"{data.name}.taxonomy.json")


def relabel_path(data: Path) -> Path:
    """Return the path of the list of posts that people must look at after a split."""
    return data.with_name(f"{data.stem}.relabel.jsonl")


def followed_version(data: Path) -> int:
    """Return the version that a data file follows; 0 when it was never rewritten."""
    path = note_path(data)
    if not path.exists():
        return 0
    note = next((content for _, content in objects(path)), {})
    if note.get("pending_sha256") and file_digest(data) == note["pending_sha256"]:
        return int(note["pending_version"])
    return int(note.get("version", 0))


def apply(
    data: Path, migrations: Sequence[Migration], by_post: Mapping[str, Sequence[str]]
) -> Applied:
    """Rewrite the labels of a data file by the changes that it has not seen.

    The note of the coming content is written before the file takes its place: killed at any
    moment, the next run knows whether the change was made. `migrations` are all changes of the map,
    oldest first; `by_post` gives the parts that a post_id has of tags that were split, whenever.
    """
    old_version, new_version = followed_version(data), len(migrations)
    if old_version > new_version:
        raise ConfigError(
            f"{data}: follows version {old_version}, the label map has only {new_version}"
        )
    if old_version == new_version and not by_post:
        return Applied(0, 0, 0, 0, new_version)
    answers = {post_id: _said(names, migrations) for post_id, names in by_post.items()}
    listed = relabel_path(data)  # by an earlier run, for people to look at
    rows = _posts(listed) if listed.exists() else ()
    asked = [row for row in rows if not answers.get(row["post_id"])]
    counts = {"posts": 0, "changed": 0, "bare": 0, "relabel": 0}
    part = part_of(data)
    try:
        with AtomicLines(listed) as relabel, AtomicLines(part) as out:
            for row in asked:
                relabel.write(json.dumps(row, ensure_ascii=False))
            file = DataFile(out, "json" if data.suffix.lower() == ".json" else "jsonl")
            for line in _rewritten(data, migrations[old_version:], answers, counts, relabel):
                file.add(line)
            file.end()
        pending = {"pending_version": new_version, "pending_sha256": file_digest(part)}
        write_whole(note_path(data), json.dumps({"version": old_version, **pending}))
        publish(part, data)
        write_whole(note_path(data), json.dumps({"version": new_version}))
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"{data}: cannot be rewritten: {error.strerror or error}") from error
    if not counts["relabel"] and not asked:
        listed.unlink(missing_ok=True)
    return Applied(**counts, version=new_version)


def _said(names: Sequence[str], migrations: Sequence[Migration]) -> list[str]:
    """Return people's answers for a post under today's names; tags never split are ignored."""
    now: list[str] = []
    for migration in migrations:
        if migration.operation == "split":
            parts = [name for name in names if name in migration.new]
            now += follow(parts, migrations[migration.version :])[0]
    return list(dict.fromkeys(now))


def _rewritten(
    data: Path,
    migrations: Sequence[Migration],
    answers: Mapping[str, Sequence[str]],
    counts: dict[str, int],
    relabel: AtomicLines,
) -> Iterator[dict[str, Any]]:
    for entry in _posts(data):
        post_id, old_labels = entry["post_id"], entry.get("labels") or []
        answer = answers.get(post_id, ())
        followed, unsaid = follow(old_labels, migrations)
        labels = list(dict.fromkeys([*followed, *answer]))
        counts["posts"] += 1
        counts["changed"] += labels != old_labels
        counts["bare"] += bool(old_labels) and not labels
        if unsaid and not answer:
            counts["relabel"] += 1
            note = {"post_id": post_id, "labels": labels, "split": unsaid}
            relabel.write(json.dumps(note, ensure_ascii=False))
        yield {**entry, "labels": labels}


def follow(labels: Sequence[str], migrations: Sequence[Migration]) -> tuple[list[str], list[str]]:
    """Return labels after some changes, oldest first, and those that a split has taken away."""
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
    """Read people's answers for posts whose tag was split: ``{post_id, labels}`` lines."""
    if path is None:
        return {}
    names_ever = {*labels.names, *(name for m in migrations for name in (*m.old, *m.new))}
    said = {entry["post_id"]: list(entry.get("labels") or []) for entry in _posts(path)}
    for post_id, names in said.items():
        for name in names:
            if name not in names_ever:
                raise ConfigError(f"{path}: post {post_id!r}: tag {name!r} is not in the label map")
    return said


def _posts(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the posts of a file with all their keys."""
    for where, entry in objects(path):
        record_of(entry, where, path)  # refuses what is no post
        yield entry


def conflicts(
    labels: Path, data: Sequence[Path] = (), bundle: Path | None = None, min_posts: int = 1
) -> Iterator[str]:
    """Yield every conflict as a line for a person; that the map itself is no map is one."""
    try:
        names, migrations = load(labels)
    except ConfigError as error:
        yield str(error)
        return
    yield from _look_alike(names)
    yield from _history(names, migrations)
    for file in data:
        yield from _data(file, names, migrations, min_posts)
    if bundle is not None:
        yield from _bundle(bundle, names)


def plain(name: str) -> str:
    """Return a name as people read it, without regard to width, case and spaces."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())


def _look_alike(labels: LabelMap) -> Iterator[str]:
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in labels.names:
        alike[plain(name)].append(name)
        if name != name.strip():
            yield f"tag {name!r} has space around it"
    for names in alike.values():
        if len(names) > 1:
            yield f"tags {', '.join(map(repr, names))} differ only in case, width or spaces"


def _history(labels: LabelMap, migrations: Sequence[Migration]) -> Iterator[str]:
    if lacks_last(labels, migrations):
        yield f"the map is as before version {len(migrations)}: labels apply completes it"
        return
    gone: dict[str, Migration] = {}
    for migration in migrations:
        for name in migration.new:
            gone.pop(name, None)
        for name in set(migration.old) - set(migration.new):
            gone[name] = migration
    for name, migration in gone.items():
        if name in labels.index:
            what = f"{migration.operation} of version {migration.version}"
            yield f"tag {name!r} is in the map, but the {what} took it away"
    for name in {n for m in migrations for n in m.new} - set(gone) - set(labels.names):
        yield f"tag {name!r} was made by a migration, but is not in the map"


def _data(
    file: Path, labels: LabelMap, migrations: Sequence[Migration], min_posts: int
) -> Iterator[str]:
    counts: Counter[str] = Counter()
    for entry in read_posts(file):
        if not isinstance(entry, BadLine):
            counts.update(set(entry.post.labels))
    followed = followed_version(file)
    if followed > len(migrations):
        yield f"{file}: follows version {followed}, the map has only {len(migrations)}"
    old = {name: m for m in migrations[followed:] for name in set(m.old) - set(m.new)}
    for name, count in sorted(counts.items()):
        if name in labels.index:
            continue
        why = f"{old[name].operation} it: labels apply" if name in old else "not in the map"
        yield f"{file}: tag {name!r} of {count} posts: {why}"
    for name in labels.names:
        if counts[name] < min_posts:
            yield f"{file}: tag {name!r} has {counts[name]} posts, fewer than {min_posts}"


def _bundle(bundle: Path, labels: LabelMap) -> Iterator[str]:
    served = LabelMap.load(bundle / "labels.json")
    if served.names == labels.names:
        return
    lost = [name for name in served.names if name not in labels.index]
    new = [name for name in labels.names if name not in served.index]
    if lost or new:
        yield f"{bundle}: names tags that are not in the map: {lost}; lacks tags of the map: {new}"
    else:
        yield f"{bundle}: has the same tags in another order: their ids differ"
