"""Properties and bodies that a parser cannot read: one message's matter, never the connection's."""

import lzma
import random

import amqp
import pytest

from king.broker.connect import publish_posts
from king.messages import PostMessage, decompressed, parse_message
from tests.support.king.broker_rig import Consumer, connected, settings_for
from tests.support.king.odd_properties import ODD_PROPERTIES, random_properties, send, short
from tests.support.services import RabbitMQServer

pytestmark = pytest.mark.rabbitmq


def test_odd_properties_cost_nobody_anything(rabbitmq: RabbitMQServer, queue_name: str) -> None:
    """Each message arrives with its body, innocent ones between them too, on one connection."""
    rng = random.Random(1)
    odd = ODD_PROPERTIES | {f"random {i}": random_properties(rng) for i in range(300)}
    settings = settings_for(rabbitmq.url, queue_name, heartbeat_s=10, socket_timeout_s=5)
    publish_posts(settings, [PostMessage("before")])
    send(rabbitmq, queue_name, odd)
    publish_posts(settings, [PostMessage("after")])
    with connected(settings) as broker:
        consumer = Consumer(broker, ack=True)
        consumer.take(len(odd) + 2)
        assert broker.generation == 1
        assert broker.connected
    ids = sorted(parse_message(body).post_id for body in consumer.bodies)
    assert ids == sorted(["before", *odd, "after"])
    assert not any(delivery.redelivered for delivery in consumer.got)


def test_no_body_is_decoded_by_its_own_charset(rabbitmq: RabbitMQServer, queue_name: str) -> None:
    settings = settings_for(rabbitmq.url, queue_name, heartbeat_s=10, socket_timeout_s=5)
    publish_posts(settings, [])
    charset = ODD_PROPERTIES["a charset that makes half characters"]
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
        channel.confirm_select()
        channel.exchange_declare(queue_name, "fanout", auto_delete=False)
        channel.queue_bind(queue_name, queue_name)
        # py-amqp would not write such a key.
        arguments = bytes(2) + short(queue_name.encode()) + short(b"\xff\xfe") + bytes(1)
        client.frame_writer(1, channel.channel_id, (60, 40), arguments, amqp.Message("p1"))
        channel.wait(amqp.spec.Basic.Ack)
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
