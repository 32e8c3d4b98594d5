"""A media server on loopback that remembers what it was asked for."""

from __future__ import annotations

import functools
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any


class _Handler(SimpleHTTPRequestHandler):
    """A server of files only, which tells the server of each request."""

    server: _Server

    def do_GET(self) -> None:
        """Answer, after the server's delay."""
        path = self.path.lstrip("/")
        time.sleep(self.server.delay_s)
        self.server.note(path)
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def list_directory(self, path: Any) -> None:
        """Serve files only."""
        self.send_error(404)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    delay_s = 0.0

    def __init__(self, folder: Path) -> None:
        handler = functools.partial(_Handler, directory=str(folder))
        super().__init__(("127.0.0.1", 0), handler)
        self._lock = threading.Lock()
        self.requests: list[tuple[float, str]] = []

    def note(self, path: str) -> None:
        with self._lock:
            self.requests.append((time.monotonic(), path))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore: a killed client is no error of the server."""


class Site:
    """A server of a folder on a free port of 127.0.0.1 while the block runs."""

    def __init__(self, folder: Path) -> None:
        """Describe it; starts nothing."""
        self.folder = folder
        self._server: _Server | None = None

    @property
    def server(self) -> _Server:
        """Return the running server.

        Raises:
            RuntimeError: It does not run.
        """
        if self._server is None:
            raise RuntimeError("the media server does not run")
        return self._server

    @property
    def url(self) -> str:
        """Return the address of the folder, without a slash at the end."""
        return f"http://127.0.0.1:{self.server.server_port}"

    def requests(self, since: float = 0.0) -> list[str]:
        """Return paths that were asked for from a moment of `time.monotonic` on, in order."""
        return [path for at, path in list(self.server.requests) if at >= since]

    def __enter__(self) -> Site:
        """Start serving."""
        self._server = _Server(self.folder)
        threading.Thread(target=self._server.serve_forever, name="media", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()
        self._server = None
