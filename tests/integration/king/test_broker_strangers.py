"""Properties and bodies that a parser cannot read: one message's matter, never the connection's."""

from __future__ import annotations

import lzma
import struct

import amqp
import pytest

from king.broker.connect import publish_posts
from king.messages import PostMessage, decompressed, parse_message
from tests.support.king.broker_rig import Consumer, connected, settings_for
from tests.support.services import RabbitMQServer

pytestmark = pytest.mark.rabbitmq


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


ODD = {
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


class Raw(amqp.Message):  # type: ignore[misc]  # py-amqp has no types
    """A message whose properties are these bytes."""

    raw = b""

    def _serialize_properties(self) -> bytes:
        return self.raw


def send(server: RabbitMQServer, queue: str, odd: dict[str, bytes], body: bytes = b"") -> None:
    """Publish a message with each kind of properties, its name as the body."""
    with amqp.Connection(f"127.0.0.1:{server.port}") as client:
        channel = client.channel()
        for name, properties in odd.items():
            message = Raw(body or name.encode())
            message.raw = properties
            channel.basic_publish(message, routing_key=queue)


def test_odd_properties_cost_nobody_anything(rabbitmq: RabbitMQServer, queue_name: str) -> None:
    """Each message arrives with its body, innocent ones between them too, on one connection."""
    settings = settings_for(rabbitmq.url, queue_name, heartbeat_s=10, socket_timeout_s=5)
    publish_posts(settings, [PostMessage("before")])
    send(rabbitmq, queue_name, ODD)
    publish_posts(settings, [PostMessage("after")])
    with connected(settings) as broker:
        consumer = Consumer(broker, ack=True)
        consumer.take(len(ODD) + 2)
        assert broker.generation == 1
        assert broker.connected
    ids = sorted(parse_message(body).post_id for body in consumer.bodies)
    assert ids == sorted(["before", *ODD, "after"])
    assert not any(delivery.redelivered for delivery in consumer.got)


def test_a_body_is_never_decoded_by_the_charset_that_it_names(
    rabbitmq: RabbitMQServer, queue_name: str
) -> None:
    settings = settings_for(rabbitmq.url, queue_name, heartbeat_s=10, socket_timeout_s=5)
    publish_posts(settings, [])
    charset = ODD["a charset that makes half characters"]
    send(rabbitmq, queue_name, {"charset": charset}, body=rb"\ud800")
    with connected(settings) as broker:
        consumer = Consumer(broker, ack=True)
        consumer.take(1)
    assert consumer.bodies == [rb"\ud800"]


def test_a_routing_key_that_is_not_utf8(rabbitmq: RabbitMQServer, queue_name: str) -> None:
    """A stranger's exchange may be bound to the queue, and its routing keys are its own."""
    settings = settings_for(rabbitmq.url, queue_name, heartbeat_s=10, socket_timeout_s=5)
    publish_posts(settings, [])
    with amqp.Connection(f"127.0.0.1:{rabbitmq.port}") as client:
        channel = client.channel()
        channel.exchange_declare(queue_name, "fanout", auto_delete=False)
        channel.queue_bind(queue_name, queue_name)
        # py-amqp would not write such a key.
        arguments = bytes(2) + short(queue_name.encode()) + short(b"\xff\xfe") + bytes(1)
        client.frame_writer(1, channel.channel_id, (60, 40), arguments, amqp.Message("p1"))
    with connected(settings) as broker:
        consumer = Consumer(broker, ack=True)
        consumer.take(1)
        assert broker.generation == 1
    assert consumer.bodies == [b"p1"]


def test_a_header_that_asks_for_gigabytes_gets_none() -> None:
    """An LZMA header may name a dictionary of 4 GiB: the body is left packed."""
    packed = bytearray(lzma.compress(b"p1", format=lzma.FORMAT_ALONE))
    packed[1:5] = b"\xff\xff\xff\xff"
    assert decompressed(bytes(packed), {"compression": "lzma"}) == packed
