"""Data files: posts with their labels and features, read as a stream.

A data file is a JSON list of ``{post_id, labels: [name, ...], features: path, ...}``, or the same
entries one a line (``.jsonl``); other keys are for other readers. Paths are relative to the data
file, or else to the working directory. Files may hold millions of posts: never more than one
block of the file is in memory.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from common.errors import ConfigError

# Bytes of one read. Half would double the reads; much more only holds more of the file in memory.
_BLOCK_BYTES = 1 << 20
# Characters of one post. Without a limit, a missing brace would pull the rest of the file into
# memory; posts are far smaller, so half or double changes nothing for them.
_LARGEST_ENTRY = 64 << 20
_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Record:
    """One post of a data file.

    Attributes:
        labels: Names of the true tags.
        features: Its feature file; None leaves it to the reader to find it by ID.
    """

    post_id: str
    labels: tuple[str, ...] = ()
    features: Path | None = None


class Entry(NamedTuple):
    """One entry of a data file, as it stands there.

    Attributes:
        number: From 0; of ``.jsonl`` the line.
        start: Its first byte in the file.
        size: Its bytes.
        value: What JSON makes of it.
    """

    number: int
    start: int
    size: int
    value: Any


def read_data_file(path: Path) -> tuple[Record, ...]:
    """Return all posts of a small data file at once.

    Raises:
        ConfigError: It is missing, no JSON list, empty, or an entry is not as it should be.
    """
    records = tuple(iterate_records(path))
    if not records:
        raise ConfigError(f"{path}: holds no posts")
    ids = [record.post_id for record in records]
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise ConfigError(f"{path}: post {twice!r} stands twice")
    return records


def iterate_records(path: Path) -> Iterator[Record]:
    """Yield the posts of a data file; that IDs are unique is not checked.

    Raises:
        ConfigError: It is missing, no JSON list, or an entry is not as it should be.
    """
    for entry in entries(path):
        yield record_of(entry.value, f"{path}: entry {entry.number}", path)


def entries(path: Path) -> Iterator[Entry]:
    """Yield the entries of a data file one after another.

    Raises:
        ConfigError: It is missing, or no JSON list.
    """
    try:
        with path.open("rb") as file:
            lines = path.suffix == ".jsonl"
            yield from _line_entries(file, path) if lines else _list_entries(file, path)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such data file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a JSON data file: {error}") from error


def record_of(entry: Any, where: str, file: Path) -> Record:
    """Return an entry as a record.

    Args:
        entry: What JSON made of it.
        where: For the error.
        file: The data file, which paths are relative to.

    Raises:
        ConfigError: It is not as it should be.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("post_id"), str):
        raise ConfigError(f"{where}: must have a post_id, a text")
    labels, features = entry.get("labels") or [], entry.get("features")
    if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
        raise ConfigError(f"{where}: labels must be a list of names")
    if features is not None and not isinstance(features, str):
        raise ConfigError(f"{where}: features must be a path")
    return Record(entry["post_id"], tuple(labels), _resolve(features, file))


def _resolve(features: str | None, file: Path) -> Path | None:
    if not features:
        return None
    relative = file.parent / features  # an absolute path stays as it is
    return relative if relative.exists() else Path(features)


def _line_entries(file: BinaryIO, path: Path) -> Iterator[Entry]:
    start = 0
    for number, line in enumerate(file):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}: line {number + 1}: not JSON: {error}") from error
            yield Entry(number, start, len(line), value)
        start += len(line)


def _list_entries(file: BinaryIO, path: Path) -> Iterator[Entry]:
    text = _Text(file)
    if text.next_sign() != "[":
        raise ConfigError(f"{path}: must be a list of posts")
    text.skip(1)
    number = 0
    if text.next_sign() == "]":
        text.skip(1)
    else:
        while True:
            yield text.entry(number)
            number += 1
            sign = text.next_sign()
            text.skip(1)
            if sign == "]":
                break
            if sign != ",":
                raise ValueError(f"behind entry {number - 1} must be a comma or the list's end")
    if text.next_sign():
        raise ValueError("something stands behind the list")


class _Text:
    """A window on a UTF-8 file that moves on, and knows how many bytes it has passed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text, self._at = "", 0
        # In the file, in front of self._text[self._at].
        self._bytes = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(self._bytes)

    def next_sign(self) -> str:
        """Return the next character that is no white space, empty at the end; stays before it."""
        while True:
            blank = _BLANK.match(self._text, self._at)
            self.skip(0 if blank is None else blank.end() - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, count: int) -> None:
        """Pass ASCII characters."""
        self._at += count
        self._bytes += count

    def entry(self, number: int) -> Entry:
        """Decode the value that comes next, and pass it.

        Raises:
            ValueError: It is no JSON, is cut off, or larger than any post.
        """
        self.next_sign()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                too_large = len(self._text) - self._at > _LARGEST_ENTRY
                # Perhaps the block ends inside the entry.
                if too_large or not self._more():
                    raise ValueError(f"entry {number}: {error.msg}") from error
                continue
            # A number could go on in the next block; a post ends with its brace.
            if end == len(self._text) and self._text[end - 1] not in "}]" and self._more():
                continue
            size = len(self._text[self._at : end].encode("utf-8"))
            found = Entry(number, self._bytes, size, value)
            self._at = end
            self._bytes += size
            return found

    def _more(self) -> bool:
        kept = self._text[self._at :]
        # As much again as there is, so that a large entry is not decoded over and over.
        block = self._file.read(max(_BLOCK_BYTES, len(kept)))
        self._text, self._at = kept + self._decoder.decode(block, final=not block), 0
        return bool(block)
