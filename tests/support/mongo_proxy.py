"""A proxy before MongoDB that refuses writes with any error code, as a server in trouble does."""

import socket
import struct
import threading
from typing import Any

import bson

from tests.support.proxy import Proxy, _Pair

_HEAD = struct.Struct("<iiii")  # length, request, request answered, opcode
_OP_MSG = 2013
_WRITES = {"insert", "update", "delete"}


class MongoProxy(Proxy):
    """Forwards whole messages; `refuse_writes` answers some itself."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._lock = threading.Lock()
        self._refusal: tuple[str, int, int] = ("", 0, 0)
        super().__init__(target)

    def refuse_writes(self, collection: str, code: int, times: int = 1) -> None:
        """Refuse the next writes to a collection, each of their operations, with a code."""
        with self._lock:
            self._refusal = (collection, code, times)

    @property
    def refusals_left(self) -> int:
        return self._refusal[2]

    def _receive(self, pair: _Pair, source: socket.socket) -> bytes:
        if source is not pair.client:
            return super()._receive(pair, source)
        while True:
            head = _exactly(source, _HEAD.size)
            if not head:
                return b""
            length, request, _, opcode = _HEAD.unpack(head)
            body = _exactly(source, length - _HEAD.size)
            answer = self._answer(body) if opcode == _OP_MSG and source not in pair.silent else None
            if answer is None:
                return head + body
            message = struct.pack("<I", 0) + b"\0" + bson.encode(answer)
            source.sendall(_HEAD.pack(_HEAD.size + len(message), 0, request, _OP_MSG) + message)

    def _answer(self, body: bytes) -> dict[str, Any] | None:
        with self._lock:
            collection, code, times = self._refusal
            if not times:
                return None
            command, count = _read(body)
            name = next(iter(command))
            if name not in _WRITES or command[name] != collection:
                return None
            self._refusal = (collection, code, times - 1)
        errors = [{"index": i, "code": code, "errmsg": "refused by a test"} for i in range(count)]
        return {"ok": 1.0, "n": 0, "nModified": 0, "writeErrors": errors}


def _exactly(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = source.recv(size - len(data))
        if not more:
            return b""
        data += more
    return data


def _read(body: bytes) -> tuple[dict[str, Any], int]:
    """Return a message's command, and the number of documents in its sequence."""
    command: dict[str, Any] = {"": None}
    count, at = 0, 4  # behind the flags
    while at + 5 <= len(body):
        kind, (size,) = body[at], struct.unpack_from("<i", body, at + 1)
        section = body[at + 1 : at + 1 + size]
        if kind == 0:
            command = bson.decode(section)
        else:
            documents = section[section.index(b"\0", 4) + 1 :]
            while documents:
                count += 1
                documents = documents[struct.unpack_from("<i", documents)[0] :]
        at += 1 + size
    listed = next((command[k] for k in ("documents", "updates", "deletes") if k in command), ())
    return command, count or len(listed)
