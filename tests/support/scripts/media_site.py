"""A loopback media server for the downloading tests: counts requests, answers slowly or badly."""

import json
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import Answers, Site, serving


def png(seed: int, size_bytes: int = 400) -> bytes:
    """A small PNG picture, another one for each seed, padded with a text chunk."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    pixel = zlib.compress(b"\0" + seed.to_bytes(3, "big"))
    body = chunk(b"IHDR", header) + chunk(b"IDAT", pixel)
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"tEXt", b"a\0" + b"x" * size_bytes)


def wav(seconds: float = 0.1) -> bytes:
    data = b"\0\0" * int(16000 * seconds)
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16)
    body = b"WAVE" + form + struct.pack("<4sI", b"data", len(data)) + data
    return struct.pack("<4sI", b"RIFF", len(body)) + body


class MediaSite(Site):
    """``/png/N`` a picture, ``/same/N`` always one picture, and the bad ones of `_Handler`.

    Attributes:
        requests: Path ─► how often it was asked for.
        delay_s: Before each answer.
        at_once: Most requests that were being answered at a time.
    """

    def __init__(self, delay_s: float = 0.0) -> None:
        super().__init__(_Handler)
        self.requests: Counter[str] = Counter()
        self.times: list[tuple[str, float]] = []
        self.delay_s = delay_s
        self.at_once = self._now = 0
        self.lock = threading.Lock()

    @contextmanager
    def answering(self, path: str) -> Iterator[None]:
        with self.lock:
            self.requests[path] += 1
            self.times.append((path, time.monotonic()))
            self._now += 1
            self.at_once = max(self.at_once, self._now)
        try:
            yield
        finally:
            with self.lock:
                self._now -= 1


class _Handler(Answers):
    server: MediaSite

    def do_GET(self) -> None:
        with self.server.answering(self.path):
            time.sleep(self.server.delay_s)
            super().do_GET()

    def do_png(self, rest: str) -> None:
        self.answer(png(int(rest)))

    def do_large(self, rest: str) -> None:
        self.answer(png(int(rest), 150_000))

    def do_same(self, rest: str) -> None:
        self.answer(png(0))

    def do_wav(self, rest: str) -> None:
        self.answer(wav())

    def do_cutwav(self, rest: str) -> None:
        """A whole answer, but half a file."""
        self.answer(wav()[:1600])

    def do_html(self, rest: str) -> None:
        """A page that says it is a picture."""
        self.answer(b"<html><body>gone</body></html>", Content_Type="image/png")

    def do_flaky(self, rest: str) -> None:
        """Fails so many times, then works."""
        if self.server.requests[self.path] <= int(rest):
            self.answer(b"", 503)
        else:
            self.answer(png(7))

    def do_later(self, rest: str) -> None:
        """Asks to be left alone for so many seconds, once."""
        if self.server.requests[self.path] == 1:
            self.answer(b"", 429, Retry_After=rest)
        else:
            self.answer(png(8))


@contextmanager
def media_site(delay_s: float = 0.0) -> Iterator[MediaSite]:
    with serving(MediaSite(delay_s)) as server:
        yield server


def write_posts(path: Path, media: Sequence[Sequence[str]], kind: str = "images") -> Path:
    """A posts file: a post for each list of sources."""
    lines = [
        json.dumps({"post_id": f"p{i}", "labels": ["a"], "text": f"text {i}", kind: list(sources)})
        for i, sources in enumerate(media)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
