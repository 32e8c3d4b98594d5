"""Files of posts, read one at a time and written a line at a time.

A posts file (``*.jsonl``) holds a JSON object a line, ``{post_id, labels, text, ocr, images,
videos, audios, author, created}``; a data file (``*.json``) a list of the same, with
``features``. Only ``post_id`` must be there; other keys are for other readers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import urlsplit

from common.errors import ConfigError
from common.post import Media, MediaKind, Post
from corpus.lines import AtomicLines
from corpus.summary import Summary
from fusion.data.data_file import entries

__all__ = [
    "MEDIA_KEYS",
    "AtomicLines",
    "BadLine",
    "CorpusPost",
    "Summary",
    "bad_line",
    "check_holds_post",
    "count_lines",
    "is_url",
    "local_path",
    "post_line",
    "read_posts",
]

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
    """What stands where a post should.

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
    """Lines of a posts file, nearly: empty ones count; or entries of a data file.

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
    """Find a file that gives nothing to do; reads up to its first post.

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
    """A post as a line of a posts file, without the line's end; the same post, the same bytes."""
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
    """A line of a file of rejects: ``{line, post_id, reason}``."""
    content = {"line": entry.line, "post_id": entry.post_id, "reason": entry.reason}
    return json.dumps(content, ensure_ascii=False)


def is_url(source: str) -> bool:
    """Whether a source lies on the network; anything else is a path."""
    try:
        return urlsplit(source).scheme.lower() in {"http", "https"}
    except ValueError:
        return source[:8].lower().startswith(("http://", "https://"))


def local_path(source: str, file: Path | str) -> Path | None:
    """Where a local source of a file of posts lies; None for a URL.

    Relative to the file's folder, or else, when nothing lies there, to the working directory.
    """
    if is_url(source) or "\0" in source:
        return None
    beside = Path(file).parent / source
    try:
        return beside if beside.exists() or not Path(source).exists() else Path(source)
    except OSError:  # a name that is too long for the file system
        return beside


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Name the file that cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: no such file") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from error


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Numbers and lines that are not empty; None for one that is too long."""
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
    """The entries of a JSON list, a block of the file at a time."""
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
    """Text that can be written: JSON's escapes may name half a character."""
    return text.encode("utf-8", "replace").decode("utf-8")
