"""Python in a process of its own, and HTTP servers in threads."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
Server = TypeVar("Server", bound=ThreadingHTTPServer)


def ran(
    *command: str, check: bool = False, cwd: Path = ROOT, timeout_s: float = 120, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; ``more`` goes to `subprocess.run`."""
    more |= {"capture_output": True, "text": True, "timeout": timeout_s}
    return subprocess.run(command, check=check, cwd=cwd, **more)


def python(
    *arguments: str, check: bool = False, timeout_s: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in the project's folder, with some variables of the environment set."""
    env = {**os.environ, **environment}
    return ran(sys.executable, *arguments, check=check, timeout_s=timeout_s, env=env)


@contextmanager
def limited_to(most: int, what: int = resource.RLIMIT_FSIZE) -> Iterator[None]:
    """Limit this process while the block runs: the size of files, as a full disk would."""
    limits = resource.getrlimit(what)
    resource.setrlimit(what, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, limits)


def no_descriptors() -> AbstractContextManager[None]:
    """Nothing can be opened in this process while the block runs."""
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    return limited_to(free, resource.RLIMIT_NOFILE)


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Serve in a thread until the block ends."""
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Site(ThreadingHTTPServer):
    """A server on loopback that answers as badly as the path asks: ``/VERB/REST``.

    Attributes:
        paths: Everything that was asked for, in order.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.paths: list[str] = []

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what the tests are about."""


class Answers(BaseHTTPRequestHandler):
    """Answers of a `Site`: ``do_VERB`` gets the rest of the path."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        verb, _, rest = self.path.lstrip("/").partition("/")
        with suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, f"do_{verb}")(rest)

    def answer(
        self, body: bytes, status: int = 200, length: int | None = None, **headers: str
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_status(self, rest: str) -> None:
        self.answer(b"no", int(rest))

    def do_empty(self, rest: str) -> None:
        self.answer(b"")

    def do_short(self, rest: str) -> None:
        """Promises more than it sends."""
        self.close_connection = True
        self.answer(b"half", length=1000)


class QuietFiles(SimpleHTTPRequestHandler):
    """The files of a folder, without a log line for each request."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def file_server(folder: Path) -> Iterator[str]:
    """Serve a folder on a loopback port; its URL."""
    handler = partial(QuietFiles, directory=str(folder))
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as server:
        yield f"http://127.0.0.1:{server.server_port}"
