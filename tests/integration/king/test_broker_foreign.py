"""Clients that are not ours: whatever they publish arrives as bytes, and is lost by nobody."""

import base64
import bz2
import gzip
import json
import zlib
from collections.abc import Iterator

import kombu
import pika
import pytest
import redis

from config.settings import BrokerSettings
from king.broker.connect import publish_posts, queue_depth
from king.broker.redis import read_item, redelivery_of
from king.messages import MAX_PLAIN_BYTES, PostMessage, decompressed, parse_message
from tests.support.king.broker_rig import Consumer, connected, settings_for
from tests.support.services import RabbitMQServer, RedisServer

UNREADABLE = [
    b"\xff\xfe not UTF-8 \x00",
    b"{",
    b"{}",
    b"[1, 2]",
    b'{"body": 5, "properties": {}}',
    b'{"body": "%%%", "properties": {"body_encoding": "base64"}}',
    b'{"body": "p1", "properties": "none"}',
    b'{"body": null, "properties": {"delivery_tag": 7}, "headers": []}',
]


def queue_on(server: RedisServer | RabbitMQServer, queue_name: str) -> BrokerSettings:
    """Declare a queue; its time-outs are long, since nothing breaks here."""
    settings = settings_for(server.url, queue_name, heartbeat_s=10, visibility_timeout_s=60)
    publish_posts(settings, [])
    return settings


@pytest.fixture
def on_redis(redis_server: RedisServer, queue_name: str) -> BrokerSettings:
    return queue_on(redis_server, queue_name)


@pytest.fixture
def on_rabbitmq(rabbitmq: RabbitMQServer, queue_name: str) -> BrokerSettings:
    return queue_on(rabbitmq, queue_name)


@pytest.fixture
def settings(broker_server: RedisServer | RabbitMQServer, queue_name: str) -> BrokerSettings:
    return queue_on(broker_server, queue_name)


@pytest.fixture
def lists(on_redis: BrokerSettings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(on_redis.url) as client:
        yield client


def received(settings: BrokerSettings, count: int) -> list[bytes]:
    with connected(settings) as broker:
        consumer = Consumer(broker, ack=True)
        consumer.take(count)
        assert consumer.idle(0.1) == 0
    assert queue_depth(settings) == 0
    return consumer.bodies


@pytest.mark.rabbitmq
def test_pika_bare_text(on_rabbitmq: BrokerSettings) -> None:
    with pika.BlockingConnection(pika.URLParameters(on_rabbitmq.url.removesuffix("/"))) as client:
        channel = client.channel()
        channel.confirm_delivery()
        for body in (b"p1", b"", *UNREADABLE):
            channel.basic_publish("", on_rabbitmq.queue, body)
        channel.basic_publish(
            "",
            on_rabbitmq.queue,
            b"p2",
            pika.BasicProperties(
                content_type="application/x-python-serialize",
                content_encoding="no-such-encoding",
                headers={"compression": "application/x-gzip"},
            ),
        )
    assert sorted(received(on_rabbitmq, 11)) == sorted([b"p1", b"", *UNREADABLE, b"p2"])


@pytest.mark.redis
def test_bare_lpush(on_redis: BrokerSettings, lists: redis.Redis) -> None:
    """A plain LPUSH of text, JSON or rubbish arrives as it is, also when it is redelivered."""
    bodies = [b"p1", b'{"post_id": "p2"}', b'"p3"', b"", *UNREADABLE]
    for body in bodies:
        lists.lpush(on_redis.queue, body)
    with connected(on_redis) as broker:
        consumer = Consumer(broker)
        consumer.take(len(bodies))
        assert consumer.bodies == bodies
        assert not any(delivery.redelivered for delivery in consumer.got)
    with connected(on_redis) as broker:
        consumer = Consumer(broker, ack=True)
        consumer.take(len(bodies))
        assert consumer.bodies == bodies
        assert all(delivery.redelivered for delivery in consumer.got)
    assert lists.keys(f"{on_redis.queue}*") == []


@pytest.mark.parametrize("compression", [None, "gzip", "bzip2", "lzma"])
def test_kombu_publishers(settings: BrokerSettings, compression: str | None) -> None:
    """Kombu's own publisher, JSON or text, compressed or not, is understood on both brokers.

    Its messages are confirmed: a quorum queue may lose what it has not when the connection ends.
    """
    with kombu.Connection(settings.url, transport_options={"confirm_publish": True}) as connection:
        producer = kombu.Producer(connection.channel(), auto_declare=False)
        for body, serializer in (({"post_id": "p1", "force": True}, "json"), ("p2", "raw")):
            producer.publish(
                body,
                serializer=serializer,
                routing_key=settings.queue,
                exchange="",
                compression=compression,
            )
    assert [parse_message(body) for body in received(settings, 2)] == [
        PostMessage("p1", force=True),
        PostMessage("p2"),
    ]


@pytest.mark.redis
def test_priorities_on_redis(on_redis: BrokerSettings, lists: redis.Redis) -> None:
    """A higher number is served sooner; a bare LPUSH and kombu's own are ranked with ours."""
    publish_posts(on_redis, [PostMessage(f"p{n}", priority=n) for n in (0, 3, 9, 5)])
    lists.lpush(on_redis.queue, b"bare")
    with kombu.Connection(on_redis.url) as connection:
        kombu.Producer(connection.channel(), auto_declare=False).publish(
            "kombu6", serializer="raw", routing_key=on_redis.queue, exchange="", priority=6
        )
    ids = [parse_message(body).post_id for body in received(on_redis, 6)]
    assert ids == ["p9", "kombu6", "p5", "p3", "p0", "bare"]


@pytest.mark.redis
def test_kombu_consumers_read_what_we_publish(on_redis: BrokerSettings) -> None:
    publish_posts(on_redis, [PostMessage("p1")])
    with connected(on_redis) as broker:
        Consumer(broker).take(1)
    with kombu.Connection(on_redis.url) as connection:
        message = connection.channel().basic_get(on_redis.queue, no_ack=True)
    assert message.payload == {"post_id": "p1"}
    assert message.headers["redelivered"]


def test_envelopes_survive_redelivery() -> None:
    """Marking as redelivered keeps the body of every item, bare or wrapped, and its compression."""
    squeezed = base64.b64encode(zlib.compress(b"p1")).decode()
    wrapped = {
        "body": squeezed,
        "headers": {"compression": "application/x-gzip"},
        "properties": {"body_encoding": "base64"},
    }
    for item in (b"p1", b"\xff\x00", json.dumps(wrapped).encode(), *UNREADABLE[:4]):
        body, redelivered, _ = read_item(item)
        assert not redelivered
        assert read_item(redelivery_of(item, "q", 3))[:2] == (body, True)


def test_the_trace_of_a_publisher_arrives_with_its_message(settings: BrokerSettings) -> None:
    """From the headers, where OpenTelemetry's instrumentations of pika and kombu put it."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with kombu.Connection(settings.url) as client, client.Producer() as producer:
        for headers in ({"traceparent": trace}, {}, {"traceparent": 5}):
            producer.publish(
                b"p1",
                routing_key=settings.queue,
                headers=headers,
                content_type="text/plain",
                content_encoding="binary",
            )
    with connected(settings) as broker:
        consumer = Consumer(broker, ack=True)
        consumer.take(3)
    assert [delivery.traceparent for delivery in consumer.got] == [trace, None, None]


BOMB = zlib.compress(bytes(20 * MAX_PLAIN_BYTES))
CUT = bz2.compress(b"p1" * 1000)[:-4]


@pytest.mark.parametrize(
    ("packed", "compression", "plain"),
    [
        (gzip.compress(b"p1", mtime=0), "gzip", b"p1"),
        (zlib.compress(bytes(MAX_PLAIN_BYTES)), "GZIP", bytes(MAX_PLAIN_BYTES)),
        pytest.param(BOMB, "application/x-gzip", BOMB, id="bomb"),
        pytest.param(CUT, "application/x-bz2", CUT, id="cut short"),
        (b"p1", "application/x-gzip", b"p1"),
        (b"p1", "application/zstd", b"p1"),
        (b"p1", 7, b"p1"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_compression(packed: bytes, compression: object, plain: bytes) -> None:
    """A body is unpacked up to a limit; what cannot be unpacked is left packed; nothing raises."""
    assert decompressed(packed, {"compression": compression}) == plain
    assert decompressed(packed, None) == decompressed(packed, ["compression"]) == packed
