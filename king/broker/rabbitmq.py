"""RabbitMQ, over kombu: a quorum queue, publisher confirms, heartbeats driven from `drain`."""

from __future__ import annotations

import contextlib
import ssl
import struct
import time
from collections.abc import Iterable
from itertools import islice
from typing import Any, ClassVar, NoReturn

import amqp.exceptions as amqp_errors
import kombu
from kombu.exceptions import KombuError, OperationalError

from common.errors import ConfigError
from common.urls import redact
from config.settings import BrokerSettings
from king.broker.base import (
    PUBLISH_WINDOW,
    Broker,
    ClientErrors,
    Delivery,
    OnDelivery,
    require_host,
)
from king.messages import PostMessage, decompressed

# Wait for the next event once some have come, in which the rest of a burst is read too. Zero would
# mean "for ever" to py-amqp; a hundred times as much would hold back the first message.
_BURST_WAIT_S = 0.001

# The most seconds between two looks at the heartbeat, which happen each quarter of one: the server
# closes after two heartbeats of silence, so that leaves room for a slow machine. Half of this
# looks more often than a heartbeat of whole seconds can need; at double, a stop of one second
# (the shortest heartbeat) may come too late.
_MAX_BEAT_INTERVAL_S = 1.0

_REFUSALS = (
    amqp_errors.AccessRefused,
    amqp_errors.NotAllowed,
    amqp_errors.PreconditionFailed,
    amqp_errors.ResourceLocked,
    amqp_errors.AMQPNotImplementedError,
    amqp_errors.InvalidPath,
)


def dead_queue(queue: str) -> str:
    """Return the name of the queue of messages that RabbitMQ dead-lettered itself."""
    return f"{queue}.dead"


class RabbitBroker(Broker):
    """A quorum queue on RabbitMQ (``amqp://``, ``amqps://``).

    The messages that the broker gives up on, after `delivery_limit` deliveries that nobody
    acknowledged, go through the exchange ``<queue>.dlx`` to the quorum queue ``<queue>.dead``.
    RabbitMQ itself puts back what is in hand when the connection ends.
    """

    errors: ClassVar[ClientErrors] = ClientErrors(
        types=(
            amqp_errors.AMQPError,
            amqp_errors.MessageNacked,  # not an AMQPError
            KombuError,
            OSError,
            EOFError,
            # py-amqp and kombu raise these on a connection that another event has torn down.
            AttributeError,
            KeyError,
            struct.error,
        ),
        is_refusal=lambda error: isinstance(error, _REFUSALS),
        hints={
            amqp_errors.PreconditionFailed: "the queue exists with other arguments ({}); "
            "delete it, set the same arguments, or name another broker.queue",
            amqp_errors.AccessRefused: "user or password refused, or no permission ({})",
        },
    )

    def __init__(self, settings: BrokerSettings) -> None:
        require_host(settings.url)
        super().__init__(settings)
        self._kombu: Any = None
        self._connection: Any = None  # py-amqp's, inside kombu's
        self._channel: Any = None
        self._consumer_tag: str | None = None
        self._published = 0  # number of the last message on this channel
        self._unconfirmed: set[int] = set()
        self._refused: list[str] = []
        self._beat_interval_s = min(_MAX_BEAT_INTERVAL_S, settings.heartbeat_s / 4)
        self._beat_due = 0.0

    def _open(self, declare: bool) -> None:
        self._kombu = _kombu_connection(self.settings)
        self._kombu.ensure_connection(errback=_give_up, reraise_as_library_errors=False)
        self._connection = self._kombu.connection
        self._channel = self._kombu.channel()
        self._consumer_tag = None
        self._published, self._unconfirmed, self._refused = 0, set(), []
        self._beat_due = time.monotonic() + self._beat_interval_s
        self._channel.confirm_select()
        self._channel.events["basic_ack"].add(self._on_confirm)
        self._channel.events["basic_nack"].add(self._on_nack)
        self._channel.events["basic_return"].add(self._on_return)
        if declare:
            self._declare()

    def _declare(self) -> None:
        queue, channel = self.settings.queue, self._channel
        exchange = f"{queue}.dlx"
        channel.exchange_declare(exchange, "direct", durable=True, auto_delete=False)
        channel.queue_declare(
            dead_queue(queue),
            durable=True,
            auto_delete=False,
            arguments={"x-queue-type": "quorum"},
        )
        channel.queue_bind(dead_queue(queue), exchange, routing_key=queue)
        channel.queue_declare(
            queue,
            durable=True,
            auto_delete=False,
            arguments={
                "x-queue-type": "quorum",
                "x-delivery-limit": self.settings.delivery_limit,
                "x-dead-letter-exchange": exchange,
                "x-dead-letter-routing-key": queue,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",  # at-least-once demands it
            },
        )

    def consume(self, on_delivery: OnDelivery) -> None:
        super().consume(on_delivery)
        if self._consumer_tag is None:
            with self._client_call():
                self._channel.basic_qos(0, self.settings.prefetch, False)
                self._consumer_tag = self._channel.basic_consume(
                    self.settings.queue, callback=self._on_message
                )

    def _on_message(self, message: Any) -> None:
        # Only noted: py-amqp calls this from inside any call that reads the socket. kombu's
        # consumer is not used, since it decompresses bodies without a limit.
        body = message.body.encode() if isinstance(message.body, str) else bytes(message.body)
        redelivered = bool(message.delivery_info.get("redelivered"))
        self._receive(decompressed(body, message.headers), message.delivery_tag, redelivered)

    def drain(self, timeout_s: float) -> int:
        with self._client_call():
            end = time.monotonic() + timeout_s
            while True:
                is_burst = bool(self._inbox)
                left_s = end - time.monotonic()
                came = self._read(_BURST_WAIT_S if is_burst else min(left_s, self._beat_interval_s))
                # After reading: frames that waited in the socket are signs of life as well.
                if time.monotonic() >= self._beat_due:
                    self._kombu.transport.heartbeat_check(self._connection)
                    self._beat_due = time.monotonic() + self._beat_interval_s
                if (is_burst and not came) or time.monotonic() >= end:
                    break
        return self._hand_over()

    def _read(self, timeout_s: float) -> bool:
        """Handle one event; `kombu.Connection` would reconnect here, silently and unsubscribed."""
        if not self._connection.connected:
            raise amqp_errors.RecoverableConnectionError("the connection is closed")
        try:
            self._connection.drain_events(timeout=max(timeout_s, _BURST_WAIT_S))
        except TimeoutError as error:
            if error.errno is not None:  # ETIMEDOUT of the kernel: the connection is dead
                raise
            return False
        return True

    def ack(self, delivery: Delivery) -> bool:
        return self._settle(delivery) and self._succeeds(
            lambda: self._channel.basic_ack(delivery.token)
        )

    def requeue(self, delivery: Delivery) -> bool:
        return self._settle(delivery) and self._succeeds(
            lambda: self._channel.basic_reject(delivery.token, requeue=True)
        )

    def publish(self, messages: Iterable[PostMessage]) -> int:
        count = 0
        iterator = iter(messages)
        while window := list(islice(iterator, PUBLISH_WINDOW)):
            with self._client_call():
                for message in window:
                    self._send(message)
                self._wait_for_confirms()
            count += len(window)
        return count

    def _send(self, message: PostMessage) -> None:
        self._published += 1
        self._unconfirmed.add(self._published)
        self._channel.basic_publish(
            self._channel.prepare_message(
                message.encode(),
                priority=message.priority,
                content_type="application/json",
                content_encoding="utf-8",
                properties={"delivery_mode": 2},
            ),
            routing_key=self.settings.queue,
            mandatory=True,
            timeout=self.settings.socket_timeout_s,
        )

    def _wait_for_confirms(self) -> None:
        # Twice the time-out: a whole window is written to disk and to the queue's other members.
        end = time.monotonic() + 2 * self.settings.socket_timeout_s
        while self._unconfirmed and not self._refused:
            left_s = end - time.monotonic()
            if left_s <= 0:
                raise amqp_errors.RecoverableConnectionError(
                    "published messages were not confirmed in time"
                )
            self._read(left_s)
        if self._refused:
            raise OperationalError(f"a published message was refused: {self._refused[0]}")

    def _on_confirm(self, tag: int, multiple: bool) -> None:
        if multiple:
            self._unconfirmed = {t for t in self._unconfirmed if t > tag}
        else:
            self._unconfirmed.discard(tag)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._refused.append("the queue is full or has no leader")
        self._on_confirm(tag, multiple)

    def _on_return(self, error: Exception, *_rest: Any) -> None:
        self._refused.append(str(error))

    def depth(self, queue: str | None = None) -> int:
        with self._client_call():
            channel = self._kombu.channel()  # of its own: an absent queue closes the channel
            try:
                reply = channel.queue_declare(queue or self.settings.queue, passive=True)
            except amqp_errors.NotFound:
                return 0
            channel.close()
            return int(reply.message_count)

    def cancel(self) -> None:
        tag, self._consumer_tag = self._consumer_tag, None
        if tag is not None:
            self._succeeds(lambda: self._channel.basic_cancel(tag))
        super().cancel()

    def _leave(self) -> None:
        if self._consumer_tag is not None:
            self._channel.basic_cancel(self._consumer_tag)
        self._connection.close()

    def _abandon(self) -> None:
        connection, self._kombu = self._kombu, None
        self._consumer_tag = None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.collect(socket_timeout=self.settings.socket_timeout_s)


def _kombu_connection(settings: BrokerSettings) -> Any:
    try:
        connection = kombu.Connection(
            settings.url,
            connect_timeout=settings.socket_timeout_s,
            heartbeat=settings.heartbeat_s,
            transport_options={
                # Without these a half-open connection hangs in a read or a write for ever.
                "read_timeout": settings.socket_timeout_s,
                "write_timeout": settings.socket_timeout_s,
            },
        )
    except (TypeError, ValueError) as error:  # kombu takes the query for its own arguments
        raise ConfigError(
            f"broker.url: {redact(settings.url)!r} has a part that is not understood"
        ) from error
    if settings.url.startswith("amqps://"):
        # Verified unless the URL's ``ssl_...`` parameters, which kombu has put into `ssl`, ask
        # otherwise. Without a server_hostname py-amqp checks the name that the URL has.
        options = connection.ssl if isinstance(connection.ssl, dict) else {}
        connection.ssl = {"server_hostname": None, "cert_reqs": ssl.CERT_REQUIRED} | {
            name.removeprefix("ssl_"): value for name, value in options.items()
        }
    return connection


def _give_up(error: BaseException, _interval_s: float) -> NoReturn:
    # Kombu would sleep and try again; the owner does that, and says so in the log.
    raise error
