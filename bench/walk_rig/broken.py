"""Demo posts as a platform's database holds them, some broken in ways that are written down.

`plant` makes documents out of the entries of a demo data file and breaks some: the media that they
name are spoilt on the server's disk, their URLs lead nowhere, their labels are wrong. `cut_lines`
breaks lines of a posts file later, as a full disk or a careless editor does. The same seed breaks
the same posts in the same way.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np

Step: TypeAlias = Literal["pull", "download", "extract image", "extract video", "build"]
Document: TypeAlias = dict[str, Any]

FIRST_CREATED = datetime(2026, 1, 1, tzinfo=timezone.utc)
UNKNOWN_TAG = "sunshien"
AUTHORS_PER_POST = 2.0
BOMB_SIDE = 20_000
"""Pixels; the picture is 400 million of them in a file of 50 kB."""

_FOLDER = "broken"
_KEYS = ("images", "videos", "audios")


@dataclass(frozen=True)
class Way:
    """One way of being broken.

    Attributes:
        found_by: The step whose output must name the post.
        says: Part of the reason that it must give.
    """

    found_by: Step
    says: str


WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "nothing to tag": Way("pull", "neither text nor media"),
        "line cut off": Way("download", "not JSON"),
        "dead link": Way("download", "HTTP 404"),
        "dead host": Way("download", "refused"),
        "file:// URL": Way("download", "pass --local to copy it"),
        "empty file": Way("download", "empty"),
        "page, no media": Way("download", "no media"),
        "video named .jpg": Way("download", "is not a picture"),
        "truncated MP4": Way("download", "truncated MP4"),
        "picture bomb": Way("extract image", "pixels"),
        "garbled MP4": Way("extract video", "video"),
        "no labels": Way("build", "no labels"),
        "unknown tag": Way("build", UNKNOWN_TAG),
    }
)


@dataclass(frozen=True)
class Plant:
    """A post that was broken.

    Attributes:
        source: URL of the spoilt medium; empty where none was spoilt.
    """

    post_id: str
    way: str
    source: str = ""


@dataclass(frozen=True)
class Site:
    """Folder and URL of the media.

    Attributes:
        folder: That the media server serves; the entries' paths are relative to it.
        url: Of the server.
        dead_url: Of a server that is not there.
    """

    folder: Path
    url: str
    dead_url: str


def plant(
    entries: Sequence[Mapping[str, Any]], site: Site, count: int, seed: int
) -> tuple[list[Document], list[Plant]]:
    """Make documents of all entries and break `count` of them, each way as often as any other.

    Args:
        entries: Of a demo data file.
        site: Where their media are.
        count: At most half of the posts.
        seed: Another seed, other posts.

    Returns:
        The documents in the order of the entries, and what was broken, in the same order.

    Raises:
        ValueError: More are to be broken than there are.
        OSError: The site's folder cannot be written.
    """
    rng = np.random.default_rng((seed, 7))
    documents = [
        _document(entry, i, site.url, len(entries), rng) for i, entry in enumerate(entries)
    ]
    videos = [name for entry in entries for name in entry["videos"]]
    if count > len(entries) // 2 or not videos:
        raise ValueError(f"{len(entries)} posts: too few to break {count}")
    chosen = sorted(int(i) for i in rng.choice(len(documents), count, replace=False))
    ways = [list(WAYS)[int(k) % len(WAYS)] for k in rng.permutation(count)]
    (site.folder / _FOLDER).mkdir(exist_ok=True)
    plants = []
    for index, way in zip(chosen, ways, strict=True):
        content = (site.folder / videos[int(rng.integers(len(videos)))]).read_bytes()
        source = _break(documents[index], way, site, content, rng)
        plants.append(Plant(documents[index]["_id"], way, source))
    return documents, plants


def cut_lines(posts: Path, plants: Sequence[Plant]) -> dict[str, int]:
    """Cut the lines of a posts file that were planted for it to half of their length.

    Returns:
        post_id -> number of its line, from 1.

    Raises:
        OSError: The file cannot be read or written.
    """
    cut = {p.post_id for p in plants if p.way == "line cut off"}
    numbers: dict[str, int] = {}
    lines = posts.read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        post_id = json.loads(line)["post_id"]
        if post_id in cut:
            numbers[post_id] = i + 1
            lines[i] = line[: len(line) // 2]
    posts.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return numbers


def _document(
    entry: Mapping[str, Any], index: int, url: str, posts: int, rng: np.random.Generator
) -> Document:
    author = int(rng.integers(max(1, round(posts * AUTHORS_PER_POST))))
    return {
        "_id": entry["post_id"],
        "text": entry["text"],
        **{key: [f"{url}/{name}" for name in entry[key]] for key in _KEYS},
        "labels": list(entry["labels"]),
        "author": f"author-{author:05}",
        "created": FIRST_CREATED + timedelta(minutes=index),
    }


def _break(document: Document, way: str, site: Site, video: bytes, rng: np.random.Generator) -> str:
    """Break one document; gives the URL that was put into it."""
    name = document["_id"]
    if way == "nothing to tag":
        document.update({"text": " \n\t", "images": [], "videos": [], "audios": []})
    elif way == "no labels":
        document["labels"] = []
    elif way == "unknown tag":
        document["labels"] = [UNKNOWN_TAG]
    elif way == "dead link":
        return _put(document, "images", f"{site.url}/{_FOLDER}/{name}-gone.jpg")
    elif way == "dead host":
        return _put(document, "images", f"{site.dead_url}/{name}.jpg")
    elif way == "file:// URL":
        return _put(document, "images", f"file:///etc/hostname?{name}")
    elif way in _SPOILT:
        key, suffix, spoil = _SPOILT[way]
        path = f"{_FOLDER}/{name}.{suffix}"
        (site.folder / path).write_bytes(spoil(video, rng))
        return _put(document, key, f"{site.url}/{path}")
    return ""


def _put(document: Document, key: str, url: str) -> str:
    """Let a URL stand in the place of the first medium of its kind, or be the only one."""
    document[key] = [url, *document[key][1:]]
    return url


def bomb() -> bytes:
    """Return a PNG of one colour with `BOMB_SIDE` squared pixels of one bit."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 1, 0, 0, 0, 0))
    pixels = zlib.compress(bytes((BOMB_SIDE // 8 + 1) * BOMB_SIDE), 9)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _page(video: bytes, rng: np.random.Generator) -> bytes:
    return b"<!DOCTYPE html>\n<html><body><h1>Please log in</h1></body></html>\n"


def _garble(video: bytes, rng: np.random.Generator) -> bytes:
    """Put noise in the place of all samples; sizes and index of the file stay right."""
    start = video.find(b"mdat") + 4
    length = struct.unpack(">I", video[start - 8 : start - 4])[0] - 8
    return video[:start] + rng.bytes(length) + video[start + length :]


def _cut(video: bytes, rng: np.random.Generator) -> bytes:
    return video[: int(len(video) * rng.uniform(0.3, 0.8))]


_Spoil: TypeAlias = Callable[[bytes, np.random.Generator], bytes]
_SPOILT: Mapping[str, tuple[str, str, _Spoil]] = MappingProxyType(
    {
        "empty file": ("images", "png", lambda video, rng: b""),
        "page, no media": ("images", "jpg", _page),
        "video named .jpg": ("images", "jpg", lambda video, rng: video),
        "truncated MP4": ("videos", "mp4", _cut),
        "picture bomb": ("images", "png", lambda video, rng: bomb()),
        "garbled MP4": ("videos", "mp4", _garble),
    }
)
