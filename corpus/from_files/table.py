"""Tables of posts or of labels: CSV as spreadsheets write it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError, path_error
from config.load import did_you_mean

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "post_id": ("post_id", "id"),
    "file": ("file", "files", "path", "filename", "file_name"),
    "images": ("images", "image"),
    "videos": ("videos", "video"),
    "audios": ("audios", "audio"),
    "text": ("text", "caption"),
    "ocr": ("ocr",),
    "labels": ("labels", "label", "tags", "tag"),
    "author": ("author",),
    "created": ("created",),
}
"""Content of a column -> the names that it may have, in any case."""
_DELIMITERS = ",;\t"
_SEPARATOR = re.compile(r"[;|]")


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        where: File and row, for errors; rows are counted as spreadsheets do, the header is 1.
        cells: By what they hold, a key of `COLUMNS`, without white space around them.
    """

    where: str
    cells: Mapping[str, str]


def read_table(path: Path, files: Collection[str] = ()) -> Iterator[Row]:
    """Yield the rows of a table that are not empty.

    Without a header there are two columns, ``file`` and ``labels``, and the first row must name one
    of ``files``.

    Raises:
        ConfigError: It is no table, or has a row with more or fewer cells than the header.
    """
    text = _text(path)
    head = text.partition("\n")[0]
    # Of equals the comma; a tag list such as "cat;dog" stands in a cell, never in the header.
    delimiter = max(_DELIMITERS, key=head.count)
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    try:
        for number, raw in enumerate(table, 1):
            cells, where = [cell.strip() for cell in raw], f"{path}: row {number}"
            if not any(cells):
                continue
            if not columns:
                columns = _columns(cells, path, files)
                if columns != ["file", "labels"] or cells[0] not in files:
                    continue
            if len(cells) != len(columns):
                raise ConfigError(
                    f"{where}: has {len(cells)} cells, the header {len(columns)}: put a value "
                    f"that holds {delimiter!r} into double quotes"
                )
            pairs = zip(columns, cells, strict=True)
            yield Row(where, {column: cell for column, cell in pairs if column})
    except csv.Error as error:
        raise ConfigError(f"{path}: line {table.line_num}: not CSV: {error}") from error
    if not columns:
        raise ConfigError(f"{path}: is empty: the first row must name the columns: file,labels")


def several(cell: str) -> list[str]:
    """Return the values of a cell that ``;`` or ``|`` separate, each once."""
    values = (value.strip() for value in _SEPARATOR.split(cell))
    return list(dict.fromkeys(value for value in values if value))


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except OSError as error:
        raise path_error(f"{path}: cannot be read", error) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}: line {line}: not UTF-8 (byte {raw[error.start]:#04x}): save it as CSV UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ConfigError(f"{path}: line {line}: not text: save it as CSV UTF-8")
    return text


def _columns(head: list[str], path: Path, files: Collection[str]) -> list[str]:
    """Return what each column holds, "" for one that is passed over."""
    names = {name: column for column, all_of in COLUMNS.items() for name in all_of}
    columns = [names.get(cell.casefold(), "") for cell in head]
    if not any(columns):
        if len(head) == 2 and head[0] in files:
            return ["file", "labels"]
        shown = ", ".join(repr(cell) for cell in head[:5])
        near = next((hint for cell in head if (hint := did_you_mean(cell.casefold(), names))), "")
        raise ConfigError(
            f"{path}: row 1: has no known column, such as file,labels: got {shown:.120}{near}"
        )
    twice = next((c for c in columns if c and columns.count(c) > 1), None)
    if twice is not None:
        both = [cell for cell, column in zip(head, columns, strict=True) if column == twice]
        raise ConfigError(
            f"{path}: row 1: the columns {' and '.join(map(repr, both))} both hold {twice}: "
            "rename or delete one"
        )
    return columns
