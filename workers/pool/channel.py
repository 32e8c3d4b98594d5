"""Transport of messages and arrays between the King and a worker: a socket and shared memory.

`multiprocessing.connection.Connection` blocks in the middle of a message when the other side is
stopped (SIGSTOP) or slow; the King must not. So both ends are non-blocking sockets with a buffer
each way, and only a worker ever waits for its end to drain. A frame is an 8-byte length and a
message as msgpack. Workers handle hostile media, so the King decodes only the types that a worker
may send: one that was taken over cannot make it call anything, or read a field of another type.

Arrays lie in equal slots of one anonymous memory file. The King makes the file and owns the slots;
it never maps them. Decoders write a slot in place, extractors read it without a copy. The file has
no name: nothing is left behind when every process that held its descriptor is gone. The King counts
who uses which slot (`SlotTable`):

    free -acquire-> written to by a decoder -hand_over-> owned by the caller -release-> free
                            |                                 |    ^                      ^
                            +-abandon-> free           retain-+----+-drop (last one) -----+

A slot is free again once its owner has released it and no task refers to it any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import math
import mmap
import os
import select
import socket
import struct
from collections import deque
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Any, Generic, TypeVar, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from common.errors import FeatureError, MediaError
from extractors.parts import ALIGNMENT
from workers.protocol import ArrayRef, Command, ProtocolError, Reply

_HEADER = struct.Struct("!Q")

_CHUNK_BYTES = 1 << 18
"""Bytes of one read: about what a socket's buffer holds, so that larger reads would come back
short and smaller ones double the system calls of a large message."""

_MOST_PARTS = 64
"""Messages of one system call, which may take 1,024; more than this rarely wait."""

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
    """Return a read-only array over the message's own bytes; ValueError where they do not fit."""
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
        """Decode one body; ProtocolError names the field that is wrong, and what it is."""
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
        self._poller = select.poll()
        self.closed = False

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def unsent(self) -> bool:
        return bool(self._out)

    def put(self, message: Command | Reply) -> None:
        """Queue a message, to be sent with the next ones."""
        self._out.append(memoryview(encode(message)))

    def send(self, *messages: Command | Reply) -> None:
        """Queue messages and send what goes at once; never blocks."""
        for message in messages:
            self.put(message)
        self.flush()

    def flush(self) -> None:
        """Send what goes at once; what the other side will never read is dropped."""
        while self._out:
            try:
                # Together: each call wakes the other side.
                sent = self._socket.sendmsg(list(islice(self._out, _MOST_PARTS)))
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._out.clear()  # its death is noticed by reading: nothing it sent may be lost
                return
            while self._out and sent >= len(self._out[0]):
                sent -= len(self._out.popleft())
            if sent:
                self._out[0] = self._out[0][sent:]

    def receive(self, *, to_end: bool = False) -> list[_T]:
        """Return the messages that have arrived, or ProtocolError; sets `closed` at the end.

        With ``to_end``, of a channel that is known to end, the end is seen in this call.
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
            if len(chunk) < _CHUNK_BYTES and not to_end:
                break  # that was all: to ask again would only raise, for a fifth of a message's CPU
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
        except ProtocolError as error:
            error.before = tuple(messages)
            raise
        finally:
            view.release()
        del self._in[:start]
        return messages

    def send_wait(self, message: Reply) -> None:
        """Send a message whole, waiting for the other side to read (workers only)."""
        self.put(message)
        self.flush_wait()

    def flush_wait(self) -> None:
        """Send what is queued whole, waiting for the other side to read (workers only)."""
        self.flush()
        while self._out:
            self._wait(select.POLLOUT, None)
            self.flush()

    def receive_wait(self, timeout_s: float | None) -> list[_T]:
        """Return the messages that have arrived, waiting up to ``timeout_s`` for a first one."""
        events = self._wait(select.POLLIN, timeout_s)
        return self.receive(to_end=bool(events & select.POLLHUP)) if events else []

    def _wait(self, event: int, timeout_s: float | None) -> int:
        """Return what has happened, as poll(2) says it; 0 for nothing."""
        self._poller.register(self._socket, event)
        ready = self._poller.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000)
        return ready[0][1] if ready else 0

    def close(self) -> None:
        self._out.clear()
        self._socket.close()


_DTYPES = frozenset({"uint8", "float32", "float16"})

AnyArray = npt.NDArray[np.generic]


def create_arena(size_bytes: int) -> int:
    """Make the memory file and return its descriptor; its size is sealed.

    Without the seal a worker could shrink it, and every other worker would die of SIGBUS.
    """
    descriptor = os.memfd_create("insighttag-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size_bytes)
    fcntl.fcntl(
        descriptor,
        fcntl.F_ADD_SEALS,
        fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
    )
    return descriptor


class Arena:
    """A worker's mapping of all slots."""

    def __init__(self, mapping: mmap.mmap, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._mapping = mapping
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(mapping, dtype=np.uint8)

    @classmethod
    def map(cls, descriptor: int, slots: int, slot_bytes: int) -> Arena:
        return cls(mmap.mmap(descriptor, slots * slot_bytes), slots, slot_bytes)

    @classmethod
    def private(cls, slots: int, slot_bytes: int) -> Arena:
        """Return slots of this process alone; pages that are never written cost nothing."""
        return cls(mmap.mmap(-1, slots * slot_bytes), slots, slot_bytes)

    def view(self, ref: ArrayRef) -> AnyArray:
        """Return the array of a reference, read-only, not copied; FeatureError outside its slot."""
        if ref.dtype not in _DTYPES or any(n < 0 for n in ref.shape):
            raise FeatureError(f"slot {ref.slot}: no array of {ref.dtype} {ref.shape}")
        inside = 0 <= ref.slot < self.slots and ref.offset >= 0 and ref.offset % ALIGNMENT == 0
        if not inside or ref.offset + ref.nbytes > self.slot_bytes:
            raise FeatureError(f"slot {ref.slot}: {ref.shape} at {ref.offset} is out of bounds")
        start = ref.slot * self.slot_bytes + ref.offset
        flat = self._bytes[start : start + ref.nbytes]
        view = flat.view(np.dtype(ref.dtype)).reshape(ref.shape)  # (nbytes,) -> ref.shape
        view.flags.writeable = False
        return view

    def writer(self, slot: int) -> SlotWriter:
        if not 0 <= slot < self.slots:
            raise ValueError(f"there is no slot {slot}")
        start = slot * self.slot_bytes
        return SlotWriter(slot, self._bytes[start : start + self.slot_bytes])

    def close(self) -> None:
        """Unmap, unless an array still looks into it."""
        self._bytes = np.empty(0, dtype=np.uint8)
        with contextlib.suppress(BufferError):
            self._mapping.close()


class SlotWriter:
    """A writer of arrays into one slot, in turn (`extractors.media.decode.Allocate`)."""

    def __init__(self, slot: int, room: npt.NDArray[np.uint8]) -> None:
        self.slot = slot
        self._room = room
        self._base = room.__array_interface__["data"][0]
        self._used = 0

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> AnyArray:
        """Return a writable array in the slot; MediaError when the file gives too much for it."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        if start + size > len(self._room):
            raise MediaError(f"decoded to more than a slot holds ({len(self._room)} bytes)")
        self._used = start + size
        return self._room[start : start + size].view(dtype).reshape(shape)  # (size,) -> shape

    def ref(self, array: AnyArray) -> ArrayRef:
        """Return a reference to an array, which is copied into the slot if it lies elsewhere."""
        offset = array.__array_interface__["data"][0] - self._base
        in_place = (
            array.flags.c_contiguous
            and offset >= 0
            and offset + array.nbytes <= len(self._room)
            and offset % ALIGNMENT == 0
        )
        if not in_place:
            copy = self(array.shape, array.dtype)
            copy[...] = array
            return self.ref(copy)
        return ArrayRef(self.slot, offset, tuple(array.shape), array.dtype.name)


class _State(Enum):
    FREE = "free"
    WRITING = "being written"
    OWNED = "owned"
    RELEASED = "released"


@dataclass(slots=True)
class _Slot:
    state: _State = _State.FREE
    refs: int = 0


class SlotTable:
    """States and reference counts of all slots; `ValueError` for a step that is not allowed."""

    def __init__(self, count: int) -> None:
        self._slots = [_Slot() for _ in range(count)]
        self._free = list(range(count))[::-1]

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def free(self) -> int:
        return len(self._free)

    def acquire(self) -> int | None:
        """Return a free slot for a decoder to write, or None.

        The one that was freed last comes first: its pages are warm, and pages of slots that the
        load never needs are never touched.
        """
        if not self._free:
            return None
        slot = self._free.pop()
        self._slots[slot].state = _State.WRITING
        return slot

    def hand_over(self, slot: int) -> None:
        self._expect(slot, _State.WRITING).state = _State.OWNED

    def abandon(self, slot: int) -> None:
        """Free a slot whose decoder failed or died."""
        self._make_free(slot, self._expect(slot, _State.WRITING))

    def retain(self, slot: int) -> None:
        self._expect(slot, _State.OWNED).refs += 1

    def drop(self, slot: int) -> None:
        """Discount a task that referred to the slot and has ended."""
        entry = self._slots[slot]
        if entry.refs < 1:
            raise ValueError(f"slot {slot}: no task refers to it")
        entry.refs -= 1
        if entry.refs == 0 and entry.state is _State.RELEASED:
            self._make_free(slot, entry)

    def release(self, slot: int) -> None:
        """Free the slot once no task refers to it: the caller submits no more of them."""
        entry = self._expect(slot, _State.OWNED)
        entry.state = _State.RELEASED
        if entry.refs == 0:
            self._make_free(slot, entry)

    def _expect(self, slot: int, state: _State) -> _Slot:
        if not 0 <= slot < len(self._slots):
            raise ValueError(f"there is no slot {slot}")
        entry = self._slots[slot]
        if entry.state is not state:
            raise ValueError(f"slot {slot} is {entry.state.value}, not {state.value}")
        return entry

    def _make_free(self, slot: int, entry: _Slot) -> None:
        entry.state, entry.refs = _State.FREE, 0
        self._free.append(slot)
