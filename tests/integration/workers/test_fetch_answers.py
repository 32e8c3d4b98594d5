"""Results of downloads: the content's hash, and the wait before the next try."""

import hashlib
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from common.errors import FetchRetryable
from common.post import Media
from config.settings import FetchSettings
from tests.support.workers.fetching import fetch
from tests.support.workers.web import Web, web_server
from workers.fetch import Fetcher, seconds_of

SETTINGS = FetchSettings(allow_private_hosts=True, total_timeout_s=5)


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as server:
        yield server


def test_content_is_hashed_as_it_comes(web: Web, tmp_path: Path) -> None:
    """The hash is that of the file, also of one that was packed on the way."""
    for name in ("ok", "gzip", "chunked"):
        fetched = fetch(Media("image", web.url(f"/{name}")), SETTINGS, tmp_path, name)
        assert fetched.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_the_content_counts_not_its_declared_type(web: Web, tmp_path: Path) -> None:
    """A picture that is sent as text/html is a picture."""
    fetched = fetch(Media("image", web.url("/mislabelled/")), SETTINGS, tmp_path, "a")
    assert Path(fetched.path).read_bytes().startswith(b"\x89PNG")


def test_who_waits_longer_asks_for_one_try(web: Web, tmp_path: Path) -> None:
    """With one try there is one request, and the error tells what a wait needs to know."""
    fetcher = Fetcher(SETTINGS)
    before = len(web.paths)
    with pytest.raises(FetchRetryable, match="HTTP 429") as caught:
        fetcher.fetch(Media("image", web.url("/status/429")), tmp_path / "a", tries=1)
    assert len(web.paths) == before + 1
    assert (caught.value.retry_after_s, caught.value.unreachable) == (None, False)
    with pytest.raises(FetchRetryable) as caught:
        fetcher.fetch(Media("image", "http://127.0.0.1:1/x"), tmp_path / "a", tries=1)
    assert caught.value.unreachable
    fetcher.close()


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("7", 7, 7), (" 0 ", 0, 0), ("Fri, 01 Jan 2010 00:00:00 GMT", 0, 0), ("in 100 s", 60, 101)],
)
def test_retry_after_is_seconds_or_a_date(text: str, low: float, high: float) -> None:
    """Both forms of the header; a date that is over is no wait."""
    if text == "in 100 s":
        text = formatdate(time.time() + 100, usegmt=True)
    seconds = seconds_of(text)
    assert seconds is not None
    assert low <= seconds <= high


@pytest.mark.parametrize("text", ["", "soon", "-5", "1.5", "\u0663"])
def test_retry_after_of_another_form_is_none(text: str) -> None:
    assert seconds_of(text) is None
