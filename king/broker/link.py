"""One connection to a broker, over kombu: what RabbitMQ and Redis have in common.

A link raises the errors of kombu, py-amqp and redis as they are; `king.broker.broker` maps them.
It is
used by one thread. Every call ends within the time-outs of the settings.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeAlias

import kombu

from common.errors import ConfigError
from common.urls import redact
from config.settings import BrokerSettings
from king.messages import PostMessage

OnMessage: TypeAlias = Callable[[bytes, Any, bool], None]
"""Called with body, token, redelivered; must only take note, for it may run inside any call."""

CONFIRM_WINDOW = 500
"""Messages published before their confirms are waited for."""


class Link(ABC):
    """One connection, open from construction to `close` or `abandon`."""

    def __init__(self, settings: BrokerSettings, transport: type, options: dict[str, Any]) -> None:
        self.settings = settings
        self.queue = settings.queue
        try:
            self._kombu = kombu.Connection(
                settings.url,
                transport=transport,
                connect_timeout=settings.socket_timeout_s,
                heartbeat=settings.heartbeat_s,
                transport_options=options,
            )
        except (TypeError, ValueError) as error:  # kombu takes the query for its own arguments
            raise ConfigError(
                f"broker.url: {redact(settings.url)!r} has a part that is not understood"
            ) from error
        if settings.url.startswith(("amqps://", "rediss://")):
            asked = self._kombu.ssl if isinstance(self._kombu.ssl, dict) else {}
            self._kombu.ssl = self._tls(asked)
        try:
            self._kombu.ensure_connection(errback=_give_up, reraise_as_library_errors=False)
            self._raw = self._kombu.connection
            self._channel = self._kombu.channel()
        except BaseException:
            self.abandon()
            raise
        self._producer = kombu.Producer(self._channel, auto_declare=False)
        self._consumer: kombu.Consumer | None = None

    def consume(self, on_message: OnMessage) -> None:
        """Ask for messages, `prefetch` at a time."""
        self._consumer = kombu.Consumer(
            self._channel,
            queues=[kombu.Queue(self.queue, no_declare=True)],
            on_message=lambda message: on_message(
                bytes(message.body),
                message.delivery_tag,
                bool(message.delivery_info.get("redelivered")),
            ),
            auto_declare=False,
            prefetch_count=self.settings.prefetch,
        )
        self._consumer.consume()

    def cancel(self) -> None:
        """Ask for no more messages; those that came stay to be acknowledged."""
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            consumer.cancel()

    def ack(self, token: Any) -> None:
        """The message is done with."""
        self._channel.basic_ack(token)

    def requeue(self, token: Any) -> None:
        """Put the message back, to be served next."""
        self._channel.basic_reject(token, requeue=True)

    def purge(self) -> int:
        """Remove the ready messages.

        Returns:
            How many there were.
        """
        return int(self._channel.queue_purge(self.queue) or 0)

    @abstractmethod
    def publish(self, messages: Iterable[PostMessage]) -> int:
        """Publish and wait until the broker has them all.

        Returns:
            How many were published.
        """

    @abstractmethod
    def wait(self, timeout_s: float, held: Sequence[Any]) -> None:
        """Wait for messages and keep the connection alive; returns early when some came.

        Args:
            timeout_s: At most this long.
            held: Tokens that are not acknowledged yet.
        """

    @abstractmethod
    def renew(self, held: Sequence[Any]) -> None:
        """Keep messages that take long from being redelivered."""

    @abstractmethod
    def recover(self, tokens: Sequence[Any]) -> None:
        """Put back what an earlier connection of this process held."""

    @abstractmethod
    def depth(self, queue: str) -> int:
        """Ready messages; 0 where the queue does not exist."""

    @abstractmethod
    def close(self, held: Sequence[Any]) -> None:
        """Give back what is held and say goodbye."""

    def abandon(self) -> None:
        """Close the sockets without a word: the other side may be gone."""
        with contextlib.suppress(Exception):
            self._kombu.collect(socket_timeout=self.settings.socket_timeout_s)

    def _send(self, message: PostMessage, **options: Any) -> None:
        self._producer.publish(
            message.encode(),
            routing_key=self.queue,
            exchange="",
            content_type="application/json",
            content_encoding="utf-8",
            delivery_mode=2,
            priority=message.priority,
            retry=False,
            timeout=self.settings.socket_timeout_s,
            **options,
        )

    @abstractmethod
    def _tls(self, asked: dict[str, Any]) -> dict[str, Any]:
        """TLS options: verify the broker's certificate, unless the URL asks otherwise.

        Args:
            asked: The ``ssl_...`` parameters of the URL, for example ``ssl_ca_certs``.
        """


def _give_up(error: BaseException, _interval_s: float) -> NoReturn:
    """Kombu would sleep and try again; the caller does that, and says so in the log."""
    raise error
