"""Files of posts, read one at a time and written a line at a time.

A posts file (``*.jsonl``) holds a JSON object a line, ``{post_id, labels, text, ocr, images,
videos, audios, author, created}``; a data file (``*.json``) a list of the same, with
``features``. Only ``post_id`` must be there; other keys are for other readers.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, Literal, TypeAlias
from urllib.parse import urlsplit

from common.errors import ConfigError
from common.files import new_file, write_whole
from common.post import Media, MediaKind, Post
from fusion.data.data_file import entries

Form: TypeAlias = Literal["json", "jsonl"]
"""Format of a data file: one list, or a line for each entry."""


class AtomicLines:
    """A text file of lines that takes its name only when all of it is on the disk.

    Used with ``with``: an exception inside removes what was written. A process that is killed
    leaves a hidden file ``.NAME.part``, which the next one to write NAME begins anew.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._stack = ExitStack()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> AtomicLines:
        self._file = self._stack.enter_context(new_file(self.path))
        return self

    def write(self, line: str) -> None:
        """Add a line; the newline is added here.

        Raises:
            ValueError: Outside the ``with`` block.
            OSError: The disk is full, or gone.
        """
        if self._file is None:
            raise ValueError(f"{self.path}: not open")
        self._file.write(line.encode("utf-8") + b"\n")

    def sync(self) -> None:
        """Flush to the disk, so that only the rename remains.

        Raises:
            OSError: The disk is full, or gone.
        """
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file = None
        self._stack.__exit__(kind, error, trace)


class DataFile:
    """A data file that is written an entry at a time: a JSON list, or JSON lines."""

    def __init__(self, lines: AtomicLines, form: Form) -> None:
        self._lines, self._form = lines, form
        self._last: str | None = None
        if form == "json":
            lines.write("[")

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write an entry; in a list the previous one, which needs a comma now."""
        text = json.dumps(entry, ensure_ascii=False)
        if self._form == "jsonl":
            self._lines.write(text)
            return
        if self._last is not None:
            self._lines.write(self._last + ",")
        self._last = text

    def end(self) -> None:
        """Write the last entry and close the list."""
        if self._form == "json":
            if self._last is not None:
                self._lines.write(self._last)
            self._lines.write("]")


_MAX_REASONS = 1000
_OTHER = "other reasons"


class Summary:
    """Counts of one run; `show` prints them, `write` keeps them.

    Attributes:
        figures: Further figures by name, in the order in which they were set.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.figures: dict[str, int | float | str] = {}
        self._done = 0
        self._skipped: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()

    def done(self, count: int = 1) -> None:
        self._done += count

    def skipped(self, reason: str, count: int = 1) -> None:
        _add(self._skipped, reason, count)

    def failed(self, reason: str, count: int = 1) -> None:
        """Count what failed; reasons are classes of failures, not single ones."""
        _add(self._failed, reason, count)

    @property
    def total(self) -> int:
        return self._done + self._skipped.total() + self._failed.total()

    @property
    def failures(self) -> int:
        return self._failed.total()

    def as_dict(self) -> dict[str, object]:
        """Return ``{total, done, skipped: {reason: n}, failed: {reason: n}, ...figures}``."""
        return {
            "total": self.total,
            "done": self._done,
            "skipped": dict(sorted(self._skipped.items())),
            "failed": dict(sorted(self._failed.items())),
            **self.figures,
        }

    @classmethod
    def of(cls, title: str, content: Mapping[str, Any]) -> Summary:
        """Restore a summary from `as_dict`, to go on counting.

        Raises:
            KeyError: It is no such content.
        """
        summary = cls(title)
        summary._done = int(content["done"])
        summary._skipped.update(content["skipped"])
        summary._failed.update(content["failed"])
        own = {"total", "done", "skipped", "failed"}
        summary.figures = {name: value for name, value in content.items() if name not in own}
        return summary

    def write(self, path: Path) -> None:
        """Write `as_dict` as JSON; the file appears whole or not at all."""
        write_whole(path, json.dumps(self.as_dict(), ensure_ascii=False, indent=2))

    def show(self) -> None:
        import sys

        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        table.add_column("count", justify="right")
        table.add_column("reason", overflow="fold")
        table.add_row("done", f"{self._done:,}", "")
        for word, counts in (("skipped", self._skipped), ("failed", self._failed)):
            for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
                table.add_row(word, f"{count:,}", Text(reason))
        for name, value in self.figures.items():
            shown = f"{value:,}" if isinstance(value, int) else str(value)
            table.add_row(Text(name), shown, "")
        width = None if sys.stdout.isatty() else 120
        Console(width=width, highlight=False).print(table)


def _add(counts: Counter[str], reason: str, count: int) -> None:
    """Count a reason; those that never repeat must not fill the memory."""
    listed = reason in counts or len(counts) < _MAX_REASONS
    counts[reason if listed else _OTHER] += count


MEDIA_KEYS: dict[MediaKind, str] = {"image": "images", "video": "videos", "audio": "audios"}
"""Kind of media -> its key in the files."""

MAX_LINE_BYTES = 32 * 1024 * 1024
"""A longer line is no post: it is passed over, not held in memory."""

_CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class CorpusPost:
    """A post of a file.

    Attributes:
        post: Its media's sources stand as in the file: see `local_path`.
        author: Who made it.
        created: When it was made, ISO 8601.
        features: Its feature file, where a data file names one.
        line: Where it stands: line of a posts file, or place in the list of a data file; from 1.
    """

    post: Post
    author: str | None = None
    created: str | None = None
    features: str | None = None
    line: int = 0


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line or entry that is no post.

    Attributes:
        line: As `CorpusPost.line`.
        reason: One line for a person.
        post_id: Whose it is, where that could be read.
    """

    line: int
    reason: str
    post_id: str | None = None


Entry: TypeAlias = CorpusPost | BadLine


def read_posts(path: Path | str) -> Iterator[Entry]:
    """Read a posts file a line at a time, or a data file an entry at a time.

    Empty lines are passed over. Whether a post_id stands twice is for the caller to see.

    Raises:
        ConfigError: The file is missing or cannot be read; or a ``.json`` file holds no list, or
            breaks off, which shows when the reading comes there.
    """
    file = Path(path)
    if file.suffix.lower() == ".json":
        for line, content in enumerate(_list(file), 1):
            yield _entry(content, line)
        return
    with _reading(file), file.open("rb") as stream:
        for line, raw in _lines(stream):
            yield _parse(raw, line)


def count_lines(path: Path | str) -> int:
    """Count the lines of a posts file, empty ones included, or the entries of a data file.

    Raises:
        ConfigError: As `read_posts`.
    """
    file = Path(path)
    if file.suffix.lower() == ".json":
        return sum(1 for _ in _list(file))
    count, last = 0, b"\n"
    with _reading(file), file.open("rb") as stream:
        while block := stream.read(_CHUNK_BYTES):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def check_holds_post(path: Path | str, limit: int | None = None) -> None:
    """Refuse a file without a post; reads up to the first one.

    Args:
        path: As for `read_posts`.
        limit: Lines that count; None: all.

    Raises:
        ConfigError: As `read_posts`; or no line is a post, with the reason.
    """
    broken, first = 0, None
    for entry in itertools.islice(read_posts(path), limit):
        if isinstance(entry, CorpusPost):
            return
        broken, first = broken + 1, first or entry
    reason = "it is empty"
    if first is not None:
        which = "all" if limit is None or broken < limit else "the first"
        lines = "the line is" if broken == 1 else f"{which} {broken:,} lines are"
        reason = f"{lines} broken; line {first.line}: {first.reason}"
    raise ConfigError(f"{path}: holds no readable post: {reason}")


def post_line(entry: CorpusPost) -> str:
    """Return a post as a line of a posts file, without newline; the same post, the same bytes."""
    post = entry.post
    content: dict[str, Any] = {
        "post_id": post.post_id,
        "labels": list(post.labels),
        "text": post.text,
        "ocr": post.ocr,
    }
    for kind, key in MEDIA_KEYS.items():
        content[key] = [media.source for media in post.media if media.kind == kind]
    content |= {"author": entry.author, "created": entry.created}
    if entry.features is not None:
        content["features"] = entry.features
    return json.dumps(content, ensure_ascii=False)


def bad_line(entry: BadLine) -> str:
    """Return a line of a file of rejects: ``{line, post_id, reason}``."""
    content = {"line": entry.line, "post_id": entry.post_id, "reason": entry.reason}
    return json.dumps(content, ensure_ascii=False)


def is_url(source: str) -> bool:
    """Tell a URL from a path."""
    try:
        return urlsplit(source).scheme.lower() in {"http", "https"}
    except ValueError:
        return source[:8].lower().startswith(("http://", "https://"))


def local_path(source: str, file: Path | str) -> Path | None:
    """Return the path of a local source of a file of posts; None for a URL.

    Relative to the file's folder, or else, when nothing lies there, to the working directory.
    """
    if is_url(source) or "\0" in source:
        return None
    near = Path(file).parent / source
    try:
        return near if near.exists() or not Path(source).exists() else Path(source)
    except OSError:  # a name that is too long for the file system
        return near


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn errors of reading into a ConfigError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: no such file") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from error


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield numbers and lines that are not empty; None for one that is too long."""
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            while (rest := stream.readline(_CHUNK_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, None
            continue
        if number == 1:
            raw = raw.removeprefix(_BOM)
        if raw.strip():
            yield number, raw


def _parse(raw: bytes | None, line: int) -> Entry:
    if raw is None:
        return BadLine(line, f"longer than {MAX_LINE_BYTES} bytes")
    try:
        content = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return BadLine(line, "not UTF-8")
    except ValueError as error:
        return BadLine(line, f"not JSON: {error}")
    except RecursionError:
        return BadLine(line, "not JSON: nested too deeply")
    return _entry(content, line)


def _list(file: Path) -> Iterator[Any]:
    """Yield the entries of a JSON list, a block of the file at a time."""
    with _reading(file):
        file.open("rb").close()
    try:
        for entry in entries(file):
            yield entry.value
    except ConfigError as error:
        raise ConfigError(f"{error}; name a file of lines *.jsonl") from error


def _entry(content: Any, line: int) -> Entry:
    if not isinstance(content, dict):
        return BadLine(line, "not an object")
    post_id = content.get("post_id")
    if not isinstance(post_id, str) or not post_id:
        return BadLine(line, "post_id must be a text" if post_id is not None else "no post_id")
    if post_id != _clean(post_id) or "\0" in post_id:
        return BadLine(line, "post_id holds what UTF-8 or a file name cannot")
    try:
        return _post(post_id, content, line)
    except TypeError as error:
        return BadLine(line, str(error), post_id)


def _post(post_id: str, content: Mapping[str, Any], line: int) -> CorpusPost:
    media = [
        Media(kind, source)
        for kind, key in MEDIA_KEYS.items()
        for source in _texts(content, key)
        if source
    ]
    post = Post(
        post_id=post_id,
        text=_text(content, "text") or "",
        media=tuple(media),
        ocr=_text(content, "ocr"),
        labels=tuple(_texts(content, "labels")),
    )
    return CorpusPost(
        post,
        author=_text(content, "author"),
        created=_text(content, "created"),
        features=_text(content, "features"),
        line=line,
    )


def _text(content: Mapping[str, Any], key: str) -> str | None:
    value = content.get(key)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{key} must be a text")
    return None if value is None else _clean(value)


def _texts(content: Mapping[str, Any], key: str) -> list[str]:
    value = content.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{key} must be a list of texts")
    return [_clean(item) for item in value]


def _clean(text: str) -> str:
    """Return text that can be written: JSON's escapes may name half a character."""
    return text.encode("utf-8", "replace").decode("utf-8")
