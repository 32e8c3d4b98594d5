"""Messages whose properties py-amqp cannot read, though RabbitMQ passes them on."""

import random
import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType

import amqp

from tests.support.services import RabbitMQServer


def short(text: bytes) -> bytes:
    """AMQP's short string."""
    return bytes([len(text)]) + text


def table(*fields: bytes) -> bytes:
    """AMQP's table of fields, each a name, a letter for the type, and the value."""
    content = b"".join(fields)
    return struct.pack(">I", len(content)) + content


def headers(*fields: bytes) -> bytes:
    """Properties with nothing but headers."""
    return struct.pack(">H", 1 << 13) + table(*fields)


def nested(depth: int, kind: bytes) -> bytes:
    """Tables within tables, or arrays within arrays."""
    content = b""
    for _ in range(depth):
        name = short(b"n") if kind == b"F" else b""
        content = name + kind + struct.pack(">I", len(content)) + content
    return struct.pack(">H", 1 << 13) + table(content if kind == b"F" else short(b"n") + content)


def stamp(seconds: int) -> bytes:
    """A header with a time."""
    return headers(short(b"at") + b"T" + struct.pack(">q", seconds))


ODD_PROPERTIES = {
    "timestamp in milliseconds": stamp(1_764_000_000_000),
    "timestamp in nanoseconds": stamp(1_764_000_000_000_000_000),
    "timestamp before 1970": stamp(-62_135_596_801),
    "timestamp property in milliseconds": struct.pack(">HQ", 1 << 6, 1_764_000_000_000),
    "timestamp property before 1970": struct.pack(">Hq", 1 << 6, -1),
    "tables nested without end": nested(3000, b"F"),
    "arrays nested without end": nested(3000, b"A"),
    "a name that is not UTF-8": headers(short(b"\xff\xfe") + b"I" + bytes(4)),
    "a text that is not UTF-8": headers(short(b"a") + b"S" + struct.pack(">I", 2) + b"\xff\xfe"),
    "a content type that is not UTF-8": struct.pack(">H", 1 << 15) + short(b"\xff\xfe"),
    "a charset that makes half characters": struct.pack(">H", 1 << 14) + short(b"unicode_escape"),
    "a compression that is a number": headers(short(b"compression") + b"I" + bytes(4)),
    "a decimal of 255 places": headers(short(b"d") + b"D\xff" + bytes(4)),
}


_VALUES: Mapping[bytes, Callable[[random.Random], bytes]] = MappingProxyType(
    {
        b"t": lambda rng: rng.randbytes(1),
        b"b": lambda rng: rng.randbytes(1),
        b"s": lambda rng: rng.randbytes(2),
        b"I": lambda rng: rng.randbytes(4),
        b"l": lambda rng: rng.randbytes(8),
        # No NaN and no infinity: RabbitMQ ends the connection of a publisher that sends one.
        b"f": lambda rng: struct.pack(">f", rng.uniform(-1e38, 1e38)),
        b"d": lambda rng: struct.pack(">d", rng.uniform(-1e300, 1e300)),
        b"D": lambda rng: rng.randbytes(5),
        b"T": lambda rng: rng.randbytes(8),
        b"S": lambda rng: _long(rng.randbytes(rng.randrange(40))),
        b"x": lambda rng: _long(rng.randbytes(rng.randrange(40))),
        b"V": lambda _rng: b"",
        b"F": lambda rng: _long(_fields(rng)),
        b"A": lambda rng: _long(b"".join(_value(rng) for _ in range(rng.randrange(3)))),
    }
)


def _long(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def _value(rng: random.Random) -> bytes:
    kind = rng.choice(list(_VALUES))
    return kind + _VALUES[kind](rng)


def _fields(rng: random.Random) -> bytes:
    return b"".join(short(rng.randbytes(3)) + _value(rng) for _ in range(rng.randrange(3)))


def random_properties(rng: random.Random) -> bytes:
    """Properties that RabbitMQ takes, whose every value is random: headers, texts, a timestamp."""
    content_type, reply_to, message_id = (short(rng.randbytes(rng.randrange(20))) for _ in "abc")
    flags = 1 << 15 | 1 << 13 | 1 << 9 | 1 << 7 | 1 << 6
    return (
        struct.pack(">H", flags)
        + (content_type + table(short(b"h") + _value(rng), _fields(rng)) + reply_to + message_id)
        + rng.randbytes(8)
    )


class Raw(amqp.Message):  # type: ignore[misc]  # py-amqp has no types
    """A message whose properties are these bytes."""

    raw = b""

    def _serialize_properties(self) -> bytes:
        return self.raw


def send(server: RabbitMQServer, queue: str, odd: Mapping[str, bytes], body: bytes = b"") -> None:
    """Publish a message with each kind of properties, its name as the body.

    Each is confirmed: a quorum queue may lose what it has not confirmed when the connection ends.
    """
    with amqp.Connection(f"127.0.0.1:{server.port}", confirm_publish=True) as client:
        channel = client.channel()
        for name, properties in odd.items():
            message = Raw(body or name.encode())
            message.raw = properties
            channel.basic_publish(message, routing_key=queue)
