"""RabbitMQ, over kombu: a quorum queue, publisher confirms, heartbeats driven from `drain`.

Two connections, as RabbitMQ asks for: while it has a memory or disk alarm it stops reading from
every connection that publishes, and acknowledgements on that one would wait as well.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import ssl
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar, NoReturn

import amqp.exceptions as amqp_errors
import kombu
from amqp.basic_message import Message
from amqp.method_framing import frame_handler
from amqp.spec import Basic
from kombu.exceptions import KombuError, OperationalError

from common.errors import BrokerUnavailable, ConfigError, PublishRefused
from common.urls import redact
from config.settings import BrokerSettings
from king.broker.base import (
    PUBLISH_WINDOW,
    Broker,
    ClientErrors,
    Delivery,
    OnDelivery,
    Prefetch,
    Waker,
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

# Kinds of AMQP frames.
_METHOD, _HEADER = 1, 2

_ALARM = "it has a memory or disk alarm and takes no messages until that is over"
_FULL = "the queue is full or has no leader"

_REFUSALS = (
    amqp_errors.AccessRefused,
    amqp_errors.NotAllowed,
    amqp_errors.PreconditionFailed,
    amqp_errors.ResourceLocked,
    amqp_errors.AMQPNotImplementedError,  # AMQP's 540: the server lacks what was asked of it
    amqp_errors.InvalidPath,
)


def dead_queue(queue: str) -> str:
    """Return the name of the queue of messages that RabbitMQ dead-lettered itself."""
    return f"{queue}.dead"


def shortcoming_of(version: str) -> str | None:
    """Return what a server of this version cannot do with our queue; None for nothing.

    Quorum queues of RabbitMQ 4 have priorities without being declared so: two levels (up to 4, and
    above), all levels from 4.3 on. ``x-max-priority`` is for classic queues: quorum queues refuse
    it, at least up to 4.2, and existing ones can never be given it.
    """
    major = version.partition(".")[0]
    if not major.isdigit() or int(major) >= 4:
        return None
    return f"RabbitMQ {version} ignores priorities on quorum queues; version 4 has them"


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
        # A limit of connections, channels or queues is no mistake: others may go.
        is_refusal=lambda error: isinstance(error, _REFUSALS) and " limit " not in str(error),
        hints={
            amqp_errors.PreconditionFailed: "the queue exists with other arguments ({}); "
            "delete it, set the same arguments, or name another broker.queue",
            amqp_errors.AccessRefused: "user or password refused, or no permission ({})",
        },
    )

    def __init__(self, settings: BrokerSettings, prefetch: Prefetch | None = None) -> None:
        require_host(settings.url)
        super().__init__(settings, prefetch)
        self._link = _Link(settings)
        self._consumers: list[tuple[str, int]] = []  # tag, messages that it may have in hand
        self._last_of_cancelled = 0  # tag of the last delivery to a consumer that was cancelled
        self._beat_interval_s = min(_MAX_BEAT_INTERVAL_S, settings.heartbeat_s / 4)
        self._beat_due = 0.0

    def _open(self, declare: bool) -> None:
        self._consumers, self._acked = [], []  # what was not told is delivered once more
        self._last_of_cancelled = 0
        self._beat_due = time.monotonic() + self._beat_interval_s
        self._link = _Link(self.settings)
        self._link.open()
        self.shortcoming = shortcoming_of(self._link.version)
        if declare:
            self._declare()

    def _declare(self) -> None:
        queue, channel = self.settings.queue, self._link.channel
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
        if not self._consumers:
            with self._client_call():
                self._add_consumer(self._window)

    def _add_consumer(self, limit: int) -> None:
        channel = self._link.channel
        channel.basic_qos(0, limit, False)
        tag = channel.basic_consume(self.settings.queue, callback=self._on_message)
        self._consumers.append((tag, limit))

    def _follow_window(self) -> None:
        """Add a consumer for what the window has gained, or cancel those that are too many.

        RabbitMQ fixes the limit for the life of a consumer. Both are done only while each consumer
        has all that it may have: a message that is on its way meanwhile may be lost to us until the
        connection ends. What a cancelled consumer had in hand hides that, so it must be gone.
        """
        unsettled = [*self._in_hand, *self._acked]
        consumed = sum(limit for _, limit in self._consumers)
        if consumed == self._window or len(unsettled) != consumed:
            return
        if min(map(int, unsettled)) <= self._last_of_cancelled:
            return
        if consumed < self._window:
            self._add_consumer(self._window - consumed)
        while consumed - self._consumers[-1][1] >= self._window:
            self._last_of_cancelled = max(map(int, unsettled))
            tag, limit = self._consumers.pop()
            self._link.channel.basic_cancel(tag)
            consumed -= limit

    def _on_message(self, message: Any) -> None:
        # Only noted: py-amqp calls this from inside any call that reads the socket. kombu's
        # consumer is not used, since it decompresses bodies without a limit.
        redelivered = bool(message.delivery_info["redelivered"])
        self._receive(
            bytes(message.body or b""),  # py-amqp has a str for no body
            message.delivery_tag,
            lambda body: (decompressed(body, message.headers), redelivered, message.headers),
        )

    def drain(self, timeout_s: float) -> int:
        with self._client_call():
            self._link.deadline = float("inf")
            end = time.monotonic() + timeout_s
            self._keep_pace()
            if self._consumers:
                self._follow_window()
            self._flush()
            while True:
                is_burst = bool(self._inbox)
                left_s = end - time.monotonic()
                wait_s = _BURST_WAIT_S if is_burst else min(left_s, self._beat_interval_s)
                woken, has_more = self._link.wait(wait_s, self._waker)
                if has_more:
                    self._link.read()
                # After reading: frames that waited in the socket are signs of life as well.
                if time.monotonic() >= self._beat_due:
                    self._link.beat()
                    self._beat_due = time.monotonic() + self._beat_interval_s
                is_over = not has_more and (woken or is_burst)
                if is_over or time.monotonic() >= end:
                    break
        return self._hand_over()

    def _flush(self) -> None:
        """Send the acknowledgements: one for all messages before the oldest that is in hand."""
        acked, self._acked = sorted(map(int, self._acked)), []
        oldest = min(map(int, self._in_hand), default=math.inf)
        count = bisect.bisect(acked, oldest)
        if count:
            self._link.channel.basic_ack(acked[count - 1], multiple=True)
        for token in acked[count:]:
            self._link.channel.basic_ack(token)

    def requeue(self, delivery: Delivery) -> bool:
        return self._settle(delivery) and self._succeeds(
            lambda: self._link.channel.basic_reject(delivery.token, requeue=True)
        )

    def publish(self, messages: Iterable[PostMessage]) -> int:
        with self._client_call():
            if self._on_delivery is None and not self._in_hand:
                try:
                    return self._link.publish(messages)
                except PublishRefused:
                    if self._link.has_alarm:
                        self._drop()  # nothing more is read from this connection, a goodbye neither
                    raise
            link = _Link(self.settings)
            try:
                with self.errors.mapped(self.settings.url):
                    link.open()
                    count = link.publish(messages)
                    link.close()
            except BrokerUnavailable as error:
                raise PublishRefused(str(error)) from error
            finally:
                link.abandon()
            return count

    def depth(self, queue: str | None = None) -> int:
        with self._client_call():
            channel = self._link.new_channel()  # of its own: an absent queue closes the channel
            try:
                reply = channel.queue_declare(queue or self.settings.queue, passive=True)
            except amqp_errors.NotFound:
                return 0
            channel.close()
            return int(reply.message_count)

    def cancel(self) -> None:
        self._succeeds(self._cancel_consumers)
        super().cancel()

    def _cancel_consumers(self) -> None:
        while self._consumers:
            self._link.channel.basic_cancel(self._consumers.pop()[0])

    @contextlib.contextmanager
    def _client_call(self) -> Iterator[None]:
        with super()._client_call():
            self._link.limit(2 * self.settings.socket_timeout_s)
            yield

    def _leave(self) -> None:
        self._flush()
        self._cancel_consumers()
        for token in self._in_hand:  # RabbitMQ would put them back by consumer
            self._link.channel.basic_reject(token, requeue=True)
        self._link.close()

    def _abandon(self) -> None:
        self._consumers = []
        self._link.abandon()


class _Link:
    """One connection with one channel in confirm mode, and the deadline of the call under way.

    py-amqp's time-outs are for one read: each frame that comes, a heartbeat too, starts them anew.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._kombu = _kombu_connection(
            settings,
            frame_handler=self._frame_handler,
            on_blocked=lambda _reason: setattr(self, "has_alarm", True),
            on_unblocked=lambda: setattr(self, "has_alarm", False),
        )
        self._connection: Any = None  # py-amqp's, inside kombu's
        self.channel: Any = None
        self.deadline = float("inf")
        self.has_alarm = False
        self._published = 0  # number of the last message on this channel
        self._unconfirmed: set[int] = set()
        self._nacked = False
        self._returned: str | None = None

    def open(self) -> None:
        self.limit(2 * self._settings.socket_timeout_s)
        self._kombu.ensure_connection(errback=_give_up, reraise_as_library_errors=False)
        self._connection = self._kombu.connection
        self.channel = self.new_channel()
        self.channel.confirm_select()
        self.channel.events["basic_ack"].add(self._on_confirm)
        self.channel.events["basic_nack"].add(self._on_nack)
        self.channel.events["basic_return"].add(self._on_return)

    def new_channel(self) -> Any:
        channel = self._kombu.channel()
        channel.auto_decode = False  # by a charset that the message names
        return channel

    @property
    def version(self) -> str:
        """Return the server's version, as it says."""
        return str(self._connection.server_properties.get("version", ""))

    def limit(self, limit_s: float) -> None:
        """Let the calls that follow fail once this time is over."""
        self.deadline = time.monotonic() + limit_s

    def close(self) -> None:
        self._connection.close()

    def abandon(self) -> None:
        with contextlib.suppress(Exception):
            self._kombu.collect(socket_timeout=self._settings.socket_timeout_s)

    def beat(self) -> None:
        self._kombu.transport.heartbeat_check(self._connection)

    def wait(self, timeout_s: float, waker: Waker) -> tuple[bool, bool]:
        """Wait for something to read, or to be woken; return True for each that came."""
        if not self._connection.connected:
            raise amqp_errors.RecoverableConnectionError("the connection is closed")
        socket = self._connection.transport.sock
        if isinstance(socket, ssl.SSLSocket) and socket.pending():
            return False, True  # decrypted already: the kernel knows nothing of it
        return waker.wait(timeout_s, socket.fileno())

    def read(self, timeout_s: float = _BURST_WAIT_S) -> bool:
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

    def _frame_handler(self, connection: Any, callback: Any) -> Callable[[Any], bool]:
        """Handle frames as py-amqp does, but for parts of strangers that it cannot always read.

        Those are the properties of a message (a timestamp in milliseconds, a table nested without
        end), and its exchange and routing key. It would raise before the message is ours, again and
        again: the body alone says which post is meant.
        """
        handle = frame_handler(connection, callback)

        def on_frame(frame: Any) -> bool:
            if time.monotonic() > self.deadline:
                raise amqp_errors.RecoverableConnectionError("no answer in time")
            kind, channel, payload = frame
            if kind == _METHOD and struct.unpack_from(">HH", payload) == Basic.Deliver:
                consumer_tag_end = 5 + payload[4]
                # Delivery tag and flag follow, then two texts, which become empty ones.
                frame = kind, channel, payload[: consumer_tag_end + 9] + b"\0\0"
            elif kind == _HEADER and not _is_readable(payload):
                # The class and the size of the body, then no properties.
                frame = kind, channel, payload[:12] + b"\0\0"
            return bool(handle(frame))

        return on_frame

    def publish(self, messages: Iterable[PostMessage]) -> int:
        count = 0
        iterator = iter(messages)
        while window := list(islice(iterator, PUBLISH_WINDOW)):
            # Twice the time-out: a window is written to disk and to the queue's other members.
            self.limit(2 * self._settings.socket_timeout_s)
            for message in window:
                self._check_refusal()
                self._send(message)
            while self._unconfirmed:
                self._check_refusal()
                self.read(self._left_s)
            self._check_refusal()
            count += len(window)
        return count

    @property
    def _left_s(self) -> float:
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise amqp_errors.RecoverableConnectionError(
                "published messages were not confirmed in time"
            )
        return left_s

    def _check_refusal(self) -> None:
        where = redact(self._settings.url)
        if self.has_alarm:
            raise PublishRefused(f"broker {where}: {_ALARM}")
        if self._returned is not None:  # the queue is gone, and is declared when we connect again
            raise OperationalError(f"a published message was refused: {self._returned}")
        if self._nacked and not self._unconfirmed:
            self._nacked = False
            raise PublishRefused(f"broker {where}: queue {self._settings.queue}: {_FULL}")

    def _send(self, message: PostMessage) -> None:
        self._published += 1
        self._unconfirmed.add(self._published)
        self.channel.basic_publish(
            self.channel.prepare_message(
                message.encode(),
                priority=message.priority,
                content_type="application/json",
                content_encoding="utf-8",
                properties={"delivery_mode": 2},
            ),
            routing_key=self._settings.queue,
            mandatory=True,
            timeout=self._left_s,
        )

    def _on_confirm(self, tag: int, multiple: bool) -> None:
        if multiple:
            self._unconfirmed = {t for t in self._unconfirmed if t > tag}
        else:
            self._unconfirmed.discard(tag)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._nacked = True
        self._on_confirm(tag, multiple)

    def _on_return(self, error: Exception, *_rest: Any) -> None:
        self._returned = str(error)


def _is_readable(header: bytes) -> bool:
    try:
        Message().inbound_header(header)
    except Exception:  # noqa: BLE001 - whatever the bytes of strangers make the parser raise
        return False
    return True


def _kombu_connection(settings: BrokerSettings, **options: Any) -> Any:
    try:
        connection = kombu.Connection(
            settings.url,
            connect_timeout=settings.socket_timeout_s,
            heartbeat=settings.heartbeat_s,
            transport_options={
                # Without these a half-open connection hangs in a read or a write for ever.
                "read_timeout": settings.socket_timeout_s,
                "write_timeout": settings.socket_timeout_s,
                **options,
            },
        )
    except (TypeError, ValueError) as error:  # kombu takes the query for its own arguments
        raise ConfigError(
            f"broker.url: {redact(settings.url)!r} has a part that is not understood"
        ) from error
    if settings.url.startswith("amqps://"):
        # Verified unless the URL's ``ssl_...`` parameters, which kombu has put into `ssl`, ask
        # otherwise. Without a server_hostname py-amqp checks the name that the URL has.
        of_url = connection.ssl if isinstance(connection.ssl, dict) else {}
        connection.ssl = {"server_hostname": None, "cert_reqs": ssl.CERT_REQUIRED} | {
            name.removeprefix("ssl_"): value for name, value in of_url.items()
        }
    return connection


def _give_up(error: BaseException, _interval_s: float) -> NoReturn:
    # Kombu would sleep and try again; the owner does that, and says so in the log.
    raise error
