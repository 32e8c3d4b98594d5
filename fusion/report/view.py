"""The text, links and small pictures of a post, for the cards of a report."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from common.errors import MediaError
from extractors.media.pictures import read_pictures
from fusion.data.data_file import local_path

# A few kilobytes each: 40 cards of three such pictures keep the page below a megabyte.
_THUMBNAIL, _THUMBNAILS = (160, 120), 3
# Decoding takes 3 bytes a pixel: a picture of 180 MB is no help for a thumbnail.
_LARGEST_PIXELS = 60_000_000
# A few lines of a card.
_SHOWN_CHARACTERS = 280


@dataclass(frozen=True)
class PostView:
    """The part of a post that the page shows.

    Links are texts and addresses, of the post or of its local files; thumbnails small pictures,
    JPEG as ``data:`` addresses.
    """

    text: str = ""
    links: tuple[tuple[str, str], ...] = ()
    thumbnails: tuple[str, ...] = ()


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
    sources = [
        (kind, source)
        for kind in ("images", "videos", "audios", "features")
        for source in _listed(entry.get(kind))
    ]
    if post_url is not None:
        links = [("post", post_url.replace("{post_id}", quote(post_id, safe="")))]
    else:
        links = [
            (f"{kind.removesuffix('s')} {Path(source).name}", href)
            for kind, source in sources
            if (href := _href(source, data_file, report))
        ]
    small: list[str] = []
    if thumbnails:
        pictures = [_local(source, data_file) for kind, source in sources if kind == "images"]
        made = (_thumbnail(path) for path in pictures[: 2 * _THUMBNAILS] if path is not None)
        small = [address for address in made if address is not None][:_THUMBNAILS]
    shown = " ".join(text.split())
    if len(shown) > _SHOWN_CHARACTERS:
        shown = f"{shown[:_SHOWN_CHARACTERS]}…"
    return PostView(shown, tuple(links), tuple(small))


def _listed(value: Any) -> Sequence[str]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, str) and v]


def _href(source: str, data_file: Path, report: Path) -> str | None:
    if source.lower().startswith(("http://", "https://")):  # no other scheme belongs into a link
        return source
    path = _local(source, data_file)
    if path is None:
        return None
    return quote(os.path.relpath(path.resolve(), report.resolve()))


def _local(source: str, data_file: Path) -> Path | None:
    """Return the file that a data file names, or None where there is none."""
    path = local_path(source, data_file)
    try:
        return path if path is not None and path.is_file() else None
    except (OSError, ValueError):  # a name that no file system takes
        return None


def _thumbnail(path: Path) -> str | None:
    """Return a small copy of a picture as the model sees it, or None where it cannot be read."""
    from PIL import Image

    try:
        small = Image.fromarray(next(read_pictures(path, max_pixels=_LARGEST_PIXELS)))
    except MediaError:
        return None  # a report cannot repair the pictures of posts
    small.thumbnail(_THUMBNAIL)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
