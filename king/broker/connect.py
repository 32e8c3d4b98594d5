"""From a broker URL to its `Broker`, and what a command does on a connection of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from common.errors import ConfigError
from common.urls import redact
from config.settings import BrokerSettings
from king.broker.base import Broker, Prefetch
from king.broker.rabbitmq import RabbitBroker
from king.broker.redis import RedisBroker
from king.messages import PostMessage

BROKERS: dict[str, type[Broker]] = {
    "amqp": RabbitBroker,
    "amqps": RabbitBroker,
    "redis": RedisBroker,
    "rediss": RedisBroker,
    "unix": RedisBroker,
}


def open_broker(settings: BrokerSettings, prefetch: Prefetch | None = None) -> Broker:
    """Return the broker that the URL names; ConfigError when it names none."""
    scheme = settings.url.partition("://")[0].lower()
    if scheme == "embedded":
        raise ConfigError("broker.url: embedded:// must be resolved before the queue is used")
    if scheme not in BROKERS:
        schemes = ", ".join(f"{name}://" for name in BROKERS)
        raise ConfigError(
            f"broker.url: {redact(settings.url)!r} is not a broker URL; use {schemes} or embedded://"
        )
    return BROKERS[scheme](settings, prefetch)


def publish_posts(settings: BrokerSettings, messages: Iterable[PostMessage]) -> int:
    """Connect, publish, disconnect; return the number of messages once the broker has all of them.

    Raises BrokerUnavailable (some may have arrived; publishing again is harmless), and ConfigError
    when it refuses the credentials or the queue has other arguments.
    """
    broker = open_broker(settings)
    broker.connect()
    try:
        return broker.publish(messages)
    finally:
        broker.close()


def queue_depth(settings: BrokerSettings, queue: str | None = None) -> int:
    """Connect, count the messages that wait, disconnect; declares nothing.

    Raises BrokerUnavailable, and ConfigError when the credentials are refused.
    """
    with _probed(settings) as broker:
        return broker.depth(queue)


def queue_counts(settings: BrokerSettings) -> tuple[int, int | None]:
    """Return the messages that wait, and those in somebody's hands, as `queue_depth`.

    The latter are None where the broker does not say: RabbitMQ tells only its management API.
    """
    with _probed(settings) as broker:
        return broker.depth(), broker.unacknowledged()


def reach(settings: BrokerSettings) -> None:
    """Connect and disconnect; raises as `queue_depth`."""
    with _probed(settings):
        pass


@contextmanager
def _probed(settings: BrokerSettings) -> Iterator[Broker]:
    broker = open_broker(settings)
    broker.connect(declare=False)
    try:
        yield broker
    finally:
        broker.close()
