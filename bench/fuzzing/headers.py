"""Odd properties of AMQP messages, past a real RabbitMQ, to the broker that the King uses."""

from __future__ import annotations

import random
import time
from pathlib import Path

from config.settings import BrokerSettings
from king.broker.base import Delivery
from king.broker.connect import open_broker, publish_posts
from tests.support.king.odd_properties import ODD_PROPERTIES, random_properties, send
from tests.support.services import RabbitMQServer

_LIMIT_S = 300
_LEADER_S = 2.0
"""RabbitMQ 3.10: a quorum queue has no leader right after its declaration."""


def lost_messages(folder: Path, seed: int, count: int) -> list[str]:
    """Send that many messages with odd properties; return those that do not arrive.

    All arrive on one connection, each with its body, or else its loss is named too.
    """
    rng = random.Random(f"{seed}/headers")
    odd = {f"random {i}": random_properties(rng) for i in range(count - len(ODD_PROPERTIES))}
    odd |= dict(list(ODD_PROPERTIES.items())[:count])
    server = RabbitMQServer(folder)
    server.start()
    try:
        settings = BrokerSettings(url=server.url, prefetch=64)
        publish_posts(settings, [])
        time.sleep(_LEADER_S)
        send(server, settings.queue, odd)
        broker = open_broker(settings)
        broker.connect()
        deliveries: list[Delivery] = []
        arrived = set[str]()
        broker.consume(deliveries.append)
        end = time.monotonic() + _LIMIT_S
        while time.monotonic() < end and not odd.keys() <= arrived:
            broker.drain(0.1)
            while deliveries:
                delivery = deliveries.pop()
                arrived.add(delivery.body.decode("utf-8", "backslashreplace"))
                broker.ack(delivery)
        broker.close()
    finally:
        server.close()
    return sorted(odd.keys() - arrived)
