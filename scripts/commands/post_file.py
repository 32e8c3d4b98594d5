"""The data-file format: a post as JSON, ``{post_id, text, ocr, images, videos, audios, ...}``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, StrictStr

from common.errors import ConfigError
from common.post import Media, MediaKind, Post
from config.load import validate
from config.settings import Section


class PostEntry(Section):
    """One entry of a data file; unknown keys are refused.

    Attributes:
        images: Local paths or http(s) URLs, as are videos and audios.
        features: Feature file of the entry; other commands read it.
        author: Who made the post, and ``created`` when; other commands read them.
    """

    post_id: StrictStr = Field(min_length=1)
    labels: tuple[str, ...] = ()
    text: str = ""
    ocr: str | None = None
    images: tuple[StrictStr, ...] = ()
    videos: tuple[StrictStr, ...] = ()
    audios: tuple[StrictStr, ...] = ()
    features: str | None = None
    author: str | None = None
    created: str | None = None


def read_posts(path: Path) -> list[Post]:
    """Read a post, or a list of posts.

    Local paths are looked for beside the file first, then in the current folder.

    Raises:
        ConfigError: The file is missing or no JSON, an entry is wrong, or a local media file
            that it names is not there; names the file and the key.
    """
    content = _read(path)
    entries = content if isinstance(content, list) else [content]
    if not entries:
        raise ConfigError(f"{path}: holds no post")
    return [
        post_of(entry, path, f"{path}[{i}]" if isinstance(content, list) else str(path))
        for i, entry in enumerate(entries)
    ]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error


def post_of(content: Any, path: Path, where: str) -> Post:
    """Convert an entry to a post.

    Args:
        content: What JSON made of it.
        path: The file, which local media are looked for beside.
        where: For the error.

    Raises:
        ConfigError: It is not as it should be, or a local media file is not there.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: a post is an object with a post_id")
    entry = validate(PostEntry, content, where)
    kinds: tuple[tuple[MediaKind, str, tuple[str, ...]], ...] = (
        ("image", "images", entry.images),
        ("video", "videos", entry.videos),
        ("audio", "audios", entry.audios),
    )
    media = tuple(
        Media(kind, _source(source, path.parent, f"{where}: {key}.{i}"))
        for kind, key, sources in kinds
        for i, source in enumerate(sources)
    )
    return Post(entry.post_id, text=entry.text, media=media, ocr=entry.ocr, labels=entry.labels)


def _source(source: str, folder: Path, where: str) -> str:
    if urlsplit(source).scheme in {"http", "https"}:
        return source
    for candidate in (folder / source, Path(source)):
        if candidate.is_file():
            return str(candidate)
    raise ConfigError(f"{where}: no such file: {source}")
