"""A media server on loopback that remembers what it was asked for."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.processes import QuietFiles, serving


class _Handler(QuietFiles):
    """A server of files only, which tells the server of each request."""

    server: Site

    def do_GET(self) -> None:  # noqa: N802 - as http.server calls it
        """Note the path, and answer."""
        self.server.asked.append((time.monotonic(), self.path.lstrip("/")))
        super().do_GET()

    def list_directory(self, path: Any) -> None:
        """Serve files only."""
        self.send_error(404)


class Site(ThreadingHTTPServer):
    """The server of a folder; ``url`` is its address, without a slash at the end."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[float, str]] = []

    def requests(self, since: float = 0.0) -> list[str]:
        """Return paths that were asked for from a moment of `time.monotonic` on, in order."""
        return [path for at, path in list(self.asked) if at >= since]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore: a killed client is no error of the server."""


@contextmanager
def site_of(folder: Path) -> Iterator[Site]:
    """Serve a folder on a free port of 127.0.0.1 while the block runs."""
    with serving(Site(folder)) as site:
        yield site
