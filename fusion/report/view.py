"""The text and media of a post with small pictures, for the cards of a report."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from common.errors import MediaError
from fusion.data.data_file import MEDIA_KEYS, local_path

# A few kilobytes each: hundreds of such pictures keep the page below two megabytes.
_THUMBNAIL, _THUMBNAILS = (168, 126), 3
# Media of a card: a post may have hundreds.
_MEDIA = 6
# Decoding takes 3 bytes a pixel: a picture of 180 MB is no help for a thumbnail.
_LARGEST_PIXELS = 60_000_000
# A few lines of a card.
_SHOWN_CHARACTERS = 160
# Names that downloads are kept under.
_DIGEST = re.compile(r"[0-9a-fA-F]{32,}")


@dataclass(frozen=True)
class MediaView:
    """One medium as a card shows it; the address leads to the file, the thumbnail is ``data:``."""

    name: str
    href: str = ""
    thumbnail: str = ""


@dataclass(frozen=True)
class PostView:
    """The part of a post that a page shows."""

    text: str = ""
    media: tuple[MediaView, ...] = ()


def view_post(
    post_id: str,
    entry: Mapping[str, Any],
    *,
    data_file: Path,
    report: Path,
    post_url: str | None,
    thumbnails: bool,
) -> PostView:
    """Return the view of a post in a data file.

    Local paths of its entry are relative to the file; links to them start from the report's folder.
    ``post_url`` is as in `config.train.ReportSettings`.
    """
    text = " ".join((*_listed(entry.get("text")), *_listed(entry.get("ocr"))))
    media: list[MediaView] = []
    if post_url is not None:
        address = post_url.replace("{post_id}", quote(post_id, safe=""))
        media.append(MediaView("open the post", address))
    thumbnails_left = _THUMBNAILS if thumbnails else 0
    for kind, key in MEDIA_KEYS.items():
        for i, source in enumerate(_listed(entry.get(key)), 1):
            href = _href(source, data_file, report) if post_url is None else ""
            path = _local(source, data_file) if kind == "image" and thumbnails_left else None
            small = thumbnail(path) if path is not None else ""
            thumbnails_left -= bool(small)
            if (small or href) and len(media) < _MEDIA:
                media.append(MediaView(media_name(source, kind, i), href, small))
    return PostView(shortened(text), tuple(media))


def shortened(text: str) -> str:
    """Return the beginning of a text, with single spaces for all white space."""
    shown = " ".join(text.split())
    return shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[: _SHOWN_CHARACTERS - 1]}…"


def media_name(source: str, kind: str, number: int) -> str:
    """Return a file's name; of one that is named by its hash, its kind and number in the post."""
    path = Path(source.partition("?")[0])
    if _DIGEST.fullmatch(path.stem) or not path.stem:
        return f"{'picture' if kind == 'image' else kind} {number}"
    return path.name


def thumbnail(path: Path) -> str:
    """Return a small copy of a picture as the model sees it; empty where it cannot be read.

    What is transparent is white there, as in the features.
    """
    # `insighttag --help` imports this module, and must not wait for OpenCV.
    from PIL import Image

    from extractors.media.pictures import read_pictures

    try:
        small = Image.fromarray(next(read_pictures(path, max_pixels=_LARGEST_PIXELS)))
    except (MediaError, OSError):
        return ""  # a report cannot repair the pictures of posts
    small.thumbnail(_THUMBNAIL)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _listed(value: Any) -> Sequence[str]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, str) and v]


def _href(source: str, data_file: Path, report: Path) -> str:
    if source.lower().startswith(("http://", "https://")):  # no other scheme belongs into a link
        return source
    path = _local(source, data_file)
    return "" if path is None else quote(os.path.relpath(path.resolve(), report.resolve()))


def _local(source: str, data_file: Path) -> Path | None:
    """Return the file that a data file names, or None where there is none."""
    path = local_path(source, data_file)
    try:
        return path if path is not None and path.is_file() else None
    except (OSError, ValueError):  # a name that no file system takes
        return None
