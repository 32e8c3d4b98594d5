"""The contract of all brokers in `king.broker.connect.BROKERS`, and of the tests' own."""

import time
from collections.abc import Callable, Iterator

import pytest

from common.errors import BrokerUnavailable
from king.broker.base import PUBLISH_WINDOW, Delivery
from king.broker.connect import BROKERS
from king.messages import PostMessage, parse_message
from tests.support.king.broker_rig import Consumer, Rig, settings_for

SERVERS = {"amqp": ("rabbitmq", pytest.mark.rabbitmq), "redis": ("redis_server", pytest.mark.redis)}
"""URL scheme -> fixture of its server, and its mark; a broker that is not here needs no server."""

# One scheme of each broker, the first: amqps:// is held to the contract as amqp:// is.
SCHEMES = {broker: scheme for scheme, broker in reversed(BROKERS.items())}.values()


@pytest.fixture(
    params=[
        "fake",
        *(pytest.param(s, marks=SERVERS[s][1] if s in SERVERS else ()) for s in SCHEMES),
    ]
)
def rig(request: pytest.FixtureRequest, queue_name: str) -> Iterator[Rig]:
    """One queue on each kind of broker."""
    scheme = request.param
    settings = None
    if scheme != "fake":
        server = request.getfixturevalue(SERVERS[scheme][0]) if scheme in SERVERS else None
        url = server.url if server is not None else f"{scheme}://localhost"
        settings = settings_for(
            url, queue_name, heartbeat_s=10, socket_timeout_s=5, visibility_timeout_s=40
        )
    rig = Rig(settings)
    yield rig
    rig.close()


def test_a_published_post_arrives_and_an_acked_one_is_gone(rig: Rig) -> None:
    broker = rig.broker()
    message = PostMessage("帖子 1", priority=3, force=True)
    broker.publish([message])
    (delivery,) = Consumer(broker).take(1)
    assert parse_message(delivery.body) == message
    assert delivery.generation == broker.generation == 1
    assert not delivery.redelivered
    assert broker.ack(delivery)
    broker.close()
    assert Consumer(rig.broker()).idle() == 0


def test_order_is_kept(rig: Rig) -> None:
    """But for messages that are in hand together."""
    broker = rig.broker(prefetch=4)
    count = 2 * PUBLISH_WINDOW + 3
    assert broker.publish(PostMessage(f"p{i}") for i in range(count)) == count
    assert broker.depth() == count
    consumer = Consumer(broker, ack=True)
    consumer.take(count)
    numbers = [int(parse_message(body).post_id[1:]) for body in consumer.bodies]
    assert sorted(numbers) == list(range(count))
    assert all(abs(number - place) < 4 for place, number in enumerate(numbers))
    assert broker.depth() == 0


def test_a_higher_priority_is_served_sooner_or_its_lack_is_named(rig: Rig) -> None:
    """An operator who publishes with priorities learns at the start where they do nothing."""
    broker = rig.broker(prefetch=1)
    broker.publish(PostMessage(f"p{i}") for i in range(5))
    broker.publish([PostMessage("urgent", priority=9)])
    consumer = Consumer(broker, ack=True)
    consumer.take(6)
    is_sooner = parse_message(consumer.bodies[0]).post_id == "urgent"
    assert is_sooner is not ("priorities" in (broker.shortcoming or ""))


def test_a_failing_source_is_not_hidden(rig: Rig) -> None:
    """An error of the iterable to publish reaches the caller, and the connection stays usable."""

    def source() -> Iterator[PostMessage]:
        yield PostMessage("p1")
        raise RuntimeError("the file could not be read")

    broker = rig.broker()
    with pytest.raises(RuntimeError, match="could not be read"):
        broker.publish(source())
    assert broker.publish([]) == 0
    assert broker.connected


def test_prefetch_bounds_what_is_in_hand(rig: Rig) -> None:
    """No more than `prefetch` come until one is acknowledged; the rest waits on the server."""
    broker = rig.broker(prefetch=3)
    broker.publish(PostMessage(f"p{i}") for i in range(5))
    consumer = Consumer(broker)
    consumer.take(3)
    assert consumer.idle() == 0
    assert broker.depth() == 2
    assert broker.ack(consumer.got[0])
    consumer.take(4)
    assert consumer.idle() == 0


def test_acks_in_any_order_remove_exactly_their_messages(rig: Rig) -> None:
    broker = rig.broker(prefetch=8)
    broker.publish(PostMessage(f"p{i}") for i in range(6))
    consumer = Consumer(broker)
    consumer.take(6)
    for number in (4, 0, 1, 5):
        assert broker.ack(consumer.got[number])
    broker.drain(0.1)
    broker.close()
    other = Consumer(rig.broker(), ack=True)
    other.take(2, timeout_s=30)
    assert other.idle() == 0
    assert [parse_message(b).post_id for b in other.bodies] == ["p2", "p3"]


def test_a_drain_is_ended_by_a_wake_before_it(rig: Rig) -> None:
    broker = rig.broker()
    Consumer(broker).idle(0.1)
    broker.wake()
    began = time.monotonic()
    assert broker.drain(30) == 0
    assert time.monotonic() - began < 15


def test_more_are_in_hand_while_messages_pass_quickly(rig: Rig) -> None:
    """With ``auto``; once they stop, few are in hand again, and none is lost on the way."""
    broker = rig.broker(prefetch="auto")
    consumer = Consumer(broker, ack=True)
    published = most = 0
    while most <= broker.prefetch.least and published < 100_000:
        published += broker.publish(PostMessage(f"p{published + i}") for i in range(500))
        while len(consumer.got) < published:
            most = max(most, broker.drain(1))
    assert broker.prefetch.least < most <= broker.prefetch.most
    assert len({*consumer.bodies}) == len(consumer.got) == published
    assert not any(delivery.redelivered for delivery in consumer.got)


def test_after_a_lost_connection_messages_come_alone_until_a_new_one(rig: Rig) -> None:
    """The message that ended a consumer is counted alone: no other is in hand with it."""
    broker = rig.broker(prefetch=4)
    broker.publish(PostMessage(f"p{i}") for i in range(4))
    consumer = Consumer(broker)
    consumer.take(4)
    broker.connect()
    for number in range(4, 8):
        consumer.take(number + 1)
        assert consumer.got[number].redelivered
        assert consumer.idle(0.2) == 0
        assert broker.ack(consumer.got[number])
    broker.publish(PostMessage(f"new{i}") for i in range(6))
    consumer.take(12)
    assert consumer.idle() == 0
    assert not any(delivery.redelivered for delivery in consumer.got[8:])


def test_requeued_comes_back_marked(rig: Rig) -> None:
    broker = rig.broker(prefetch=1)
    broker.publish([PostMessage("p1")])
    broker.publish([PostMessage("p2")])
    consumer = Consumer(broker)
    (first,) = consumer.take(1)
    assert broker.requeue(first)
    again = consumer.take(2)[1]
    assert again.body == first.body
    assert again.redelivered
    assert broker.ack(again)
    assert parse_message(consumer.take(3)[2].body).post_id == "p2"


def test_close_gives_back_what_is_in_hand(rig: Rig) -> None:
    """A broker that closes leaves its unacknowledged messages to the others, at once."""
    broker = rig.broker()
    broker.publish(PostMessage(f"p{i}") for i in range(3))
    consumer = Consumer(broker)
    consumer.take(3)
    assert broker.ack(consumer.got[1])
    broker.close()
    other = Consumer(rig.broker(), ack=True)
    other.take(2, timeout_s=30)
    assert [parse_message(b).post_id for b in other.bodies] == ["p0", "p2"]
    assert all(delivery.redelivered for delivery in other.got)


def test_a_stale_ack_does_nothing(rig: Rig) -> None:
    """An ack of an earlier connection is dropped, and its message is delivered again."""
    broker = rig.broker()
    broker.publish([PostMessage("p1")])
    consumer = Consumer(broker)
    (old,) = consumer.take(1)
    broker.connect()
    assert broker.generation == 2
    assert not broker.ack(old)
    assert not broker.requeue(old)
    new = consumer.take(2)[1]
    assert (new.body, new.generation, new.redelivered) == (old.body, 2, True)
    assert not broker.ack(old)
    assert broker.ack(new)
    assert consumer.idle() == 0
    assert broker.depth() == 0


def test_a_second_ack_does_nothing(rig: Rig) -> None:
    broker = rig.broker()
    broker.publish([PostMessage("p1")])
    consumer = Consumer(broker)
    (delivery,) = consumer.take(1)
    assert broker.ack(delivery)
    assert not broker.ack(delivery)
    assert not broker.requeue(delivery)
    assert not broker.ack(Delivery(b"x", 999, broker.generation))
    broker.publish([PostMessage("p2")])
    consumer.take(2)


def test_two_consumers_share_a_queue(rig: Rig) -> None:
    one = Consumer(rig.broker(prefetch=2), ack=True)
    two = Consumer(rig.broker(prefetch=2), ack=True)
    one.broker.publish(PostMessage(f"p{i}") for i in range(30))
    end = time.monotonic() + 60
    while len(one.got) + len(two.got) < 30 and time.monotonic() < end:
        one.broker.drain(0.01)
        two.broker.drain(0.01)
    assert sorted(one.bodies + two.bodies) == sorted(
        PostMessage(f"p{i}").encode() for i in range(30)
    )


def test_cancel_stops_intake_but_not_acks(rig: Rig) -> None:
    """After `cancel` nothing more comes, and what is in hand can still be acknowledged."""
    broker = rig.broker(prefetch=2)
    broker.publish(PostMessage(f"p{i}") for i in range(4))
    consumer = Consumer(broker)
    consumer.take(2)
    broker.cancel()
    for delivery in consumer.got:
        assert broker.ack(delivery)
    assert consumer.idle() == 0
    assert broker.depth() == 2


def test_without_a_connection_it_says_so(rig: Rig) -> None:
    """Before `connect` and after `close`, work is refused by the right error; close is harmless."""
    broker = rig.broker()
    broker.close()
    broker.close()
    assert not broker.connected
    actions: list[Callable[[], object]] = [
        broker.depth,
        lambda: broker.drain(0.1),
        lambda: broker.publish([PostMessage("p")]),
    ]
    for action in actions:
        with pytest.raises(BrokerUnavailable):
            action()
    broker.cancel()
