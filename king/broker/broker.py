"""The queue, as the King sees it: `Broker`, and `KombuBroker` for RabbitMQ and Redis.

One thread owns a broker. It drains in a loop, and everything that keeps the connection alive
happens there: heartbeats on RabbitMQ, renewed leases on Redis. When the connection is lost,
`drain`, `publish` and `depth` raise `BrokerUnavailable`; the owner waits, with back-off, and calls
`connect` again. That starts a new generation: what was not acknowledged is delivered once more,
and an acknowledgement of the old generation does nothing.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import structlog

from common.errors import BrokerUnavailable, TaggingError
from common.urls import redact
from config.settings import BrokerSettings
from king.broker.connect import check_url, open_link
from king.broker.errors import mapped
from king.broker.link import Link
from king.messages import PostMessage

log = structlog.get_logger("king.broker")


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message in hand; it is this process's until `ack` or `requeue`.

    Attributes:
        body: As the publisher sent it, whatever its content type.
        token: What the broker knows it by, within its generation.
        generation: Of the connection that it came over.
        redelivered: Whether it may have been delivered before.
    """

    body: bytes
    token: int | str
    generation: int
    redelivered: bool = False


OnDelivery: TypeAlias = Callable[[Delivery], None]


class Broker(Protocol):
    """A queue of posts; used by one thread."""

    @property
    def generation(self) -> int:
        """Number of the present connection: 1 after the first `connect`."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as the last call could tell."""

    def connect(self) -> None:
        """Connect, or connect anew; consuming goes on where it was asked for.

        Raises:
            BrokerUnavailable: It cannot be reached now.
            ConfigError: It refuses the credentials, or the queue has other arguments.
        """

    def consume(self, on_delivery: OnDelivery) -> None:
        """Ask for messages; `on_delivery` is called inside `drain`, on this thread."""

    def drain(self, timeout_s: float) -> int:
        """Wait for messages, at most this long, and hand over those that came.

        Returns:
            How many were handed over.

        Raises:
            BrokerUnavailable: The connection is lost.
        """

    def ack(self, delivery: Delivery) -> bool:
        """Done with it. False where it had no effect: another generation, or acked before."""

    def requeue(self, delivery: Delivery) -> bool:
        """Put it back, to be served next. False where it had no effect."""

    def touch(self) -> None:
        """Renew the hold on all messages in hand; `drain` does it too, in good time."""

    def publish(self, message: PostMessage) -> None:
        """Put a post on the queue; returns when the broker has it.

        Raises:
            BrokerUnavailable: It may or may not have arrived.
        """

    def depth(self) -> int:
        """Messages that wait in the queue; those in hand are not counted."""

    def cancel(self) -> None:
        """Ask for no more messages; those in hand can still be acknowledged."""

    def close(self) -> None:
        """Put back what is in hand and disconnect; never raises."""


class KombuBroker:
    """RabbitMQ (``amqp://``, ``amqps://``) or Redis (``redis://``, ``rediss://``)."""

    def __init__(self, settings: BrokerSettings) -> None:
        check_url(settings.url)
        self._settings = settings
        self._link: Link | None = None
        self._loss: BrokerUnavailable | None = None
        self._generation = 0
        self._on_delivery: OnDelivery | None = None
        self._held: dict[int | str, Delivery] = {}  # in the order of arrival
        self._inbox: deque[Delivery] = deque()  # held, and not handed over yet

    @property
    def generation(self) -> int:
        """Number of the present connection: 1 after the first `connect`."""
        return self._generation

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as the last call could tell."""
        return self._link is not None

    def connect(self) -> None:
        """Connect, or connect anew; see `Broker.connect`."""
        self._drop()
        url = self._settings.url
        link = open_link(self._settings)
        try:
            with mapped(url):
                link.recover(list(self._held))
        except TaggingError:
            link.abandon()
            raise
        self._held.clear()
        self._inbox.clear()
        self._generation += 1
        self._link, self._loss = link, None
        if self._on_delivery is not None:
            with self._using() as link:
                link.consume(self._on_message)

    def consume(self, on_delivery: OnDelivery) -> None:
        """Ask for messages; see `Broker.consume`."""
        already = self._on_delivery is not None
        self._on_delivery = on_delivery
        if not already:
            with self._using() as link:
                link.consume(self._on_message)

    def drain(self, timeout_s: float) -> int:
        """Wait for messages and hand them over; see `Broker.drain`."""
        with self._using() as link:
            link.wait(0.0 if self._inbox else timeout_s, list(self._held))
        count = 0
        while self._inbox and self._on_delivery is not None:
            self._on_delivery(self._inbox.popleft())
            count += 1
        return count

    def ack(self, delivery: Delivery) -> bool:
        """Done with it; a loss of the connection shows in the next `drain`."""
        return self._settle(delivery, lambda link: link.ack(delivery.token))

    def requeue(self, delivery: Delivery) -> bool:
        """Put it back; a loss of the connection shows in the next `drain`."""
        return self._settle(delivery, lambda link: link.requeue(delivery.token))

    def touch(self) -> None:
        """Renew the hold on all messages in hand; see `Broker.touch`."""
        with contextlib.suppress(BrokerUnavailable), self._using() as link:
            link.renew(list(self._held))

    def publish(self, message: PostMessage) -> None:
        """Put a post on the queue; see `Broker.publish`."""
        with self._using() as link:
            link.publish([message])

    def depth(self) -> int:
        """Messages that wait in the queue; see `Broker.depth`."""
        with self._using() as link:
            return link.depth(self._settings.queue)

    def purge(self) -> int:
        """Remove the waiting messages; for tests and resets.

        Returns:
            How many there were.
        """
        with self._using() as link:
            return link.purge()

    def cancel(self) -> None:
        """Ask for no more messages; what was not handed over yet goes back."""
        self._on_delivery = None
        if self._link is None:
            return
        with contextlib.suppress(BrokerUnavailable):
            with self._using() as link:
                link.cancel()
            while self._inbox:
                self.requeue(self._inbox.pop())

    def close(self) -> None:
        """Put back what is in hand and disconnect; never raises."""
        self._on_delivery = None
        link, self._link = self._link, None
        if link is not None:
            try:
                with mapped(self._settings.url):
                    link.close(list(self._held))
            except BrokerUnavailable as error:
                log.warning("king.broker_close_failed", error=str(error))
        self._held.clear()
        self._inbox.clear()

    def _settle(self, delivery: Delivery, action: Callable[[Link], None]) -> bool:
        current = delivery.generation == self._generation and self._link is not None
        if not current or self._held.pop(delivery.token, None) is None:
            return False
        try:
            with self._using() as link:
                action(link)
        except BrokerUnavailable:
            return False
        return True

    def _on_message(self, body: bytes, token: int | str, redelivered: bool) -> None:
        """Only take note: kombu calls this from inside any call that reads the socket."""
        delivery = Delivery(body, token, self._generation, redelivered)
        self._held[token] = delivery
        self._inbox.append(delivery)

    @contextlib.contextmanager
    def _using(self) -> Iterator[Link]:
        """The link, with its errors mapped; one that fails is dropped."""
        if self._link is None:
            where = redact(self._settings.url)
            raise self._loss or BrokerUnavailable(f"broker {where}: not connected")
        try:
            with mapped(self._settings.url):
                yield self._link
        except BrokerUnavailable as error:
            self._loss = error
            self._drop()
            raise

    def _drop(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.abandon()


def queue_depth(settings: BrokerSettings, queue: str | None = None) -> int:
    """Messages that wait, asked on a connection of its own, which this call opens and closes.

    Args:
        settings: Of the broker.
        queue: Another queue than that of the settings, for example
        `king.broker.rabbitmq.dead_queue`.

    Raises:
        BrokerUnavailable: No answer within the time-outs.
        ConfigError: The broker refuses the credentials.
    """
    link = open_link(settings, declare=False)
    try:
        with mapped(settings.url, setup=True):
            return link.depth(queue or settings.queue)
    finally:
        link.abandon()
