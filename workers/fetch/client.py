"""Download one media file into a folder, under limits, from hosts that may be reached.

A post's URLs come from anybody: the other side chooses the target, the size, the encoding and the
speed, so each of these is bounded here.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from common.errors import FetchRefused, FetchRetryable
from config.settings import FetchSettings
from workers.fetch.guard import Expired, ForbiddenAddress, Guard, Unreachable, guarded_session
from workers.protocol import Fetched, Media

FETCH_TRIES = 2
"""Tries close together: the second is for a kept-alive connection that the server has just closed.
More belong to the King, which waits longer between them."""


_CHUNK_BYTES = 1 << 16
"""Bytes of one read, and the most that one unpacked chunk of a bomb may grow to. Smaller ones cost
time in Python, larger ones memory on each of the connections."""

_PAUSE_S = 0.2
"""Pause before the second try: long enough for a server that restarts a worker, short against the
time that a download takes."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_RETRYABLE = frozenset({408, 425, 429})
_MAX_URL = 8192
"""Longer URLs are refused; browsers and servers stop at about as many characters."""

_NO_MEDIA = frozenset({"application/json", "application/xhtml+xml", "application/xml"})
_BAD_URL = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidHeader,
    requests.exceptions.InvalidSchema,
    urllib3.exceptions.LocationValueError,
)


class Fetcher:
    """Downloads for one thread; connections are kept alive between downloads."""

    def __init__(self, settings: FetchSettings) -> None:
        self._settings = settings
        self._guard = Guard(allow_private=settings.allow_private_hosts)
        self._session = guarded_session(self._guard, user_agent=settings.user_agent)

    def fetch(self, media: Media, target: Path, *, tries: int = FETCH_TRIES) -> Fetched:
        """Download to a file that must not exist yet.

        Args:
            media: What to download.
            target: Where to.
            tries: Attempts in all, close together; who waits longer between them asks for one.

        Raises:
            FetchRetryable: It may succeed later: time-out, broken connection, HTTP 408, 429, 5xx.
            FetchRefused: It must not or cannot be had.
        """
        with self._guard.clock(self._settings.total_timeout_s):
            for left in range(tries - 1, -1, -1):
                try:
                    return self._try(media.source, target)
                except FetchRetryable:
                    target.unlink(missing_ok=True)
                    if not left or self._guard.left_s <= _PAUSE_S:
                        raise
                    self._guard.pause(_PAUSE_S)
                except BaseException:
                    target.unlink(missing_ok=True)
                    raise
        raise FetchRetryable("no try was made")  # not reached: tries is positive

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def _try(self, url: str, target: Path) -> Fetched:
        try:
            with closing(self._open(url)) as response:
                return self._save(response, target)
        except ForbiddenAddress as error:
            raise FetchRefused(str(error)) from error
        except Unreachable as error:
            retryable = FetchRetryable(self._cut_or(str(error)))
            retryable.unreachable = True
            raise retryable from error
        except Expired as error:
            raise FetchRetryable(self._cut_or("")) from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise self._mapped(error) from error
        except (ValueError, UnicodeError) as error:  # http.client and idna on strange URLs
            raise FetchRefused("not a URL that can be requested") from error

    def _open(self, url: str) -> requests.Response:
        """Return the answer at the end of the redirects, its body still to be read."""
        for _ in range(self._settings.max_redirects + 1):
            _check_url(url)
            response = self._session.get(
                url,
                stream=True,
                allow_redirects=False,  # each target is checked like the first
                timeout=(self._settings.connect_timeout_s, self._settings.read_timeout_s),
            )
            location = response.headers.get("Location")
            if response.status_code not in _REDIRECTS or not location:
                return response
            response.close()  # not read: the body of a redirect may be endless
            # Header bytes come as Latin-1; a path that was sent as it is written is UTF-8.
            location = location.encode("latin-1", "replace").decode("utf-8", "replace")
            url = urljoin(url, location)
        raise FetchRefused(f"more than {self._settings.max_redirects} redirects")

    def _save(self, response: requests.Response, target: Path) -> Fetched:
        status = response.status_code
        if status != 200:
            if status not in _RETRYABLE and status < 500:
                raise FetchRefused(f"HTTP {status}")
            retryable = FetchRetryable(f"HTTP {status}")
            retryable.retry_after_s = seconds_of(response.headers.get("Retry-After", ""))
            raise retryable
        content_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if content_type.startswith("text/html") or content_type in _NO_MEDIA:
            raise FetchRefused(f"content type {content_type[:60]} is no media")
        length = response.headers.get("Content-Length", "")
        if length.isdigit() and int(length[:20]) > self._settings.max_bytes:
            raise self._too_large()
        size, digest = 0, hashlib.sha256()
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                for chunk in _decoded(response):
                    size += len(chunk)
                    if size > self._settings.max_bytes:
                        raise self._too_large()
                    digest.update(chunk)
                    file.write(chunk)
        except OSError as error:
            raise FetchRetryable(f"spool: {error.strerror or error}") from error
        if self._guard.expired:
            raise Expired  # a body without a length ends where the clock has cut it
        if not size:
            raise FetchRefused("the answer is empty")
        return Fetched(str(target), size, digest.hexdigest())

    def _too_large(self) -> FetchRefused:
        return FetchRefused(f"larger than fetch.max_bytes ({self._settings.max_bytes})")

    def _cut_or(self, message: str) -> str:
        expired = self._guard.expired or self._guard.left_s <= 0 or not message
        return f"timed out after {self._settings.total_timeout_s:g} s" if expired else message

    def _mapped(self, error: Exception) -> FetchRetryable | FetchRefused:
        """Return our error; never the library's text, which may hold the URL."""
        if self._guard.expired:
            return FetchRetryable(self._cut_or(""))
        if isinstance(error, (requests.exceptions.SSLError, urllib3.exceptions.SSLError)):
            return FetchRefused("the TLS connection cannot be trusted or agreed on")
        if isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError)):
            return FetchRetryable(f"timed out after {self._settings.read_timeout_s:g} s")
        if isinstance(
            error, (requests.exceptions.InvalidURL, urllib3.exceptions.LocationValueError)
        ):
            return FetchRefused("not a URL that can be requested")
        if isinstance(
            error, (requests.exceptions.InvalidHeader, requests.exceptions.InvalidSchema)
        ):
            return FetchRefused("not a URL that can be requested")
        return FetchRetryable("the connection broke")


def _check_url(url: str) -> None:
    if len(url) > _MAX_URL or any(ord(char) < 0x20 or char == "\x7f" for char in url):
        raise FetchRefused("not a URL that can be requested")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise FetchRefused(f"scheme {parts.scheme[:20]!r} is not http or https")
    if not parts.hostname:
        raise FetchRefused("the URL names no host")


def seconds_of(retry_after: str) -> float | None:
    """Return the header Retry-After, seconds or a date, in seconds; None for anything else."""
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        moment = parsedate_to_datetime(text)
        return max(0.0, moment.timestamp() - time.time())
    except (TypeError, ValueError, OverflowError, OSError):
        return None


class _Unpacker(Protocol):
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...

    @property
    def unconsumed_tail(self) -> bytes: ...


def _decoded(response: requests.Response) -> Iterator[bytes]:
    """Yield the body in chunks of bounded size, unpacked if the server packed it unasked.

    urllib3 unpacks a chunk whole, however large it becomes; here a bomb costs one chunk.
    """
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    chunks: Iterator[bytes] = response.raw.stream(_CHUNK_BYTES, decode_content=False)
    if encoding in ("", "identity"):
        yield from chunks
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise FetchRefused(f"content encoding {encoding[:20]!r} was not asked for")
    unpacker: _Unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, by its header
    try:
        for chunk in chunks:
            left = chunk
            while left:
                yield unpacker.decompress(left, _CHUNK_BYTES)
                left = unpacker.unconsumed_tail
    except zlib.error as error:
        raise FetchRefused(f"content encoding {encoding}: the body is broken") from error


def fetch(media: Media, settings: FetchSettings, folder: Path, name: str) -> Fetched:
    """Download one media file in this process (see `Fetcher.fetch`)."""
    fetcher = Fetcher(settings)
    try:
        return fetcher.fetch(media, folder / name)
    finally:
        fetcher.close()
