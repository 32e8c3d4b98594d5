"""Fetch in tests, and tell how it ended."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from common.errors import FetchRefused, FetchRetryable
from common.post import Media
from config.settings import FetchSettings
from workers.fetch import Fetcher
from workers.protocol import Fetched


def settings_of(**changes: Any) -> FetchSettings:
    values: dict[str, Any] = {
        "allow_private_hosts": True,
        "max_bytes": 1_000_000,
        "connect_timeout_s": 10,
        "read_timeout_s": 10,
        "total_timeout_s": 30,
    }
    return FetchSettings.model_validate(values | changes)


def fetch(media: Media, settings: FetchSettings, folder: Path, name: str) -> Fetched:
    """Download one file; the fetcher is closed."""
    with closing(Fetcher(settings)) as fetcher:
        return fetcher.fetch(media, folder / name)


def get(url: str, folder: Path, **changes: Any) -> bytes:
    fetched = fetch(Media("image", url), settings_of(**changes), folder, "file")
    path = Path(fetched.path)
    content = path.read_bytes()
    assert fetched.size_bytes == len(content)
    assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    return content


def refused(url: str, folder: Path, **changes: Any) -> str:
    """The reason of a permanent failure; nothing stays behind."""
    with pytest.raises(FetchRefused) as caught:
        get(url, folder, **changes)
    assert list(folder.iterdir()) == []
    return str(caught.value)


def retryable(url: str, folder: Path, **changes: Any) -> str:
    """The reason of a passing failure; nothing stays behind."""
    with pytest.raises(FetchRetryable) as caught:
        get(url, folder, **changes)
    assert list(folder.iterdir()) == []
    return str(caught.value)
