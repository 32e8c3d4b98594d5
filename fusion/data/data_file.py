"""The one reader of files of posts: a stream, whatever the size of the file.

A file ``.json`` is a list of posts or one post alone, any other JSON lines. A post is ``{post_id,
labels: [name, ...], text, ocr, images: [path or URL, ...], videos, audios, features: path, author,
created}``; only ``post_id`` must be there, other keys are for other readers. Paths are relative to
the file, or else to the working directory.
"""

from __future__ import annotations

import codecs
import errno
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from common.errors import ConfigError, path_error
from common.post import Media, MediaKind, Post, clean
from common.urls import is_url, local_source
from config.load import did_you_mean

# Bytes of one read. Half would double the reads; much more only holds more of the file in memory.
_BLOCK_BYTES = 1 << 20
# Of one post. Without a limit, a missing brace or end of line would pull the rest of the file into
# memory; posts are far smaller, so half or double changes nothing for them.
MAX_ENTRY_BYTES = 32 << 20
_BLANK = re.compile(r"[ \t\r\n]*")
MEDIA_KEYS: dict[MediaKind, str] = {"image": "images", "video": "videos", "audio": "audios"}
"""Kind of media -> its key in the files."""
_TEXT_KEYS = ("post_id", "labels", "text", "ocr")
POST_KEYS = (*_TEXT_KEYS, *MEDIA_KEYS.values(), "features", "author", "created")


class Entry(NamedTuple):
    """One entry of a file, as it stands there.

    Attributes:
        where: File and line or place, for errors.
        line: Its line, or its place in the list; from 1.
        start: Its first byte in the file; ``size`` are its bytes.
        value: JSON's value; of a line that is none, a `ConfigError` says why.
    """

    where: str
    line: int
    start: int
    size: int
    value: Any


@dataclass(frozen=True, slots=True)
class Record:
    """The labels and features of a post; without a file the reader finds it by ID."""

    post_id: str
    labels: tuple[str, ...] = ()
    features: Path | None = None
    author: str = ""


@dataclass(frozen=True, slots=True)
class CorpusPost:
    """A post of a file; its media's sources stand as in the file: see `local_path`.

    Attributes:
        created: When it was made, ISO 8601.
        features: Its feature file, where the file names one.
        line: As `Entry.line`.
    """

    post: Post
    author: str | None = None
    created: str | None = None
    features: str | None = None
    line: int = 0


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line or entry that is no post; its ID, where that could be read."""

    line: int
    reason: str
    post_id: str | None = None


FileEntry: TypeAlias = CorpusPost | BadLine


def entries(path: Path) -> Iterator[Entry]:
    """Yield the entries of a file one after another; empty lines are passed over.

    That a file is no JSON list shows when the reading comes there.
    """
    try:
        with path.open("rb") as file:
            listed = path.suffix.lower() == ".json"
            yield from _list_entries(file, path) if listed else _line_entries(file, path)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such data file") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a JSON data file: {error}") from error


def objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and content of every entry of a file that holds objects of any kind."""
    for entry in entries(path):
        if isinstance(entry.value, ConfigError):
            raise entry.value
        if not isinstance(entry.value, dict):
            raise ConfigError(f"{entry.where}: must be an object: got {_shown(entry.value)}")
        yield entry.where, entry.value


def read_posts(path: Path | str) -> Iterator[FileEntry]:
    """Yield the posts of a file, and what is no post; repeated IDs are not looked for."""
    for entry in entries(Path(path)):
        post_id = None
        try:
            post_id = post_id_of(entry.value, entry.where)
            yield parse_post(entry.value, entry.where, entry.line)
        except ConfigError as error:
            yield BadLine(entry.line, str(error).removeprefix(f"{entry.where}: "), post_id)


def count_lines(path: Path | str) -> int:
    """Count the lines of a file, empty ones included, or the entries of a list."""
    file = Path(path)
    if file.suffix.lower() == ".json":
        return sum(1 for _ in entries(file))
    next(entries(file), None)  # refuses a file that cannot be read
    count, last = 0, b"\n"
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def check_holds_post(path: Path | str, limit: int | None = None) -> None:
    """Refuse a file without a post; reads up to the first one, or ``limit`` entries."""
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


def record_of(value: Any, where: str, path: Path) -> Record:
    """Return the labels and features of an `Entry.value` at ``where`` of the file ``path``."""
    post_id = post_id_of(value, where)
    labels, features = _texts(value, "labels", where), _text(value, "features", where)
    author = _text(value, "author", where) or ""
    return Record(post_id, labels, relative_to_file(features, path) if features else None, author)


def parse_post(value: Any, where: str, line: int = 0) -> CorpusPost:
    """Return an `Entry.value` as a post."""
    post_id = post_id_of(value, where)
    media = [
        Media(kind, local_source(source))
        for kind, key in MEDIA_KEYS.items()
        for source in _texts(value, key, where)
        if source
    ]
    post = Post(
        post_id,
        text=_text(value, "text", where) or "",
        media=tuple(media),
        ocr=_text(value, "ocr", where),
        labels=_texts(value, "labels", where),
    )
    author, created, features = (_text(value, k, where) for k in ("author", "created", "features"))
    return CorpusPost(post, author, created, features, line)


def read_whole_posts(path: Path) -> list[Post]:
    """Return the posts of a small file, ready to be tagged: see `post_to_tag`."""
    posts = [post_to_tag(entry.value, path, entry.where) for entry in entries(path)]
    if not posts:
        raise ConfigError(f"{path}: holds no post")
    return posts


def post_to_tag(value: Any, path: Path, where: str) -> Post:
    """Return an entry as a post with known keys alone, whose local media exist."""
    post_id_of(value, where)
    odd = next((key for key in value if key not in POST_KEYS), None)
    if odd is not None:
        raise ConfigError(f"{where}: {odd}: unknown key{did_you_mean(odd, POST_KEYS)}")
    post = parse_post(value, where).post
    media: list[Media] = []
    for each in post.media:
        local = local_path(each.source, path)
        if local is not None:
            index = sum(other.kind == each.kind for other in media)
            key = f"{where}: {MEDIA_KEYS[each.kind]}.{index}"
            if not is_file(local, key):
                raise ConfigError(f"{key}: no such file: {each.source}")
        media.append(each if local is None else Media(each.kind, str(local)))
    return Post(post.post_id, post.text, tuple(media), post.ocr, post.labels)


def is_file(path: Path, where: str) -> bool:
    """Return True for a file; ConfigError where that cannot be told."""
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # so it is no file, but perhaps several in one cell
            return False
        raise path_error(f"{where}: {path}", error) from error


def local_path(source: str, file: Path | str) -> Path | None:
    """Return the path of a local source of a file of posts; None for a URL."""
    return None if is_url(source) or "\0" in source else relative_to_file(source, Path(file))


def relative_to_file(source: str, file: Path) -> Path:
    """Return a path that a file names: relative to it, or to the working directory."""
    path = file.parent / source  # an absolute path stays as it is
    try:
        return path if path.exists() or not Path(source).exists() else Path(source)
    except OSError:  # a name that is too long for the file system
        return path


def post_id_of(value: Any, where: str) -> str:
    if isinstance(value, ConfigError):
        raise value
    post_id = value.get("post_id") if isinstance(value, dict) else None
    if not isinstance(post_id, str) or not post_id:
        actual = value if not isinstance(value, dict) else value.get("post_id", "none")
        raise ConfigError(f"{where}: must have a post_id, a text: got {_shown(actual)}")
    if post_id != clean(post_id) or "\0" in post_id:
        raise ConfigError(
            f"{where}: post_id has characters that UTF-8 or a file name cannot have: {post_id!r}"
        )
    return post_id


def _text(value: Mapping[str, Any], key: str, where: str) -> str | None:
    text = value.get(key)
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"{where}: {key} must be a text: got {_shown(text)}")
    return None if text is None else clean(text)


def _texts(value: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    texts = value.get(key)
    if texts is None:
        return ()
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{where}: {key} must be a list of texts: got {_shown(texts)}")
    return tuple(map(clean, texts))


def _shown(value: Any) -> str:
    return f"{json.dumps(value, default=repr):.60}"


def _line_entries(file: BinaryIO, path: Path) -> Iterator[Entry]:
    start, line = 0, 0
    while raw := file.readline(MAX_ENTRY_BYTES + 1):
        line += 1
        size = len(raw)
        where = f"{path}: line {line}"
        if line == 1 and raw.startswith(codecs.BOM_UTF8):
            raw = raw.removeprefix(codecs.BOM_UTF8)
            start += len(codecs.BOM_UTF8)
            size -= len(codecs.BOM_UTF8)
        if size > MAX_ENTRY_BYTES and not raw.endswith(b"\n"):
            while (rest := file.readline(_BLOCK_BYTES)) and not rest.endswith(b"\n"):
                size += len(rest)
            size += len(rest)
            problem = ConfigError(f"{where}: longer than {MAX_ENTRY_BYTES} bytes")
            yield Entry(where, line, start, size, problem)
        elif raw.strip():
            yield Entry(where, line, start, size, _parsed(raw, where))
        start += size


def _parsed(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return ConfigError(f"{where}: not UTF-8")
    except ValueError as error:
        return ConfigError(f"{where}: not JSON: {error}")
    except RecursionError:
        return ConfigError(f"{where}: not JSON: nested too deeply")


def _list_entries(file: BinaryIO, path: Path) -> Iterator[Entry]:
    text = _Text(file, path)
    if text.next_sign() == "{":
        yield text.entry(1)
        if text.next_sign():
            raise ConfigError(f"{path}: must be a list of posts; name a file of lines *.jsonl")
        return
    if text.next_sign() != "[":
        empty = "" if text.next_sign() else "; it is empty"
        raise ConfigError(f"{path}: must be a list of posts{empty}")
    text.skip(1)
    number = 0
    if text.next_sign() == "]":
        text.skip(1)
    else:
        while True:
            number += 1
            yield text.entry(number)
            sign = text.next_sign()
            text.skip(1)
            if sign == "]":
                break
            if sign != ",":
                raise ValueError(f"behind entry {number} must be a comma or the list's end")
    if text.next_sign():
        raise ValueError("there is something after the list")


class _Text:
    """A window on a UTF-8 file that moves on, and knows how many bytes it has passed."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
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
        self.next_sign()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                too_large = len(self._text) - self._at > MAX_ENTRY_BYTES
                # Perhaps the block ends inside the entry.
                if too_large or not self._more():
                    raise ValueError(f"entry {number}: {error.msg}") from error
                continue
            # A number could go on in the next block; a post ends with its brace.
            if end == len(self._text) and self._text[end - 1] not in "}]" and self._more():
                continue
            size = len(self._text[self._at : end].encode("utf-8"))
            start, self._at, self._bytes = self._bytes, end, self._bytes + size
            return Entry(f"{self._path}: entry {number}", number, start, size, value)

    def _more(self) -> bool:
        rest = self._text[self._at :]
        # As much again as there is, so that a large entry is not decoded over and over.
        block = self._file.read(max(_BLOCK_BYTES, len(rest)))
        self._text, self._at = rest + self._decoder.decode(block, final=not block), 0
        return bool(block)
