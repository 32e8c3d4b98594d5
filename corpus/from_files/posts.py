"""Posts out of what is at hand: a folder of media, a table, or a file of posts."""

from __future__ import annotations

import mimetypes
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from common.errors import ConfigError
from common.post import MEDIA_KINDS, MediaKind
from common.progress import notice
from common.urls import is_url
from config.load import did_you_mean
from corpus.from_files.table import Row, read_table, several
from extractors.media.sniff import HEAD_BYTES, sniff
from fusion.data.data_file import (
    MEDIA_KEYS,
    BadLine,
    is_file,
    local_path,
    parse_post,
    post_id_of,
    read_posts,
)

PostEntry: TypeAlias = dict[str, Any]
"""A post as in a data file, its local media as whole paths."""
Refuse: TypeAlias = Callable[[ConfigError], None]
"""Takes the mistake of one post, which is then left out; or raises it."""

LABELS = "labels.csv"
"""Table of a folder's labels that needs not be named."""
_FILES = (".jsonl", ".ndjson", ".json")
_TABLES = (".csv", ".tsv")
_SHOWN = 5


def raise_it(mistake: ConfigError) -> None:
    """Refuse a post by ending the reading."""
    raise mistake


def read_own_posts(
    source: Path, labels: Path | None = None, refuse: Refuse = raise_it
) -> Iterator[PostEntry]:
    """Yield the posts of a folder of media, of a table, of a posts file, or of one media file.

    Args:
        source: A folder, ``.csv``, ``.jsonl``, ``.json``, or a media file; of files without posts
            in them each is a post, whose ID is its path in the folder.
        labels: Table of a folder's labels: columns ``file`` and ``labels``; by default its
            ``labels.csv``, where there is one. Files that it does not name have no labels.
        refuse: Takes mistakes in single posts.

    Raises:
        ConfigError: The source is none of these, or its table is none.
    """
    if source.is_dir():
        yield from _of_folder(source, labels, refuse)
        return
    if labels is not None:
        raise ConfigError(
            f"--labels {labels}: only with a folder of media: in {source} each post has its labels"
        )
    if not source.exists():
        raise ConfigError(f"{source}: no such file or folder")
    suffix = source.suffix.lower()
    if suffix in _TABLES:
        yield from _of_table(source, refuse)
    elif suffix in _FILES:
        yield from _of_posts_file(source, refuse)
    elif (kind := media_kind(source)) is not None:
        yield _entry(source.name, {kind: [source]})
    else:
        raise ConfigError(
            f"{source}: must be a folder of media, a table (.csv), a posts file (.jsonl, .json), "
            "or a picture, video or sound"
        )


def media_kind(path: Path) -> MediaKind | None:
    """Return what a post may use a file as, by its bytes; None for what is not media."""
    try:
        with path.open("rb") as file:
            sniffed = sniff(file.read(HEAD_BYTES))
    except OSError:
        return None
    kinds = sniffed.kinds if sniffed is not None else frozenset()
    if kinds == {"video", "audio"}:  # containers, whose name tells what their maker meant
        guess = mimetypes.guess_type(path.name)[0] or ""
        return "audio" if guess.startswith("audio/") else "video"
    return next((kind for kind in MEDIA_KINDS if kind in kinds), None)


def _entry(post_id: str, media: Mapping[MediaKind, list[Path]], **more: Any) -> PostEntry:
    files = {
        key: [str(path.absolute()) for path in media.get(kind, ())]
        for kind, key in MEDIA_KEYS.items()
    }
    return {"post_id": post_id, "labels": [], "text": "", "ocr": None, **files, **more}


def _of_folder(folder: Path, labels: Path | None, refuse: Refuse) -> Iterator[PostEntry]:
    files = dict(_files(folder))
    if labels is None and LABELS in files:
        labels = files[LABELS]
        notice(f"labels: {labels}")
    tags: dict[str, list[str]] = {}
    rows = read_table(labels, files) if labels is not None else ()
    for row in rows:
        try:
            name, row_labels = _labels_of(row, folder, files)
        except ConfigError as mistake:
            refuse(mistake)
        else:
            tags[name] = list(dict.fromkeys([*tags.get(name, ()), *row_labels]))
    others, count = [], 0
    for name, path in files.items():
        kind = media_kind(path)
        if kind is None:
            if name in tags:
                refuse(ConfigError(f"{labels}: file {name!r}: is not a picture, video or sound"))
            elif path != labels:
                others.append(name)
            continue
        try:
            post_id = post_id_of({"post_id": name}, str(folder))
        except ConfigError as mistake:
            refuse(ConfigError(f"{mistake}: rename the file"))
            continue
        count += 1
        yield _entry(post_id, {kind: [path]}, labels=tags.get(name, []))
    if others:
        notice(f"{folder}: passed over, no media: {_listed(others)}")
    if not count:
        raise ConfigError(f"{folder}: holds no picture, video or sound")


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files under a folder with their paths in it, in order; not hidden ones."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                path = Path(root) / name
                yield path.relative_to(folder).as_posix(), path


def _labels_of(row: Row, folder: Path, files: Mapping[str, Path]) -> tuple[str, list[str]]:
    """Return a row's file, as its path in the folder, and its labels."""
    for column in ("file", "labels"):
        if column not in row.cells:
            raise ConfigError(
                f"{row.where}: the table has no column {column}: its first row must name the "
                "columns, as file,labels"
            )
    cell = row.cells["file"]
    name = cell.replace("\\", "/").removeprefix("./")
    if name not in files and Path(name).is_relative_to(folder):  # written as a path to the folder
        name = Path(name).relative_to(folder).as_posix()
    if not cell:
        raise ConfigError(f"{row.where}: file is empty: name a file of {folder}")
    if name not in files:
        raise ConfigError(
            f"{row.where}: file {cell!r}: no such file in {folder}{did_you_mean(name, files)}"
        )
    return name, several(row.cells["labels"])


def _of_table(table: Path, refuse: Refuse) -> Iterator[PostEntry]:
    """Yield the posts of a table; rows of one post that differ in the labels are one post."""
    posts: dict[str, tuple[str, PostEntry]] = {}
    for row in read_table(table):
        try:
            entry = _of_row(row, table)
            where, first = posts.setdefault(entry["post_id"], (row.where, entry))
            if {**entry, "labels": first["labels"]} != first:
                raise ConfigError(
                    f"{row.where}: post_id {entry['post_id']!r}: {where} has other content: give "
                    "each post an ID of its own"
                )
        except ConfigError as mistake:
            refuse(mistake)
            continue
        first["labels"] = list(dict.fromkeys([*first["labels"], *entry["labels"]]))
    yield from (entry for _, entry in posts.values())


def _of_row(row: Row, table: Path) -> PostEntry:
    cells, media = row.cells, dict.fromkeys(MEDIA_KEYS.values(), ())
    sources: dict[str, list[str]] = {key: list(value) for key, value in media.items()}
    for column in ("file", *media):
        cell = cells.get(column, "")
        for name in [cell] if cell and _is_file(cell, table, row.where) else several(cell):
            key, source = column, name
            if not is_url(name):
                path = local_path(name, table)
                if path is None or not is_file(path, row.where):
                    raise ConfigError(f"{row.where}: {column} {name!r}: no such file{_seen(table)}")
                if column == "file":
                    kind = media_kind(path)
                    if kind is None:
                        raise ConfigError(
                            f"{row.where}: file {name!r}: is not a picture, video or sound"
                        )
                    key = MEDIA_KEYS[kind]
                source = str(path.absolute())
            elif column == "file":
                raise ConfigError(
                    f"{row.where}: file {name!r}: is a URL: name the column images, videos or "
                    "audios, which tells what it leads to"
                )
            sources[key].append(source)
    files = next((cells[c] for c in ("file", *media) if cells.get(c)), "")
    post_id = cells.get("post_id") or files
    if not post_id:
        raise ConfigError(f"{row.where}: post_id is empty: give the post an ID, or a file")
    content = {"post_id": post_id, **sources, "labels": several(cells.get("labels", ""))}
    texts = {key: cells.get(key) or None for key in ("text", "ocr", "author", "created")}
    parse_post({**content, **texts}, row.where)
    return _entry(post_id, {}) | content | {k: v for k, v in texts.items() if v is not None}


def _is_file(cell: str, table: Path, where: str) -> bool:
    path = local_path(cell, table)
    return path is not None and is_file(path, where)


def _seen(table: Path) -> str:
    return f" relative to {table.parent}; one row may name several, separated by ; or |"


def _of_posts_file(path: Path, refuse: Refuse) -> Iterator[PostEntry]:
    for line in read_posts(path):
        if isinstance(line, BadLine):
            refuse(ConfigError(f"{path}: line {line.line}: {line.reason}"))
            continue
        post, where = line.post, f"{path}: line {line.line}"
        sources: dict[str, list[str]] = {key: [] for key in MEDIA_KEYS.values()}
        try:
            for media in post.media:
                key, local = MEDIA_KEYS[media.kind], local_path(media.source, path)
                if local is not None and not is_file(local, where):
                    at = f"{key}.{len(sources[key])}"
                    raise ConfigError(f"{where}: {at}: no such file: {media.source}")
                sources[key].append(media.source if local is None else str(local.absolute()))
        except ConfigError as mistake:
            refuse(mistake)
            continue
        more = {"author": line.author, "created": line.created}
        content = {"labels": list(post.labels), "text": post.text, "ocr": post.ocr, **sources}
        known = {key: value for key, value in more.items() if value is not None}
        yield _entry(post.post_id, {}) | content | known


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
