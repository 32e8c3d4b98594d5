"""A gunicorn worker whose threads are given requests that have arrived, and no halves of any.

gunicorn's own gthread worker reads the headers in a thread and without a deadline: as many half
requests as there are threads silence it. Here the loop that accepts connections reads them as well:

    accepted -> head -> short body -> thread -> next head, or goodbye
                 |                      ^
                 '----- long body ------'  at most half of the threads at once

A long body is read by a thread, since it is streamed into the spool, and `web.reading` ends it in
time. So half of the threads always answer what is short, however slow the others' clients are.
"""

from __future__ import annotations

import fcntl
import json
import re
import selectors
import socket
import struct
import sys
import termios
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any, ClassVar

from gunicorn.workers.gthread import TConn, ThreadWorker

from config.settings import HttpSettings

# The most bytes of a head. Real ones have one or two KiB, and some four of cookies; at double, a
# thousand half requests hold 128 MB.
_MAX_HEAD_BYTES = 64 * 1024
# A body up to this is awaited here. Posts of URLs are shorter; at double, see above.
_MAX_SHORT_BYTES = 64 * 1024
# After the last answer, the client is given this long to close first: bytes of it that were not
# read would make the kernel throw our answer away.
_GOODBYE_S = 2.0
# An answer of which the client takes nothing for this time is given up: it holds a thread. At half,
# a bad line loses answers; at double, clients that take none silence us for longer.
_SEND_S = 10
# A client that asks for more while so much of its answers is untaken is cut off, before they fill
# the kernel's buffer and hold threads. Half is one list of a thousand tags; double may be too much.
_MAX_UNTAKEN_BYTES = 64 * 1024

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,5})[ \t]*\r\n", re.IGNORECASE)
# Whatever else stands for a length takes the way of long bodies: gunicorn may read it as one.
_STREAMED = re.compile(
    rb"\r\n(transfer-encoding|expect|content-length(?!:[ \t]*\d{1,5}[ \t]*\r\n))[ \t]*:",
    re.IGNORECASE,
)


@dataclass
class _Arrival:
    """A connection whose next request is arriving, or whose end is awaited.

    ``end`` is the number of bytes that make the request whole, None before its head is there.
    """

    deadline: float
    data: bytearray = field(default_factory=bytearray)
    end: int | None = None
    is_leaving: bool = False


class ArrivalsWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """See the module; `worker_class` binds the settings."""

    http: ClassVar[HttpSettings]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._arriving: dict[Any, _Arrival] = {}
        self._arrived: dict[Any, bytes] = {}
        self._long: set[Any] = set()  # connections with a long body in a thread
        self._queue: deque[tuple[float, Any, bytes]] = deque()  # those that wait for one

    def accept(self, listener: Any) -> None:
        try:
            connection, client = listener.accept()
        except OSError:  # gone already, or no descriptor is left
            return
        limit = struct.pack("ll", _SEND_S, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self.nr_conns += 1
        conn = TConn(self.cfg, connection, client, listener.getsockname())
        self._await_request(conn, self.http.header_timeout_s)

    def _await_request(self, conn: Any, limit_s: float, data: bytes = b"") -> None:
        conn.sock.setblocking(False)
        arrival = _Arrival(time.monotonic() + limit_s, bytearray(data))
        self._arriving[conn] = arrival
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._read, conn))
        if data:
            self._go_on(conn, arrival)

    def _read(self, conn: Any, _sock: Any) -> None:
        arrival = self._arriving[conn]
        try:
            data = conn.sock.recv(_MAX_HEAD_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end(conn)
        elif not arrival.is_leaving:
            if not arrival.data:  # the first bytes on a connection that was kept alive
                arrival.deadline = time.monotonic() + self.http.header_timeout_s
            arrival.data += data
            self._go_on(conn, arrival)

    def _go_on(self, conn: Any, arrival: _Arrival) -> None:
        """Look at what has come, and pass the request on if that is all of it."""
        if _untaken_bytes(conn.sock) > _MAX_UNTAKEN_BYTES:
            self._end(conn)
            return
        if arrival.end is None:
            head = arrival.data.find(b"\r\n\r\n") + 2
            if head < 2:
                if len(arrival.data) > _MAX_HEAD_BYTES:
                    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
                    self._refuse(conn, status, f"the headers are over {_MAX_HEAD_BYTES} bytes")
                return
            length = _LENGTH.search(arrival.data, 0, head)
            size = int(length[1]) if length else 0
            if size > _MAX_SHORT_BYTES or _STREAMED.search(arrival.data, 0, head):
                self._stop_reading(conn)
                self._queue.append((arrival.deadline, conn, bytes(arrival.data)))
                self._start_long()
                return
            arrival.end = head + 2 + size
            arrival.deadline = time.monotonic() + self.http.body_timeout_s
        if len(arrival.data) >= arrival.end:
            self._stop_reading(conn)
            self._start(conn, bytes(arrival.data))

    def _start_long(self) -> None:
        while self._queue and len(self._long) < max(self.cfg.threads // 2, 1):
            _, conn, data = self._queue.popleft()
            self._long.add(conn)
            self._start(conn, data)

    def _start(self, conn: Any, data: bytes) -> None:
        self._arrived[conn] = data
        self.enqueue_req(conn)

    def handle(self, conn: Any) -> Any:
        """Serve the request that has arrived, in a thread."""
        conn.data_ready = True
        conn.sock.setblocking(True)
        conn.init()
        conn.parser.unreader.unread(self._arrived.pop(conn))
        return super().handle(conn)

    def finish_request(self, conn: Any, fs: Future[Any]) -> None:
        if conn in self._long:
            self._long.remove(conn)
            self._start_long()
        try:
            is_kept = bool(fs.result()) and self.alive
            buffered = conn.parser.unreader.take_buffered() if is_kept else b""
        except Exception:  # noqa: BLE001 - the thread has logged it
            is_kept = False
        if is_kept:
            limit_s = self.http.header_timeout_s if buffered else self.cfg.keepalive
            self._await_request(conn, limit_s, buffered)
        else:
            self._say_goodbye(conn)

    def _say_goodbye(self, conn: Any) -> None:
        """Close our side, and wait for the client's without a thread."""
        try:
            conn.sock.setblocking(False)
            conn.sock.shutdown(socket.SHUT_WR)
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._read, conn))
        except (OSError, ValueError):  # the client is gone, or the thread has closed it
            self.nr_conns -= 1
            conn.close()
            return
        self._arriving[conn] = _Arrival(time.monotonic() + _GOODBYE_S, is_leaving=True)

    def _refuse(self, conn: Any, status: HTTPStatus, message: str) -> None:
        """Answer a request that no thread has seen."""
        name = "".join(status.phrase.title().split())
        content = json.dumps({"error": {"type": name, "message": message}}).encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
            f"Retry-After: {self.http.retry_after_s}\r\n"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        if conn in self._arriving:
            self._stop_reading(conn)
        with suppress(OSError):  # a few bytes: they fit, or the client is gone
            conn.sock.send(head.encode() + content)
        self._say_goodbye(conn)

    def _stop_reading(self, conn: Any) -> None:
        del self._arriving[conn]
        self.poller.unregister(conn.sock)

    def _end(self, conn: Any) -> None:
        self._stop_reading(conn)
        self.nr_conns -= 1
        conn.close()

    def murder_pending(self) -> None:
        """End what has not arrived in time; called between two looks at the sockets."""
        now = time.monotonic()
        for conn, arrival in list(self._arriving.items()):
            if arrival.deadline > now:
                continue
            if arrival.is_leaving or not arrival.data:
                self._end(conn)
            else:
                self._refuse(conn, HTTPStatus.REQUEST_TIMEOUT, "the request did not arrive in time")
        for entry in [each for each in self._queue if each[0] <= now]:
            self._queue.remove(entry)
            message = "as many uploads as are read at once are under way"
            self._refuse(entry[1], HTTPStatus.SERVICE_UNAVAILABLE, message)

    def _cap_keepalive(self, deadline: float) -> None:
        """End by then what is arriving while the server stops."""
        for arrival in self._arriving.values():
            arrival.deadline = min(arrival.deadline, deadline)
        self._queue = deque((min(until, deadline), c, data) for until, c, data in self._queue)


def _untaken_bytes(connection: socket.socket) -> int:
    """Return the bytes of answers that the client has not taken."""
    return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def worker_class(http: HttpSettings) -> type:
    """Return the worker with its settings: gunicorn makes it from the class alone."""
    return type("ArrivalsWorker", (ArrivalsWorker,), {"http": http})
