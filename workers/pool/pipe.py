"""One end of the socket between the King and a worker: framed, buffered, never half-blocking.

`multiprocessing.connection.Connection` blocks in the middle of a message when the other side is
stopped (SIGSTOP) or slow; the King must not. So both ends are non-blocking sockets with a buffer
each way, and only a worker ever waits for its end to drain.

A frame is an 8-byte length and a pickle. Workers handle hostile media, so a pickle may only name
the message types of the protocol and what numpy needs to rebuild an array: a worker that was
taken over cannot make the King call anything.
"""

from __future__ import annotations

import io
import pickle
import select
import socket
import struct
from collections import deque
from typing import Any

_HEADER = struct.Struct("!Q")
_CHUNK = 1 << 18
_MOST_PER_CALL = 1 << 23
MAX_FRAME = 1 << 30

_NUMPY_NAMES = frozenset(
    {
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy._core.numeric", "_frombuffer"),
    }
)
_MESSAGE_MODULES = frozenset({"workers.protocol", "workers.pool.launch", "common.post"})


_FOUND: dict[tuple[str, str], Any] = {}
"""What was allowed before: looking a name up is a third of the time that a message takes."""


class PipeBroken(Exception):
    """What came through the pipe is no message: its sender cannot be trusted any more."""


class _MessageUnpickler(pickle.Unpickler):
    """Rebuilds protocol messages and arrays, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = _FOUND.get((module, name))
        if known is None:
            known = _FOUND[(module, name)] = self._find(module, name)
        return known

    def _find(self, module: str, name: str) -> Any:
        if (module, name) in _NUMPY_NAMES:
            return super().find_class(module, name)
        if module in _MESSAGE_MODULES and "." not in name:
            found = super().find_class(module, name)
            # Only classes that are defined there: an imported name would widen the list.
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise PipeBroken(f"{module}.{name} is no message")


def encode(message: object) -> bytes:
    """One frame: length and pickle."""
    body = pickle.dumps(message, protocol=5)
    return _HEADER.pack(len(body)) + body


def decode(body: bytes | bytearray | memoryview) -> Any:
    """The message of a frame's body.

    Raises:
        PipeBroken: It is no message of the protocol.
    """
    try:
        return _MessageUnpickler(io.BytesIO(body)).load()
    except PipeBroken:
        raise
    except Exception as error:  # a hostile pickle can raise anything
        raise PipeBroken(f"a frame cannot be read: {type(error).__name__}") from error


class Pipe:
    """A non-blocking message socket.

    Attributes:
        closed: The other side is gone; what it had sent before has been received.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._out: deque[memoryview] = deque()
        self._in = bytearray()
        self.closed = False

    def fileno(self) -> int:
        """The socket's descriptor, for selectors."""
        return self._socket.fileno()

    @property
    def unsent(self) -> bool:
        """Whether bytes wait for the other side to read."""
        return bool(self._out)

    def send(self, message: object) -> None:
        """Queue a message and send what goes at once; never blocks."""
        self._out.append(memoryview(encode(message)))
        self.flush()

    def flush(self) -> None:
        """Send what goes at once; a pipe whose other side is gone drops it."""
        while self._out:
            head = self._out[0]
            try:
                sent = self._socket.send(head)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._out.clear()  # its death is noticed by reading: nothing sent may be lost there
                return
            if sent == len(head):
                self._out.popleft()
            else:
                self._out[0] = head[sent:]

    def receive(self) -> list[Any]:
        """The whole messages that have arrived; sets `closed` at the end.

        Raises:
            PipeBroken: What arrived is no message.
        """
        taken = 0
        while taken < _MOST_PER_CALL:
            try:
                chunk = self._socket.recv(_CHUNK)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                chunk = b""
            if not chunk:
                self.closed = True
                break
            taken += len(chunk)
            self._in += chunk
        return self._split()

    def _split(self) -> list[Any]:
        messages: list[Any] = []
        start, end = 0, len(self._in)
        view = memoryview(self._in)
        try:
            while end - start >= _HEADER.size:
                (size,) = _HEADER.unpack_from(view, start)
                if size > MAX_FRAME:
                    raise PipeBroken(f"a frame of {size} bytes")
                if end - start - _HEADER.size < size:
                    break
                start += _HEADER.size
                messages.append(decode(view[start : start + size]))
                start += size
        finally:
            view.release()
        del self._in[:start]
        return messages

    def send_wait(self, message: object) -> None:
        """Send a message whole, waiting for the other side to read (workers only)."""
        self.send(message)
        poller = select.poll()
        poller.register(self._socket, select.POLLOUT)
        while self._out:
            poller.poll()
            self.flush()

    def receive_wait(self, timeout_s: float | None) -> list[Any]:
        """The messages that have arrived, waiting up to ``timeout_s`` for a first one."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000)
        return self.receive()

    def close(self) -> None:
        """Close this end."""
        self._out.clear()
        self._socket.close()
