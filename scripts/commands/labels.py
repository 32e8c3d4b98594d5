"""``insighttag labels``: changes of the taxonomy, recorded, and checks of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from common.cli import argument, option, print_json, say
from common.errors import ConfigError
from corpus import taxonomy
from corpus.taxonomy import Migration, Operation
from scripts.commands.common import AsJson

MapFile = Annotated[Path, argument("A label map, idx2name_cls*.json.", "MAP")]
Data = Annotated[list[Path] | None, option("A data file; may be repeated.", "F", "--data")]


def check(
    labels: MapFile,
    *,
    data: Data = None,
    bundle: Annotated[Path | None, option("A bundle that the map must fit.", "DIR")] = None,
    min_posts: Annotated[int, option("A tag with fewer posts is a conflict.", min=0)] = 1,
    as_json: AsJson = False,
) -> None:
    """Find conflicts in a label map, and between it and data files or a bundle.

    Names that differ only in case, width or spaces; tags of the data that the map lacks, or that a
    migration took away; tags with too few posts. Exit code 2 when there is one.
    """
    conflicts = list(taxonomy.conflicts(labels, data or (), bundle, min_posts))
    if as_json:
        print_json({"conflicts": conflicts})
    else:
        say("".join(f"{line}\n" for line in conflicts or [f"{labels}: no conflicts"]))
    if conflicts:
        raise ConfigError(f"labels check: {len(conflicts)} conflicts in {labels}")


def rename(
    labels: MapFile,
    old: Annotated[str, argument("The tag.")],
    new: Annotated[str, argument("Its new name.")],
) -> None:
    """Give a tag another name; its id stays."""
    _change(labels, "rename", (old,), (new,))


def merge(
    labels: MapFile,
    old: Annotated[list[str], argument("The tags.")],
    *,
    into: Annotated[str, option("What they become.", "NAME")],
) -> None:
    """Make several tags one."""
    if len(set(old) | {into}) < 2:
        raise ConfigError("labels merge: name two tags or more")
    _change(labels, "merge", old, (into,))


def split(
    labels: MapFile,
    old: Annotated[str, argument("The tag.")],
    *,
    into: Annotated[list[str], option("One of its parts; repeat it.", "NAME")],
) -> None:
    """Make one tag several; `apply --by-post` says which post has which part."""
    if len(into) < 2:
        raise ConfigError("labels split: give --into twice or more")
    _change(labels, "split", (old,), into)


def retire(
    labels: MapFile,
    old: Annotated[list[str], argument("The tags.")],
) -> None:
    """Take tags out of the map."""
    _change(labels, "retire", old, ())


def history(labels: MapFile, as_json: AsJson = False) -> None:
    """List the recorded changes of a label map, oldest first."""
    _, migrations = taxonomy.load(labels)
    if as_json:
        print_json([asdict(each) for each in migrations])
        return
    for each in migrations:
        say(f"{each.version:>4}  {_told(each)}\n")
    if not migrations:
        say(f"{labels}: never changed\n")


def apply(
    labels: MapFile,
    *,
    data: Data = None,
    by_post: Annotated[
        Path | None, option("JSON lines {post_id, labels} for tags that were split.", "F")
    ] = None,
) -> None:
    """Rewrite data files by the changes that they have not seen yet."""
    if not data:
        raise ConfigError("labels apply: name data files with --data")
    present, migrations = taxonomy.load(labels, complete=True)
    said = taxonomy.read_by_post(by_post, present, migrations)
    for file in data:
        done = taxonomy.apply(file, migrations, said)
        if not done.posts:
            say(f"{file}: follows version {done.version} already\n")
            continue
        say(
            f"{file}: {done.posts} posts, {done.changed} changed, {done.bare} without a label now, "
            f"version {done.version}\n"
        )
        if done.relabel:
            where = taxonomy.relabel_path(file)
            say(f"  {done.relabel} posts had a tag that was split: {where}\n")


def _change(labels: Path, operation: Operation, old: Sequence[str], new: Sequence[str]) -> None:
    present, migrations = taxonomy.load(labels, complete=True)
    changed, migration = taxonomy.change(present, operation, old, new, len(migrations) + 1)
    taxonomy.record(labels, changed, (*migrations, migration))
    say(f"{_told(migration)}\n")
    moved = sum(after not in (None, before) for before, after in enumerate(migration.ids))
    say(
        f"{labels}: version {migration.version}, {len(changed)} tags, {moved} have another id; "
        "bundles keep the ids that they were trained with\n"
    )


def _told(migration: Migration) -> str:
    old, new = ", ".join(migration.old), ", ".join(migration.new)
    return f"{migration.operation} {old}" + (f" -> {new}" if new else "")


COMMANDS: Mapping[str, Callable[..., None]] = {
    "check": check,
    "rename": rename,
    "merge": merge,
    "split": split,
    "retire": retire,
    "history": history,
    "apply": apply,
}
