"""Which link a broker URL asks for."""

from __future__ import annotations

from urllib.parse import urlsplit

from common.errors import ConfigError
from common.urls import redact
from config.settings import BrokerSettings
from king.broker.errors import mapped
from king.broker.link import Link
from king.broker.rabbitmq import AmqpLink
from king.broker.redis import RedisLink


def open_link(settings: BrokerSettings, *, declare: bool = True) -> Link:
    """Connect to the broker that the URL names.

    Args:
        settings: Of the broker.
        declare: Create the queue where it is absent, and check its arguments where it is there.

    Raises:
        BrokerUnavailable: It cannot be reached now.
        ConfigError: The URL cannot be used, the broker refuses the credentials, or the queue
            exists with other arguments.
    """
    check_url(settings.url)
    kind = AmqpLink if settings.url.startswith("amqp") else RedisLink
    with mapped(settings.url, setup=True):
        return kind(settings, declare=declare)


def check_url(url: str) -> None:
    """Refuse what kombu would read as several brokers, or could not read.

    Raises:
        ConfigError: The URL cannot be used.
    """
    if ";" in url:
        raise ConfigError("broker.url: name one broker; put a cluster behind one name")
    if url.startswith("embedded://"):
        raise ConfigError("broker.url: embedded:// must be resolved before the queue is used")
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0
        if parts.scheme in {"redis", "rediss"}:
            int(parts.path.strip("/") or 0)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"broker.url: {redact(url)!r} names no host, port or database")
