"""RabbitMQ: a quorum queue, publisher confirms, heartbeats driven from `AmqpLink.wait`."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from amqp.exceptions import NotFound, RecoverableConnectionError
from kombu.exceptions import OperationalError
from kombu.transport import pyamqp

from config.settings import BrokerSettings
from king.broker.envelope import decompressed
from king.broker.link import CONFIRM_WINDOW, Link, OnMessage
from king.messages import PostMessage

MIN_WAIT_S = 0.001


def dead_queue(queue: str) -> str:
    """RabbitMQ's queue of the messages that it dead-lettered itself."""
    return f"{queue}.dead"


class _RawMessage(pyamqp.Message):  # type: ignore[misc]  # kombu is untyped
    """A message with its body as bytes; kombu would decompress it without a limit."""

    def __init__(self, msg: Any, channel: Any = None, **kwargs: Any) -> None:
        headers = msg.properties.pop("application_headers", None)
        super().__init__(msg, channel, **kwargs)
        compression = headers.get("compression") if isinstance(headers, dict) else None
        body = msg.body.encode() if isinstance(msg.body, str) else bytes(msg.body)
        self.body = decompressed(body, compression if isinstance(compression, str) else None)


class _RawChannel(pyamqp.Channel):  # type: ignore[misc]  # kombu is untyped
    Message = _RawMessage


class _RawConnection(pyamqp.Connection):  # type: ignore[misc]  # kombu is untyped
    Channel = _RawChannel


class _RawTransport(pyamqp.Transport):  # type: ignore[misc]  # kombu is untyped
    Connection = _RawConnection


class AmqpLink(Link):
    """One connection to RabbitMQ.

    The messages that the broker gives up on, after `delivery_limit` deliveries that nobody
    acknowledged, go through the exchange ``<queue>.dlx`` to the quorum queue ``<queue>.dead``.
    """

    def __init__(self, settings: BrokerSettings, *, declare: bool = True) -> None:
        super().__init__(
            settings,
            _RawTransport,
            {
                # Without these a half-open connection hangs in a read or a write for ever.
                "read_timeout": settings.socket_timeout_s,
                "write_timeout": settings.socket_timeout_s,
            },
        )
        self._received = 0
        self._unconfirmed: set[int] = set()
        self._refused: list[str] = []
        self._sequence = 0
        self._beat_interval_s = min(1.0, settings.heartbeat_s / 4)
        self._next_beat = time.monotonic() + self._beat_interval_s
        try:
            self._channel.confirm_select()
            self._channel.events["basic_ack"].add(self._on_confirm)
            self._channel.events["basic_nack"].add(self._on_refusal)
            self._channel.events["basic_return"].add(self._on_return)
            if declare:
                self._declare()
        except BaseException:
            self.abandon()
            raise

    def _declare(self) -> None:
        queue, channel = self.queue, self._channel
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
                "x-overflow": "reject-publish",  # what at-least-once asks for
            },
        )

    def consume(self, on_message: OnMessage) -> None:
        """Ask for messages, `prefetch` at a time."""

        def count(body: bytes, token: Any, redelivered: bool) -> None:
            self._received += 1
            on_message(body, token, redelivered)

        super().consume(count)

    def publish(self, messages: Iterable[PostMessage]) -> int:
        """Publish with confirms, a window at a time.

        Raises:
            BrokerUnavailable: The broker refused a message, or did not confirm in time.
        """
        count = 0
        iterator = iter(messages)
        while window := list(islice(iterator, CONFIRM_WINDOW)):
            for message in window:
                self._sequence += 1
                self._unconfirmed.add(self._sequence)
                self._send(message, mandatory=True)
            self._wait_for_confirms()
            count += len(window)
        return count

    def _wait_for_confirms(self) -> None:
        end = time.monotonic() + 2 * self.settings.socket_timeout_s
        while self._unconfirmed and not self._refused:
            left = end - time.monotonic()
            if left <= 0:
                raise RecoverableConnectionError("published messages were not confirmed in time")
            self._drain(left)
        if self._refused:
            self._refused, reasons = [], self._refused
            raise OperationalError(f"a published message was refused: {reasons[0]}")

    def _on_confirm(self, tag: int, multiple: bool) -> None:
        if multiple:
            self._unconfirmed = {t for t in self._unconfirmed if t > tag}
        else:
            self._unconfirmed.discard(tag)

    def _on_refusal(self, tag: int, multiple: bool) -> None:
        self._refused.append("the queue is full or has no leader")
        self._on_confirm(tag, multiple)

    def _on_return(self, error: Exception, *_rest: Any) -> None:
        self._refused.append(str(error))

    def wait(self, timeout_s: float, held: Sequence[Any]) -> None:
        """Read what comes; drive the heartbeat."""
        end = time.monotonic() + timeout_s
        before = self._received
        while True:
            came = self._received > before
            left = end - time.monotonic()
            some = self._drain(MIN_WAIT_S if came else min(left, self._beat_interval_s))
            # After reading: frames that waited in the socket are signs of life as well.
            if time.monotonic() >= self._next_beat:
                self._kombu.transport.heartbeat_check(self._raw)
                self._next_beat = time.monotonic() + self._beat_interval_s
            if (came and not some) or time.monotonic() >= end:
                return

    def _drain(self, timeout_s: float) -> bool:
        """Handle one event. `kombu.Connection` would reconnect here, silently and unsubscribed."""
        if not self._raw.connected:
            raise RecoverableConnectionError("the connection is closed")
        try:
            self._raw.drain_events(timeout=max(timeout_s, MIN_WAIT_S))
        except TimeoutError as error:
            if error.errno is not None:  # ETIMEDOUT of the kernel: the connection is dead
                raise
            return False
        return True

    def renew(self, held: Sequence[Any]) -> None:
        """Nothing: RabbitMQ holds messages for as long as the connection lives."""

    def recover(self, tokens: Sequence[Any]) -> None:
        """Nothing: RabbitMQ has put them back when the connection ended."""

    def depth(self, queue: str) -> int:
        """Ready messages, by a passive declare on a channel of its own."""
        channel = self._kombu.channel()  # a queue that is absent closes the channel
        try:
            count = int(channel.queue_declare(queue, passive=True).message_count)
        except NotFound:
            return 0
        channel.close()
        return count

    def close(self, held: Sequence[Any]) -> None:
        """Say goodbye; the broker puts back what is held."""
        try:
            self.cancel()
            self._raw.close()
        finally:
            self.abandon()

    def _tls(self, asked: dict[str, Any]) -> dict[str, Any]:
        # None: py-amqp takes the host of the URL, and so checks the name in the certificate.
        defaults = {"server_hostname": None, "cert_reqs": ssl.CERT_REQUIRED}
        return {**defaults, **{name.removeprefix("ssl_"): value for name, value in asked.items()}}
