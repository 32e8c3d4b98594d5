"""Sources of media files: a URL for the downloader, or a file that is read in place."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from common.errors import FetchRefused
from workers.protocol import Fetched


def is_url(source: str) -> bool:
    """Tell whether a source is to be downloaded; ``C:/a.png`` and ``a.png`` are paths."""
    try:
        return len(urlsplit(source).scheme) > 1
    except ValueError:  # a broken host in brackets: the downloader says what is wrong with it
        return "://" in source


def local_file(source: str, *, root: Path | None = None) -> Fetched:
    """Return a file that is read in place.

    Args:
        source: Its path.
        root: The only folder whose files may be read, links followed; None: any.

    Raises:
        FetchRefused: There is no such file, or it lies elsewhere.
    """
    path = Path(source)
    try:
        if root is not None and path.resolve().parent != root.resolve():
            raise FetchRefused("a local path is no source of media here")
        if not path.is_file():
            raise FetchRefused(f"{path}: no such file")
        return Fetched(str(path), path.stat().st_size)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, a loop of links
        raise FetchRefused(f"{path}: {getattr(error, 'strerror', None) or error}") from error
