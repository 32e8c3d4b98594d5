"""A real HTTP server on loopback that answers as badly as the path asks."""

import gzip
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

from tests.support.processes import Answers, Site, serving

# Longer than what is unpacked at a time: only then is there more to unpack at the end of a member.
BODY = bytes(range(256)) * 400


class Web(Site):
    """Counts connections, and remembers the headers it got."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.headers: list[dict[str, str]] = []
        self.connections = 0

    def get_request(self) -> tuple[socket.socket, Any]:
        self.connections += 1
        return super().get_request()


class _Handler(Answers):
    server: Web

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.server.headers.append(dict(self.headers))
        super().do_GET()

    def do_ok(self, rest: str) -> None:
        self.answer(BODY, Content_Type="image/png", Set_Cookie="a=b")

    def do_html(self, rest: str) -> None:
        self.answer(b"<html>", Content_Type="text/html; charset=utf-8")

    def do_mislabelled(self, rest: str) -> None:
        """A picture of a server that calls everything a page."""
        self.answer(b"\x89PNG\r\n\x1a\n" + BODY, Content_Type="text/html; charset=utf-8")

    def do_redirect(self, rest: str) -> None:
        more = int(rest)
        target = f"/redirect/{more - 1}" if more else "/ok"
        self.answer(b"x" * 10, 302, Location=target)

    def do_to(self, rest: str) -> None:
        self.answer(b"", 301, Location=unquote(rest).encode().decode("latin-1"))

    def do_aside(self, rest: str) -> None:
        """A redirect whose body never ends."""
        self.close_connection = True
        self.send_response(302)
        self.send_header("Location", "/ok")
        self.end_headers()
        while True:
            self.wfile.write(b"z" * 65536)

    def do_latin(self, rest: str) -> None:
        """A redirect to a path that is not UTF-8 and was not quoted."""
        self.answer(b"", 302, Location="/ok/caf\xe9")

    def do_interim(self, rest: str) -> None:
        """Early hints, before the answer."""
        self.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 2)
        self.answer(BODY)

    def do_lengths(self, rest: str) -> None:
        self.answer(BODY[:5], Content_length="6")

    def do_badchunk(self, rest: str) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"-5\r\nabc\r\n0\r\n\r\n")

    def do_endless(self, rest: str) -> None:
        """No length, never ends."""
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(b"z" * 65536)

    def do_lies(self, rest: str) -> None:
        """Promises little, in chunks of much more."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b"10000\r\n" + b"c" * 65536 + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def do_chunked(self, rest: str) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n")

    def do_gzip(self, rest: str) -> None:
        self.answer(gzip.compress(BODY), Content_Encoding="gzip")

    def do_stray(self, rest: str) -> None:
        """A byte behind the packed body."""
        self.answer(gzip.compress(BODY) + b"x", Content_Encoding="gzip")

    def do_cutzip(self, rest: str) -> None:
        self.answer(gzip.compress(BODY)[:-1], Content_Encoding="gzip")

    def do_hollow(self, rest: str) -> None:
        """Members without content, for as long as somebody reads."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        while True:
            self.wfile.write(gzip.compress(b"") * 1000)

    def do_deflate(self, rest: str) -> None:
        self.answer(zlib.compress(BODY), Content_Encoding="deflate")

    def do_bomb(self, rest: str) -> None:
        self.answer(gzip.compress(b"\0" * 50_000_000), Content_Encoding="gzip")

    def do_brotli(self, rest: str) -> None:
        self.answer(b"x", Content_Encoding="br")

    def do_badzip(self, rest: str) -> None:
        self.answer(b"this is no gzip", Content_Encoding="gzip")

    def do_slow(self, rest: str) -> None:
        """Answers after a while."""
        time.sleep(float(rest))
        self.answer(BODY)

    def do_drip(self, rest: str) -> None:
        """A byte of the body now and then: each read is quick, the whole is not."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        for _ in range(200):
            self.wfile.write(b"d")
            time.sleep(0.05)

    def do_driphead(self, rest: str) -> None:
        """The same, in the headers."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        for _ in range(200):
            self.wfile.write(b"h")
            time.sleep(0.05)

    def do_reset(self, rest: str) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_flaky(self, rest: str) -> None:
        """Fails the first time."""
        if self.server.paths.count(self.path) % 2:
            self.answer(b"", 503)
        else:
            self.answer(BODY)


@contextmanager
def web_server() -> Iterator[Web]:
    with serving(Web()) as server:
        yield server
