"""The recorded changes of a label map.

They stand beside the map, ``<map>.migrations.jsonl``, one JSON object a line, only ever appended:
``{version, operation, from: [name], to: [name], ids: {old id: new id | null}, before}``, where
``before`` is the sha256 of the names as they were. The ids of a map run from 0 without gaps,
because a model has an output for each; a change therefore renumbers, and ``ids`` says how. Names
are what data files and people go by. The map's version is the number of lines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from common.errors import ConfigError
from common.files import write_whole
from config.labels import LabelMap

Operation = Literal["rename", "merge", "split", "retire"]


@dataclass(frozen=True)
class Migration:
    """One change.

    Attributes:
        version: Of the map after it, from 1.
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
        """As it stands in the file."""
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
    """Where the changes of a label map are recorded."""
    return labels.with_name(f"{labels.stem}.migrations.jsonl")


def read_migrations(labels: Path) -> tuple[Migration, ...]:
    """The changes of a label map, oldest first; none when nothing was ever changed.

    Raises:
        ConfigError: The record is broken.
    """
    path = migrations_path(labels)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    found = tuple(_parse(line, f"{path}: line {i}") for i, line in enumerate(lines, 1))
    for number, migration in enumerate(found, 1):
        if migration.version != number:
            raise ConfigError(f"{path}: line {number}: version {migration.version} is out of order")
    return found


def _parse(line: str, where: str) -> Migration:
    try:
        content: Any = json.loads(line)
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
    """The map after a change, and its record.

    Args:
        labels: Before.
        operation: ``rename`` A to B; ``merge`` A, B… to C, which may be one of them or another
            tag of the map; ``split`` A to B, C…, of which one may be A; ``retire`` A….
        old: Names to be taken away.
        new: Names to stand for them.
        version: Of the map after the change.

    Raises:
        ConfigError: A name is not in the map, is in it already, or stands twice; or nothing would
            be left.
    """
    _check(labels, operation, old, new)
    before = list(labels.names)
    heir = next((name for name in new if name in old), new[0] if new else None)
    target: dict[str, str | None] = dict.fromkeys(old, heir)
    after: list[str] = []  # what is merged stands where the first of it stood
    for name in before:
        moved = target.get(name, name)
        if moved is not None and moved not in after:
            after.append(moved)
    after += [name for name in new if name not in after]  # further parts of a split
    if not after:
        raise ConfigError("no tag would be left in the map")
    if operation == "split" and heir not in old:
        target = dict.fromkeys(old)  # no single part is the tag that was
    ids = tuple(
        None if (moved := target.get(name, name)) is None else after.index(moved) for name in before
    )
    return LabelMap(tuple(after)), Migration(
        version, operation, tuple(old), tuple(new), ids, names_digest(labels)
    )


def _check(labels: LabelMap, operation: Operation, old: Sequence[str], new: Sequence[str]) -> None:
    for name in old:
        if name not in labels.index:
            raise ConfigError(f"tag {name!r} is not in the label map")
    for names in (old, new):
        if len(set(names)) != len(names):
            raise ConfigError(f"{operation}: a name stands twice")
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

    Raises:
        ConfigError: A file cannot be written.
    """
    try:
        write_whole(migrations_path(labels), "\n".join(m.line() for m in migrations))
        text = json.dumps(changed.as_json(), ensure_ascii=False, indent=2)
        write_whole(labels, text)
    except OSError as error:
        raise ConfigError(f"{labels}: cannot be written: {error.strerror or error}") from error


def load(labels: Path, *, complete: bool = False) -> tuple[LabelMap, tuple[Migration, ...]]:
    """A label map and its changes.

    Args:
        labels: The map's file.
        complete: Make a change now that was recorded, but whose map was not written any more.

    Raises:
        ConfigError: A file is missing or broken.
    """
    present, migrations = LabelMap.load(labels), read_migrations(labels)
    if complete and lacks_last(present, migrations):
        last = migrations[-1]
        present, _ = change(present, last.operation, last.old, last.new, last.version)
        record(labels, present, migrations)
    return present, migrations


def lacks_last(labels: LabelMap, migrations: Sequence[Migration]) -> bool:
    """Whether the map is still just as it was before its last recorded change."""
    return bool(migrations) and migrations[-1].before == names_digest(labels)


def names_digest(labels: LabelMap) -> str:
    """sha256 of the names in their order."""
    text = json.dumps(list(labels.names), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
