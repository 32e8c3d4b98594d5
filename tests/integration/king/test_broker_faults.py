"""Broker connections through silence, restarts and kills, on real servers."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import amqp
import pytest

from common.errors import BrokerUnavailable
from config.settings import BrokerSettings
from king.broker.connect import open_broker, publish_posts, queue_depth
from king.broker.rabbitmq import dead_queue
from king.messages import PostMessage, parse_message
from tests.support.king.broker_rig import Consumer, connected, settings_for
from tests.support.proxy import Proxy, proxy_to
from tests.support.services import RabbitMQServer, RedisServer, wait_until

HOLDER = """
import sys, time
from config.settings import BrokerSettings
from king.broker.connect import open_broker
broker = open_broker(BrokerSettings.model_validate_json(sys.argv[1]))
broker.connect()
held = []
broker.consume(held.append)
while len(held) < int(sys.argv[2]):
    broker.drain(0.1)
print("holding", flush=True)
while True:
    broker.drain(0.1)
"""


@dataclass
class Site:
    """A broker's server, a proxy before it, and the queue of the test."""

    server: RedisServer | RabbitMQServer
    proxy: Proxy
    queue: str

    @property
    def direct(self) -> BrokerSettings:
        return settings_for(self.server.url, self.queue)

    @property
    def proxied(self) -> BrokerSettings:
        url = self.server.url.replace(f":{self.server.port}/", f":{self.proxy.port}/")
        return settings_for(url, self.queue)


@pytest.fixture
def site(broker_server: RedisServer | RabbitMQServer, queue_name: str) -> Iterator[Site]:
    """Each kind of real broker, behind a proxy."""
    with proxy_to(broker_server.address) as proxy:
        yield Site(broker_server, proxy, queue_name)


def posts(count: int, start: int = 0) -> list[PostMessage]:
    """Messages p<start> to p<start + count - 1>."""
    return [PostMessage(f"p{i}") for i in range(start, start + count)]


def ids(consumer: Consumer) -> set[str]:
    return {parse_message(body).post_id for body in consumer.bodies}


@pytest.mark.parametrize("replies_only", [False, True], ids=["silence", "no replies"])
def test_a_silent_connection_is_noticed_and_nothing_is_lost(site: Site, replies_only: bool) -> None:
    """With a connection that swallows bytes, consuming goes on within seconds, with every post.

    Where only the replies vanish, the server has handed messages out that never arrive.
    """
    publish_posts(site.direct, posts(40))
    with connected(site.proxied.model_copy(update={"prefetch": 5})) as broker:
        consumer = Consumer(broker, ack=True)
        consumer.take(10)
        assert site.proxy.blackhole(replies_only=replies_only) >= 1
        publish_posts(site.direct, posts(10, start=40))
        start = time.monotonic()
        consumer.until(lambda: len(ids(consumer)) == 50, heal=True)
        assert consumer.losses >= 1
        assert broker.generation >= 2
        assert time.monotonic() - start < 45
        # What was taken but lost on the way comes back; then the queue is empty for good.
        consumer.until(lambda: broker.depth() == 0, heal=True)


def test_publishing_into_silence_fails_in_time(site: Site) -> None:
    with connected(site.proxied) as broker:
        broker.publish([PostMessage("p1")])
        site.proxy.blackhole()
        start = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            broker.publish([PostMessage("p2")])
        assert time.monotonic() - start < 30
        broker.connect()
        broker.publish([PostMessage("p3")])
        assert broker.depth() == 2


def test_closing_a_silent_connection_ends(site: Site) -> None:
    publish_posts(site.direct, posts(3))
    with connected(site.proxied) as broker:
        Consumer(broker).take(3)
        site.proxy.blackhole()
        start = time.monotonic()
        broker.close()
        assert time.monotonic() - start < 30


def test_a_server_restart_loses_nothing(site: Site) -> None:
    """After SIGKILL and restart of the server, consuming goes on and every post has come.

    A quorum queue younger than a second may not survive a SIGKILL of a single RabbitMQ node (it
    stays without a leader, rabbitmq-server issue 10070), so this one is given time to settle.
    """
    publish_posts(site.direct, posts(30))
    with connected(site.direct.model_copy(update={"prefetch": 5})) as broker:
        consumer = Consumer(broker, ack=True)
        consumer.take(10)
        time.sleep(2)
        site.server.kill()
        with pytest.raises(BrokerUnavailable):
            consumer.until(lambda: False)
        with pytest.raises(BrokerUnavailable):
            broker.connect()
        site.server.start()
        consumer.until(lambda: len(ids(consumer)) == 30, heal=True)
        consumer.until(lambda: broker.depth() == 0, heal=True)


def test_a_killed_consumer_gives_back_what_it_held(site: Site, project_root: Path) -> None:
    publish_posts(site.direct, posts(6))
    holder: Any = subprocess.Popen(
        [sys.executable, "-c", HOLDER, site.direct.model_dump_json(), "6"],
        cwd=project_root,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"holding\n"
        with connected(site.direct) as broker:
            consumer = Consumer(broker)
            # Longer than the visibility time-out: a living holder keeps them.
            assert consumer.idle(2.5) == 0
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            for number in range(6):
                consumer.take(number + 1)
                assert broker.ack(consumer.got[number])
            assert ids(consumer) == {f"p{i}" for i in range(6)}
            assert all(delivery.redelivered for delivery in consumer.got)
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()


def delete_queue(server: RabbitMQServer, name: str) -> None:
    with amqp.Connection(f"127.0.0.1:{server.port}") as client:
        client.channel().queue_delete(name)


@pytest.mark.rabbitmq
def test_heartbeats_keep_an_idle_connection(rabbitmq: RabbitMQServer, queue_name: str) -> None:
    """Draining an empty queue for five heartbeats keeps the connection; not draining loses it."""

    def connections() -> set[str]:
        return set(rabbitmq.control("list_connections", "--quiet", "pid").split())

    others = connections()
    with connected(settings_for(rabbitmq.url, queue_name)) as broker:
        consumer = Consumer(broker)
        consumer.idle(3)
        assert broker.generation == 1
        broker.publish([PostMessage("p1")])
        consumer.take(1)
        wait_until(lambda: connections() <= others, 60, "RabbitMQ to give up the connection")
        with pytest.raises(BrokerUnavailable):
            consumer.until(lambda: False)
        consumer.until(lambda: len(consumer.got) == 2, heal=True)


@pytest.mark.rabbitmq
def test_a_deleted_queue_is_declared_again(rabbitmq: RabbitMQServer, queue_name: str) -> None:
    with connected(settings_for(rabbitmq.url, queue_name)) as broker:
        consumer = Consumer(broker)
        with connected(settings_for(rabbitmq.url, queue_name)) as other:
            delete_queue(rabbitmq, queue_name)
            with pytest.raises(BrokerUnavailable, match="NO_ROUTE"):
                other.publish([PostMessage("p1")])
        with pytest.raises(BrokerUnavailable):
            consumer.until(lambda: False)
        broker.connect()
        broker.publish([PostMessage("p1")])
        consumer.take(1)


@pytest.mark.rabbitmq
def test_what_kills_consumers_is_a_dead_letter(rabbitmq: RabbitMQServer, queue_name: str) -> None:
    settings = settings_for(rabbitmq.url, queue_name, delivery_limit=2)
    publish_posts(settings, [PostMessage("poison")])
    for _ in range(3):
        with connected(settings) as broker:
            Consumer(broker).take(1)
    wait_until(lambda: queue_depth(settings, dead_queue(queue_name)) == 1, 60, "dead-lettering")
    assert queue_depth(settings) == 0


@pytest.mark.redis
def test_long_work_is_not_redelivered(redis_server: RedisServer, queue_name: str) -> None:
    """A message in hand for three visibility time-outs stays there while its holder drains."""
    settings = settings_for(redis_server.url, queue_name, visibility_timeout_s=1)
    publish_posts(settings, posts(1))
    with connected(settings) as holder, connected(settings) as other:
        mine, theirs = Consumer(holder), Consumer(other)
        mine.take(1)
        end = time.monotonic() + 3
        while time.monotonic() < end:
            holder.drain(0.05)
            other.drain(0.05)
        assert len(theirs.got) == 0
        time.sleep(1.1)  # the holder hangs
        theirs.take(1)
        assert theirs.got[0].redelivered
        holder.ack(mine.got[0])  # too late: it must not take the other's message away
        assert other.ack(theirs.got[0])
        assert mine.idle() == theirs.idle() == 0


def test_nobody_listens(site: Site) -> None:
    site.proxy.close()
    broker = open_broker(site.proxied)
    with pytest.raises(BrokerUnavailable, match=str(site.proxy.port)) as caught:
        broker.connect()
    assert "guest:guest" not in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(BrokerUnavailable):
        queue_depth(site.proxied)
    with pytest.raises(BrokerUnavailable):
        publish_posts(site.proxied, posts(1))
