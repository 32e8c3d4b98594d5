"""One end of the socket between the King and a worker: framed, buffered, never half-blocking.

`multiprocessing.connection.Connection` blocks in the middle of a message when the other side is
stopped (SIGSTOP) or slow; the King must not. So both ends are non-blocking sockets with a buffer
each way, and only a worker ever waits for its end to drain.

A frame is an 8-byte length and a message as msgpack. Workers handle hostile media, so the King
decodes only the types that a worker may send: a worker that was taken over cannot make it call
anything, or read a field of another type than it expects.
"""

from __future__ import annotations

import functools
import select
import socket
import struct
from collections import deque
from typing import Any, Generic, TypeVar, get_args

import msgspec
import numpy as np

from workers.protocol import Command, ProtocolError, Reply

_HEADER = struct.Struct("!Q")

_CHUNK_BYTES = 1 << 18
"""Bytes of one read: about what a socket's buffer holds, so that larger reads would come back
short and smaller ones double the system calls of a large message."""

_MOST_PER_CALL = 1 << 23
"""Bytes that one `receive` takes: a worker that sends without end must not keep the King from the
others. The largest ordinary message (300 rows of 2048) is 1.2 MB; half would still do."""

MAX_FRAME = 1 << 30
"""A longer frame is refused before it is waited for. No array of the settings' limits comes near;
without a limit a broken length would let the buffer grow until memory is full."""

_T = TypeVar("_T")


def _encode_other(value: object) -> Any:
    """Return what msgpack knows for what it does not: arrays and NumPy's scalars."""
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, np.ascontiguousarray(value).data
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot cross between processes")


@functools.cache
def _dtype_of(kind: Any) -> np.dtype[Any]:
    [scalar] = get_args(get_args(kind)[1])
    dtype: np.dtype[Any] = np.dtype(scalar)
    return dtype


def _decode_other(kind: Any, value: Any) -> Any:
    """Return an array of the annotated dtype, read-only, over the message's own bytes.

    Raises:
        ValueError: It is of another dtype, or its bytes do not fill its shape.
    """
    name, shape, content = value
    dtype = _dtype_of(kind)
    if name != dtype.name:
        raise ValueError(f"an array of {name!r}, not {dtype.name}")
    return np.frombuffer(content, dtype).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_other)


class Decoder(Generic[_T]):
    """A decoder of a frame's body into a message of some types, and nothing else."""

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind, dec_hook=_decode_other)

    def __call__(self, body: bytes | bytearray | memoryview) -> _T:
        """Decode one body.

        Raises:
            ProtocolError: It is not a message of these types; names the field and what it is.
        """
        try:
            message: _T = self._decoder.decode(body)
        except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
            raise ProtocolError(f"a message cannot be read: {error}") from error
        return message


to_worker: Decoder[Command] = Decoder(Command)
"""Decodes what the King sends."""
to_king: Decoder[Reply] = Decoder(Reply)
"""Decodes what a worker sends."""


def encode(message: Command | Reply) -> bytearray:
    """Return one frame: length and message."""
    frame = bytearray(_HEADER.size)
    try:
        _encoder.encode_into(message, frame, _HEADER.size)
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can write and UTF-8 cannot
        _encoder.encode_into(_whole_characters(message), frame, _HEADER.size)
    _HEADER.pack_into(frame, 0, len(frame) - _HEADER.size)
    return frame


def _whole_characters(value: Any) -> Any:
    """Return a message as plain values, with ``?`` for what is no character."""
    match value:
        case str():
            return value.encode("utf-8", "replace").decode("utf-8")
        case dict():
            return {_whole_characters(k): _whole_characters(v) for k, v in value.items()}
        case list() | tuple():
            return [_whole_characters(each) for each in value]
        case msgspec.Struct():
            plain = msgspec.to_builtins(
                value, builtin_types=(bytes, memoryview), enc_hook=_encode_other
            )
            return _whole_characters(plain)
    return value


class Channel(Generic[_T]):
    """A non-blocking message socket.

    Attributes:
        closed: The other side is gone; what it had sent before has been received.
    """

    def __init__(self, sock: socket.socket, decode: Decoder[_T]) -> None:
        """Take over a socket; ``decode`` is for what the other side sends."""
        sock.setblocking(False)
        self._socket = sock
        self._decode = decode
        self._out: deque[memoryview] = deque()
        self._in = bytearray()
        self.closed = False

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def unsent(self) -> bool:
        return bool(self._out)

    def send(self, message: Command | Reply) -> None:
        """Queue a message and send what goes at once; never blocks."""
        self._out.append(memoryview(encode(message)))
        self.flush()

    def flush(self) -> None:
        """Send what goes at once; what the other side will never read is dropped."""
        while self._out:
            head = self._out[0]
            try:
                sent = self._socket.send(head)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._out.clear()  # its death is noticed by reading: nothing it sent may be lost
                return
            if sent == len(head):
                self._out.popleft()
            else:
                self._out[0] = head[sent:]

    def receive(self) -> list[_T]:
        """Return the whole messages that have arrived; sets `closed` at the end.

        Raises:
            ProtocolError: What arrived is not a message.
        """
        taken = 0
        while taken < _MOST_PER_CALL:
            try:
                chunk = self._socket.recv(_CHUNK_BYTES)
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

    def _split(self) -> list[_T]:
        messages: list[_T] = []
        start = 0
        view = memoryview(self._in)
        try:
            while len(view) - start >= _HEADER.size:
                [size] = _HEADER.unpack_from(view, start)
                if size > MAX_FRAME:
                    raise ProtocolError(f"a frame of {size} bytes, more than {MAX_FRAME}")
                if len(view) - start - _HEADER.size < size:
                    break
                start += _HEADER.size
                messages.append(self._decode(view[start : start + size]))
                start += size
        finally:
            view.release()
        del self._in[:start]
        return messages

    def send_wait(self, message: Reply) -> None:
        """Send a message whole, waiting for the other side to read (workers only)."""
        self.send(message)
        while self._out:
            self._wait(select.POLLOUT, None)
            self.flush()

    def receive_wait(self, timeout_s: float | None) -> list[_T]:
        """Return the messages that have arrived, waiting up to ``timeout_s`` for a first one."""
        self._wait(select.POLLIN, timeout_s)
        return self.receive()

    def _wait(self, event: int, timeout_s: float | None) -> None:
        poller = select.poll()
        poller.register(self._socket, event)
        poller.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000)

    def close(self) -> None:
        self._out.clear()
        self._socket.close()
