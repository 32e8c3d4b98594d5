"""The queue as the King sees it: `Broker`, and the `Delivery` that it hands over."""

from __future__ import annotations

import contextlib
import os
import select
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias
from urllib.parse import unquote, urlsplit

import structlog

from common.errors import BrokerUnavailable, ConfigError, TaggingError, one_line
from common.urls import redact
from config.settings import BrokerSettings
from king.messages import PostMessage

# Messages published before the broker's answer is waited for. One by one, each would cost a round
# trip; half of this is hardly slower, and double only makes more that may have to be sent again.
PUBLISH_WINDOW = 500

# With `prefetch: auto`, the most messages in hand. IDs that need no work pass at 2,000 a second and
# more from half of this on; double only gives a crash more messages to deliver again.
_MOST_IN_HAND = 512

# With `prefetch: auto`, messages in hand for each media file that can be in work. Texts overtake
# videos that wait in hand, not those that wait in the broker: at half, a text behind 100 videos
# waits for most of them; at double, another King has to do without as many.
_IN_HAND_PER_MEDIA = 4

# Time whose acknowledged messages may be in hand at once. It is what a King that dies, or whose
# posts become slow, holds back from the others; at half, batches of cheap posts are half as large.
_PACE_S = 0.5

log = structlog.get_logger("king.broker")


@dataclass(frozen=True)
class ClientErrors:
    """The exceptions of one client library.

    Attributes:
        types: All that may come out of it; others are bugs of ours and pass unchanged.
        is_refusal: True for errors that mean wrong settings, while a connection is set up.
        hints: Text for a type of error, with ``{}`` for its own text.
    """

    types: tuple[type[BaseException], ...] = (OSError, EOFError)
    is_refusal: Callable[[BaseException], bool] = lambda _error: False
    hints: Mapping[type[BaseException], str] = field(default_factory=dict)

    @contextlib.contextmanager
    def mapped(self, url: str, *, setup: bool = False) -> Iterator[None]:
        """Map the library's errors of the block to ConfigError or BrokerUnavailable.

        With ``setup`` the block connects or declares, so that a refusal means wrong settings.
        """
        try:
            yield
        except TaggingError:
            raise
        except self.types as error:
            text = f"broker {redact(url)}: {self._reason(error, url)}"
            if setup and self.is_refusal(error):
                raise ConfigError(text) from error
            raise BrokerUnavailable(text) from error

    def _reason(self, error: BaseException, url: str) -> str:
        """Return one line that a person understands, without credentials."""
        is_bare = isinstance(error, TimeoutError) and not str(error)
        text = "timed out" if is_bare else one_line(error)
        for kind, hint in self.hints.items():
            if isinstance(error, kind):
                text = hint.format(text)
        for secret in _secrets(url):
            text = text.replace(secret, "***")
        return text


def _secrets(url: str) -> set[str]:
    try:
        password = urlsplit(url).password
    except ValueError:
        return set()
    # Short passwords are words like "guest", which the broker's answer uses for the user's name.
    return {p for p in (password, unquote(password or "")) if p and len(p) > 5}


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message in hand; it belongs to this process until `ack` or `requeue`.

    The token is the broker's name for it, unique within its generation (connection). The
    traceparent is that of the message's headers (W3C), which traces go on from.
    """

    body: bytes
    token: int | str
    generation: int
    redelivered: bool = False
    traceparent: str | None = None


OnDelivery: TypeAlias = Callable[[Delivery], None]


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Bounds of the messages in hand: ``least`` always, up to ``most`` while they pass quickly.

    At most ``with_media`` of their posts have media and are worked on; the others wait in hand.
    """

    with_media: int
    least: int
    most: int

    @classmethod
    def of(cls, settings: BrokerSettings, media_in_flight: int = 32) -> Prefetch:
        """Return the bounds that the settings name, or by ``auto`` those of the host."""
        if settings.prefetch != "auto":
            return cls(settings.prefetch, settings.prefetch, settings.prefetch)
        least = media_in_flight * _IN_HAND_PER_MEDIA
        return cls(media_in_flight, least, max(least, _MOST_IN_HAND))

    def after(self, width: int, acknowledged: int) -> int:
        """Return the number that follows on ``width``, by the acknowledgements of half a second.

        It is ``least``, doubled while they are as many, and stays until they are twice as many or
        fewer than half: RabbitMQ needs another consumer for each change.
        """
        if width // 2 <= acknowledged < 2 * width:
            return width
        doublings = max(1, acknowledged // self.least).bit_length() - 1
        return min(self.least << doublings, self.most)


class Waker:
    """Ends another thread's wait for a socket; also for handlers of signals."""

    def __init__(self) -> None:
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # By the collector and not by `close`: a late `wake` must not write to another's descriptor.
        weakref.finalize(self, os.close, self._event)

    def wake(self) -> None:
        """End the current wait, or the next one."""
        with contextlib.suppress(BlockingIOError):  # it was called 2**64 times
            os.eventfd_write(self._event, 1)

    def wait(self, timeout_s: float, socket: int | None = None) -> tuple[bool, bool]:
        """Wait for a wake or the socket; return True for each: was woken, can be read."""
        poller = select.poll()
        poller.register(self._event, select.POLLIN)
        if socket is not None:
            poller.register(socket, select.POLLIN)
        ready = dict(poller.poll(max(0.0, timeout_s) * 1000))
        if woken := self._event in ready:
            os.eventfd_read(self._event)
        return woken, socket in ready


class Broker(ABC):
    """A queue of posts, used by one thread.

    The owner calls `connect`, then `consume`, then `drain` in a loop, and everything that keeps
    the connection alive happens inside `drain`: heartbeats on RabbitMQ, renewed leases on Redis.
    When the connection is lost, `drain`, `publish` and `depth` raise `BrokerUnavailable`; the
    owner waits, with back-off, and calls `connect` again. That starts a new generation: what was
    not acknowledged is delivered once more, and an acknowledgement of an earlier generation does
    nothing. Every call ends within the time-outs of the settings.

    A message that was delivered before may be what ended the process or the connection. So on each
    connection they come one at a time, until one comes that is new: what is innocent passes alone,
    and only what ends its consumer again is counted again::

        broker = open_broker(settings)
        broker.connect()
        broker.consume(deliveries.append)
        while True:
            broker.drain(timeout_s=0.05)
            while deliveries:
                broker.ack(deliveries.popleft())

    A broker for another URL scheme is one subclass in a file of its own and one line in
    `king.broker.connect.BROKERS`. This class keeps the books: the generation, the deliveries in
    hand, and those not handed over yet. A subclass talks to its client library inside
    `_client_call`, which maps that library's `errors` to ours and drops a lost connection; it
    notes each message with `_receive`, ends `drain` with `_hand_over`, and begins `ack` and
    `requeue` with `_settle`. `tests/integration/king/test_broker_contract.py` holds for all.

    Attributes:
        settings: Of the broker.
        prefetch: Bounds of the messages in hand.
        connected: False before `connect`, and once a call has seen that the connection is lost.
        generation: Number of the present connection: 1 after the first `connect`.
        shortcoming: What the server cannot do, in one line; None before `connect` and normally.
    """

    errors: ClassVar[ClientErrors] = ClientErrors()

    def __init__(self, settings: BrokerSettings, prefetch: Prefetch | None = None) -> None:
        """Describe the broker; ConfigError when its URL cannot be used."""
        self.settings = settings
        self.prefetch = prefetch or Prefetch.of(settings)
        self.connected = False
        self.generation = 0
        self.shortcoming: str | None = None
        self._on_delivery: OnDelivery | None = None
        self._in_hand: dict[int | str, Delivery] = {}  # in the order of arrival
        self._inbox: deque[Delivery] = deque()  # in hand, but not handed over yet
        self._loss: BrokerUnavailable | None = None
        self._is_probe = False
        self._waker = Waker()
        self._acked: list[int | str] = []  # to be told to the server with others
        self._is_proven = False  # a message came that did not end a consumer before
        self._width = self.prefetch.least
        self._settled_count = 0  # since the width was looked at
        self._pace_due = self._narrow_until = 0.0

    def connect(self, *, declare: bool = True) -> None:
        """Connect, or connect again; consuming goes on if it had begun.

        With ``declare`` a missing queue is created and an existing one checked; without, the
        connection is a probe, on which every refusal means wrong settings (ConfigError).
        """
        self._drop()
        self._is_probe = not declare
        try:
            with self.errors.mapped(self.settings.url, setup=True):
                self._open(declare)
        except BaseException:
            self._abandon()
            raise
        self._in_hand.clear()
        self._inbox.clear()
        self._loss = None
        self._is_proven = False
        self._width = self.prefetch.least
        self.generation += 1
        self.connected = True
        if self._on_delivery is not None:
            self.consume(self._on_delivery)

    def consume(self, on_delivery: OnDelivery) -> None:
        """Ask for as many messages as may be in hand; `drain` hands them to `on_delivery`."""
        with self._client_call():
            self._on_delivery = on_delivery

    @abstractmethod
    def drain(self, timeout_s: float) -> int:
        """Wait this long at most, and hand over the messages that came; return their number.

        Raises BrokerUnavailable when the connection is lost.
        """

    def ack(self, delivery: Delivery) -> bool:
        """Remove the message for good; False if it is not in hand.

        The server is told by the next `drain`, of many at once; a loss shows there.
        """
        if not self._settle(delivery):
            return False
        self._acked.append(delivery.token)
        self._settled_count += 1
        return True

    @abstractmethod
    def requeue(self, delivery: Delivery) -> bool:
        """Put the message back, to be served next; False if it is not in hand."""

    @abstractmethod
    def publish(self, messages: Iterable[PostMessage]) -> int:
        """Put posts on the queue; return their number once the broker has them all.

        Raises BrokerUnavailable, and PublishRefused when the broker takes no messages now: that is
        no lost connection. Some may have arrived; publishing again is harmless.
        """

    @abstractmethod
    def depth(self, queue: str | None = None) -> int:
        """Return the number of messages that wait in the queue, or in another; 0 without a queue.

        Raises BrokerUnavailable, and ConfigError when the broker refuses the request of a probe.
        """

    def wake(self) -> None:
        """Wake a waiting `drain`, or the next one (any thread): there is something to do."""
        self._waker.wake()

    def narrow(self, for_s: float) -> None:
        """Hold no more messages than ``prefetch.least`` for a while: they have become slow."""
        self._width = self.prefetch.least
        self._narrow_until = time.monotonic() + for_s

    def unacknowledged(self) -> int | None:
        """Return the number of messages in somebody's hands; None where the broker does not say.

        Raises as `depth`.
        """
        return None

    def cancel(self) -> None:
        """Ask for no more messages; those handed over can still be acknowledged."""
        self._on_delivery = None
        while self._inbox:
            self.requeue(self._inbox.pop())

    def close(self) -> None:
        """Put back the deliveries in hand and disconnect; never raises."""
        self._on_delivery = None
        if self.connected:
            try:
                with self._client_call():
                    self._leave()
            except BrokerUnavailable as error:
                log.warning("king.broker_close_failed", error=str(error))
        self._drop()
        self._in_hand.clear()
        self._inbox.clear()

    @abstractmethod
    def _open(self, declare: bool) -> None:
        """Open the connection, and put back what an earlier one left in ``_in_hand``."""

    @abstractmethod
    def _leave(self) -> None:
        """Put back the deliveries in hand, in order, and tell the server."""

    @abstractmethod
    def _abandon(self) -> None:
        """Close the sockets without a handshake, since the server may be gone; never raises."""

    def _receive(
        self, raw: bytes, token: int | str, read: Callable[[bytes], tuple[bytes, bool, object]]
    ) -> None:
        """Note a message; `_hand_over` passes it on.

        ``read`` returns its body, True if it was delivered before, and its headers.
        """
        headers: object = None
        try:
            body, redelivered, headers = read(raw)
        except Exception as error:  # noqa: BLE001 - bytes of strangers: this message's fault alone
            log.warning("king.message_unpacked", error=one_line(error, 200))
            body, redelivered = raw, True
        self._is_proven = self._is_proven or not redelivered
        traceparent = headers.get("traceparent") if isinstance(headers, dict) else None
        delivery = Delivery(
            body,
            token,
            self.generation,
            redelivered,
            traceparent if isinstance(traceparent, str) else None,
        )
        self._in_hand[token] = delivery
        self._inbox.append(delivery)

    @property
    def _window(self) -> int:
        """Return the number of messages that may be in hand."""
        return self._width if self._is_proven else 1

    def _keep_pace(self) -> None:
        """Widen or narrow the window by what was acknowledged lately."""
        now = time.monotonic()
        if now < self._pace_due:
            return
        count, self._settled_count = self._settled_count, 0
        late_s, self._pace_due = now - self._pace_due, now + _PACE_S
        if now >= self._narrow_until:
            acknowledged = round(count * _PACE_S / (_PACE_S + late_s))
            self._width = self.prefetch.after(self._width, acknowledged)

    def _hand_over(self) -> int:
        """Call ``on_delivery`` for each message noted; return their number."""
        count = 0
        while self._inbox and self._on_delivery is not None:
            self._on_delivery(self._inbox.popleft())
            count += 1
        return count

    def _settle(self, delivery: Delivery) -> bool:
        """Cross a delivery off; return False if it is of another generation, or crossed off."""
        is_current = self.connected and delivery.generation == self.generation
        return is_current and self._in_hand.pop(delivery.token, None) is not None

    @contextlib.contextmanager
    def _client_call(self) -> Iterator[None]:
        """Map the client library's errors inside the block; drop a connection that is lost."""
        if not self.connected:
            where = redact(self.settings.url)
            raise self._loss or BrokerUnavailable(f"broker {where}: not connected")
        try:
            with self.errors.mapped(self.settings.url, setup=self._is_probe):
                yield
        except BrokerUnavailable as error:
            self._loss = error
            self._drop()
            raise

    def _succeeds(self, action: Callable[[], object]) -> bool:
        """Make a client call; False if the connection is lost, which the next `drain` reports."""
        try:
            with self._client_call():
                action()
        except BrokerUnavailable:
            return False
        return True

    def _drop(self) -> None:
        self.connected = False
        self._abandon()


def require_host(url: str) -> None:
    """Refuse a URL that names several brokers or no valid one (ConfigError)."""
    if ";" in url:
        raise ConfigError("broker.url: name one broker; put a cluster behind one name")
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"broker.url: {redact(url)!r} names no host, port or database")
