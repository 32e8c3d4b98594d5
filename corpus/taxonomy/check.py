"""What is wrong with a label map, or between it and data files or a bundle."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import ConfigError
from config.labels import LabelMap
from corpus.records import BadLine, read_posts
from corpus.taxonomy.migrations import Migration, lacks_last, load
from corpus.taxonomy.rewrite import followed_version


def conflicts(
    labels: Path, data: Sequence[Path] = (), bundle: Path | None = None, min_posts: int = 1
) -> Iterator[str]:
    """Every conflict, a line for a person each.

    Raises:
        ConfigError: A file is missing or broken; that the map itself is no map is a conflict.
    """
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
    """A name as people read it: width, case and spaces do not count."""
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
        yield f"{bundle}: gives tags that the map lacks: {lost}; lacks tags of the map: {new}"
    else:
        yield f"{bundle}: has the same tags in another order: their ids differ"
