"""The broker on Redis: a message is in its list or under a lease, and nowhere in between."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import king.broker.redis
from common.errors import BrokerUnavailable
from config.settings import BrokerSettings
from king.broker.connect import publish_posts, queue_counts, queue_depth
from king.messages import PostMessage
from tests.support.king.broker_rig import Consumer, connected, settings_for
from tests.support.proxy import proxy_to
from tests.support.services import RedisServer

pytestmark = pytest.mark.redis

SCRIPT = Path(king.broker.redis.__file__).with_name("redis.lua")


@pytest.fixture
def settings(redis_server: RedisServer, queue_name: str) -> BrokerSettings:
    """A queue with five posts."""
    settings = settings_for(redis_server.url, queue_name, visibility_timeout_s=60)
    publish_posts(settings, [PostMessage(f"p{i}") for i in range(5)])
    return settings


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Any]:
    """A plain Redis client; Any, for its types do not tell its sync answers from its async ones."""
    with redis.Redis.from_url(redis_server.url) as client:
        yield client


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random", "volatile-ttl", "noeviction"])
def test_a_deleting_server_is_named(settings: BrokerSettings, client: Any, policy: str) -> None:
    """The queue's keys never expire, so that only the policies of all keys choose among them."""
    client.config_set("maxmemory-policy", policy)
    try:
        with connected(settings) as broker:
            assert (policy in (broker.shortcoming or "")) is policy.startswith("allkeys")
            assert broker.depth() == 5
    finally:
        client.config_set("maxmemory-policy", "noeviction")


def test_a_user_who_may_not_ask_for_the_policy_is_served(
    redis_server: RedisServer, settings: BrokerSettings, client: Any
) -> None:
    client.acl_setuser("clerk", True, passwords=["+pw"], commands=["+@all", "-info"], keys=["*"])
    url = redis_server.url.replace("://", "://clerk:pw@").replace("@:", "@")
    with connected(settings.model_copy(update={"url": url})) as broker:
        assert broker.shortcoming is None
        Consumer(broker).take(5)


def test_taking_and_recording_is_one_step(settings: BrokerSettings, client: Any) -> None:
    """A message that leaves the list is at once in the unacked hash, with the end of its lease."""
    queue = settings.queue
    with connected(settings.model_copy(update={"prefetch": 3})) as broker:
        Consumer(broker).take(3)
        seconds, _ = client.time()
        assert client.llen(queue) == 2
        assert client.hlen(f"{queue}.unacked") == 3
        leases = [
            score for _, score in client.zrange(f"{queue}.unacked_index", 0, -1, withscores=True)
        ]
        assert len(leases) == 3
        assert all(seconds + 50 < lease < seconds + 70 for lease in leases)


def test_messages_in_hand_are_counted_also_after_a_kill(
    redis_server: RedisServer, settings: BrokerSettings
) -> None:
    """Without that `insighttag status` would miss them: they are on no list while leased."""
    with connected(settings.model_copy(update={"prefetch": 3})) as broker:
        Consumer(broker).take(3)
        assert queue_counts(settings) == (2, 3)
        redis_server.kill()
        redis_server.start()
        assert queue_counts(settings) == (2, 3)


def test_acks_are_sent_together_and_leave_nothing(settings: BrokerSettings, client: Any) -> None:
    """The acks between two drains cost one round trip; afterwards no key of the queue is left."""
    with connected(settings) as broker:
        consumer = Consumer(broker)
        consumer.take(5)
        before = client.info("stats")["total_commands_processed"]
        for delivery in consumer.got:
            assert broker.ack(delivery)
        assert client.hlen(f"{settings.queue}.unacked") == 5
        broker.drain(0)
        assert client.info("stats")["total_commands_processed"] - before < 20
        assert client.keys(f"{settings.queue}*") == []


def test_a_drain_that_waits_can_be_woken(settings: BrokerSettings) -> None:
    """So that what was asked for meanwhile does not wait for its end."""
    with connected(settings) as broker:
        Consumer(broker).take(5)
        timer = threading.Timer(0.2, broker.wake)
        timer.start()
        began = time.monotonic()
        assert broker.drain(600) == 0
        assert time.monotonic() - began < 300
        broker.wake()  # outside a drain: the next one does not wait
        assert broker.drain(600) == 0
        assert time.monotonic() - began < 300
        timer.join()


def test_an_ack_after_the_lease_takes_nobody_elses(settings: BrokerSettings, client: Any) -> None:
    with connected(settings) as broker:
        (*_, last) = Consumer(broker).take(5)
        client.zadd(f"{settings.queue}.unacked_index", {last.token: 1}, xx=True)
        with connected(settings) as other:
            other.drain(0)
            assert other.depth() == 1
            other.drain(0)
            assert other.depth() == 1
        broker.ack(last)
        broker.cancel()
        broker.drain(0)
        assert broker.depth() == 1


def test_a_renewed_lease_is_not_given_back(settings: BrokerSettings, client: Any) -> None:
    """Between the look at expired leases and the giving back, a renewal still counts."""
    with connected(settings) as broker:
        consumer = Consumer(broker)
        consumer.take(5)
        script = client.register_script(SCRIPT.read_text())
        keys = [f"{settings.queue}.unacked", f"{settings.queue}.unacked_index", settings.queue]
        for delivery in consumer.got:
            assert script(keys, ["give_back", delivery.token, "expired", "LPUSH", "item"]) == 0
        assert broker.depth() == 0


KOMBU_ENTRY = b'[{"body": "cDk=", "properties": {"body_encoding": "base64"}}, "", "q"]'


@pytest.mark.parametrize("tag", [b"tag", b"\xff\xfe", b""])
@pytest.mark.parametrize(
    ("entry", "body"),
    [
        (b"0p9", b"p9"),
        (b"9", b""),
        (b"", b""),
        (b"p9", b"p9"),
        (b"\xff\xfe", b"\xff\xfe"),
        ("\u0663p9".encode(), "\u0663p9".encode()),
        (KOMBU_ENTRY, KOMBU_ENTRY),
    ],
)
def test_what_a_stranger_leased_is_a_message(
    settings: BrokerSettings, client: Any, tag: bytes, entry: bytes, body: bytes
) -> None:
    """When its lease has run out it comes like the others; what it is the reader of bodies says."""
    client.hset(f"{settings.queue}.unacked", tag, entry)
    client.zadd(f"{settings.queue}.unacked_index", {tag: 1})
    with connected(settings) as broker:
        consumer = Consumer(broker, ack=True)
        consumer.take(6)
        assert body in consumer.bodies
        broker.drain(0)
        assert client.keys(f"{settings.queue}*") == []


def test_leases_without_messages_hold_up_nobody(settings: BrokerSettings, client: Any) -> None:
    """As after a purge by hand: more than are looked at together, and older than a message's."""
    index = f"{settings.queue}.unacked_index"
    client.zadd(index, {f"gone{i}": 1 for i in range(150)})
    client.hset(f"{settings.queue}.unacked", "tag", b"0p9")
    client.zadd(index, {"tag": 2})
    quick = settings.model_copy(update={"visibility_timeout_s": 1})
    with connected(quick) as broker:
        consumer = Consumer(broker, ack=True)
        consumer.take(6, timeout_s=30)
        assert b"p9" in consumer.bodies
        broker.drain(0)
        assert client.keys(f"{settings.queue}*") == []


def test_acks_of_lost_connections_are_sent_later(settings: BrokerSettings, client: Any) -> None:
    with connected(settings) as broker:
        consumer = Consumer(broker)
        consumer.take(5)
        for delivery in consumer.got:
            assert broker.ack(delivery)
        broker.connect()
        assert consumer.idle(0.1) == 0
        assert client.keys(f"{settings.queue}*") == []


def test_messages_whose_answer_was_lost_come_with_the_next_connection(
    settings: BrokerSettings, redis_server: RedisServer
) -> None:
    """The server has handed them out, and nobody has them: they wait for no lease to run out."""
    with proxy_to(redis_server.address) as proxy:
        url = settings.url.replace(f":{redis_server.port}/", f":{proxy.port}/")
        with connected(settings.model_copy(update={"url": url})) as broker:
            consumer = Consumer(broker)
            consumer.take(5)
            publish_posts(settings, [PostMessage("late")])
            proxy.blackhole(replies_only=True)
            with pytest.raises(BrokerUnavailable):
                consumer.until(lambda: False)
            assert queue_depth(settings) == 0
            broker.connect()
            for number in range(5, 5 + 6):
                consumer.take(number + 1, timeout_s=30)
                assert broker.ack(consumer.got[number])


def test_queues_do_not_share_keys(settings: BrokerSettings, redis_server: RedisServer) -> None:
    """A consumer of another queue in the same database never gives back this queue's messages."""
    other = settings_for(redis_server.url, settings.queue + "2", visibility_timeout_s=0.2)
    with connected(settings) as broker, connected(other) as neighbour:
        mine, theirs = Consumer(broker), Consumer(neighbour)
        mine.take(5)
        assert theirs.idle(0.6) == 0
        assert broker.depth() == 0
