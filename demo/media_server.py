"""A quiet HTTP server on loopback for the demo's media, so that the download is real."""

from __future__ import annotations

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the daemon logs its own downloads."""

    def list_directory(self, path: Any) -> None:
        """Serve files only."""
        self.send_error(404)


class MediaServer:
    """A server of a folder on a free port of 127.0.0.1 while the block runs."""

    def __init__(self, folder: Path) -> None:
        """Describe it; starts nothing."""
        self._folder = folder
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        """Return the URL of the folder, without a slash at the end.

        Raises:
            RuntimeError: The server is not started.
        """
        if self._server is None:
            raise RuntimeError("the server is not started")
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> MediaServer:
        """Start serving."""
        handler = functools.partial(_Quiet, directory=str(self._folder))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="media", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
