"""Queue messages that no publisher should send: bodies, envelopes and compressions gone wrong.

Each holds its number near its beginning, so that every one leaves a dead letter of its own.
"""

from __future__ import annotations

import base64
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.errors import MessageError
from king.broker.redis import read_item
from king.jobs import message_key
from king.messages import parse_message

_PAYLOAD_CHARS = 4096


@dataclass(frozen=True)
class BadMessage:
    """One item of the queue's list.

    Attributes:
        name: What is wrong with it.
        item: What is pushed.
        key: ID of the dead letter that it must become.
    """

    name: str
    item: bytes
    key: str


def bad_messages(seed: int, count: int) -> list[BadMessage]:
    """Return that many messages, each form in turn."""
    forms = list(_FORMS)
    return [_message(forms[i % len(forms)], i, seed) for i in range(count)]


def _message(name: str, number: int, seed: int) -> BadMessage:
    rng = random.Random(f"{seed}/message/{number}")
    item = _FORMS[name](f"m{number}x", rng)
    body, _, _ = read_item(item)
    try:
        key = parse_message(body).post_id
    except MessageError:
        key = message_key(body.decode("utf-8", "backslashreplace")[:_PAYLOAD_CHARS])
    return BadMessage(name, item, key)


def _envelope(body: Any, encoding: Any = "base64", **more: Any) -> bytes:
    """Wrap a body as kombu's publishers do for Redis."""
    if isinstance(body, bytes):
        body = base64.b64encode(body).decode()
    content = {
        "body": body,
        "content-encoding": more.pop("charset", "utf-8"),
        "content-type": more.pop("content_type", "application/json"),
        "headers": more.pop("headers", {}),
        "properties": {
            "body_encoding": encoding,
            "delivery_tag": "t",
            "delivery_info": {"exchange": "", "routing_key": "q"},
            "priority": 0,
        },
    }
    return json.dumps({**content, **more}).encode()


def _compressed(mark: str, body: bytes, name: str = "application/x-gzip") -> bytes:
    return _envelope(body, headers={"compression": name, "mark": mark})


def _flipped(mark: str, rng: random.Random) -> bytes:
    """Return a good message with some bits wrong, behind its number."""
    body = bytearray(json.dumps({"mark": mark, "post_id": f"{mark}-flipped"}).encode())
    for _ in range(rng.choice((1, 3, 20))):
        body[rng.randrange(len(mark) + 12, len(body))] ^= 1 << rng.randrange(8)
    return bytes(body)


def _object(mark: str, **content: Any) -> bytes:
    return json.dumps({"mark": mark, **content}).encode()


_FORMS: dict[str, Callable[[str, random.Random], bytes]] = {
    "noise": lambda mark, rng: mark.encode() + rng.randbytes(200),
    "noise after a brace": lambda mark, rng: b'{"' + mark.encode() + rng.randbytes(60),
    "bits flipped": _flipped,
    "cut off": lambda mark, rng: _object(mark, post_id=f"{mark}-cut")[: rng.randrange(14, 32)],
    "not UTF-8": lambda mark, rng: mark.encode() + b"\xff\xfe\xc3\x28",
    "UTF-16": lambda mark, rng: f'{{"post_id": "{mark}"}}'.encode("utf-16"),
    "control characters": lambda mark, rng: mark.encode() + b"\0\x01\x1b[2J",
    "half a character": lambda mark, rng: b'{"post_id": "%s\\ud800"}' % mark.encode(),
    "no ID": lambda mark, rng: _object(mark, id=mark),
    "ID null": lambda mark, rng: _object(mark, post_id=None),
    "ID a list": lambda mark, rng: _object(mark, post_id=[mark]),
    "ID an object": lambda mark, rng: _object(mark, post_id={"$gt": ""}),
    "ID a regular expression": lambda mark, rng: _object(mark, post_id={"$regex": ".*"}),
    "ID true": lambda mark, rng: _object(mark, post_id=True),
    "ID empty": lambda mark, rng: _object(mark, post_id="   "),
    "ID of spaces": lambda mark, rng: _object(mark, post_id="\u3000\u2003"),
    "ID too long": lambda mark, rng: _object(mark, post_id="x" * 513),
    "ID of a megabyte": lambda mark, rng: mark.encode() + b"x" * (1 << 20),
    "ID that is an operator": lambda mark, rng: f"$where: sleep({mark})".encode(),
    "ID that is a path": lambda mark, rng: f"../../etc/{mark}".encode(),
    "ID that is a dotted key": lambda mark, rng: f"insight.status.{mark}".encode(),
    "ID nobody has": lambda mark, rng: _object(mark, post_id=f"{mark}-unknown"),
    "number nobody has": lambda mark, rng: b"9" * 30 + mark[1:-1].encode(),
    "number too large": lambda mark, rng: b"1e" + b"9" * 300 + mark[1:-1].encode(),
    "not a number": lambda mark, rng: _object(mark, post_id=float("nan")),
    "priority text": lambda mark, rng: _object(mark, post_id=mark, priority="high"),
    "priority a fraction": lambda mark, rng: _object(mark, post_id=mark, priority=1.5),
    "force a number": lambda mark, rng: _object(mark, post_id=mark, force=1),
    "a list": lambda mark, rng: json.dumps([mark]).encode(),
    "a text in JSON": lambda mark, rng: json.dumps(f"{mark}-text").encode(),
    "nested too deep": lambda mark, rng: b'{"' + mark.encode() + b'": ' + b"[" * 30_000,
    "nested objects": lambda mark, rng: b'{"' + mark.encode() + b'": ' + b'{"a":' * 10_000,
    "a pickle": lambda mark, rng: b"\x80\x04c" + mark.encode() + b"posix\nsystem\n\x85R.",
    "YAML": lambda mark, rng: f"!!python/object/apply:os.system ['{mark}']".encode(),
    "XML": lambda mark, rng: f"<post><id>{mark}</id></post>".encode(),
    "two objects": lambda mark, rng: _object(mark) + _object(mark),
    "trailing comma": lambda mark, rng: f'{{"post_id": "{mark}",}}'.encode(),
    "single quotes": lambda mark, rng: f"{{'post_id': '{mark}'}}".encode(),
    "bell and line breaks": lambda mark, rng: f"{mark}\r\n\a".encode() * 2,
    "envelope of noise": lambda mark, rng: _envelope(mark.encode() + rng.randbytes(100)),
    "envelope, no base64": lambda mark, rng: _envelope(f"{mark}!!!"),
    "envelope, unknown encoding": lambda mark, rng: _envelope(f"{mark}\x07", "rot13"),
    "envelope, body a number": lambda mark, rng: _envelope(int(mark[1:-1])),
    "envelope, body null": lambda mark, rng: _envelope(None, headers={"mark": mark}),
    "envelope, headers a list": lambda mark, rng: _envelope(f"{mark}\x00".encode(), headers=[1]),
    "envelope, properties a list": lambda mark, rng: _envelope(mark.encode(), properties=[]),
    "envelope of a pickle": lambda mark, rng: _envelope(
        b"\x80\x04" + mark.encode() + b"cposix\nsystem\n.",
        content_type="application/x-python-serialize",
        charset="binary",
    ),
    "envelope of YAML": lambda mark, rng: _envelope(
        f"!!python/object/new:{mark} []\x07".encode(), content_type="application/x-yaml"
    ),
    "envelope of an unknown charset": lambda mark, rng: _envelope(
        mark.encode() + b"\xff", charset="klingon"
    ),
    "envelope in an envelope": lambda mark, rng: _envelope(_envelope(mark.encode())),
    "packed bomb": lambda mark, rng: _compressed(
        mark, zlib.compress(mark.encode() + b"\0" * (8 << 20))
    ),
    "packed noise": lambda mark, rng: _compressed(mark, mark.encode() + rng.randbytes(50)),
    "packed and cut off": lambda mark, rng: _compressed(
        mark, zlib.compress(f'{{"post_id": "{mark}"}}'.encode())[:-5]
    ),
    "packed in an unknown way": lambda mark, rng: _compressed(
        mark, mark.encode() + b"\x01", "application/x-snake-oil"
    ),
}
