"""The queue as the King sees it: `Broker`, and the `Delivery` that it hands over."""

from __future__ import annotations

import contextlib
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

    The token is the broker's name for it, unique within its generation (connection).
    """

    body: bytes
    token: int | str
    generation: int
    redelivered: bool = False


OnDelivery: TypeAlias = Callable[[Delivery], None]


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
        connected: False before `connect`, and once a call has seen that the connection is lost.
        generation: Number of the present connection: 1 after the first `connect`.
        shortcoming: What the server cannot do, in one line; None before `connect` and normally.
    """

    errors: ClassVar[ClientErrors] = ClientErrors()

    def __init__(self, settings: BrokerSettings) -> None:
        """Describe the broker; ConfigError when its URL cannot be used."""
        self.settings = settings
        self.connected = False
        self.generation = 0
        self.shortcoming: str | None = None
        self._on_delivery: OnDelivery | None = None
        self._in_hand: dict[int | str, Delivery] = {}  # in the order of arrival
        self._inbox: deque[Delivery] = deque()  # in hand, but not handed over yet
        self._loss: BrokerUnavailable | None = None
        self._is_probe = False
        self._window = 1  # messages that may be in hand

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
        self._window = 1
        self.generation += 1
        self.connected = True
        if self._on_delivery is not None:
            self.consume(self._on_delivery)

    def consume(self, on_delivery: OnDelivery) -> None:
        """Ask for messages, up to ``prefetch``; `drain` calls `on_delivery` on this thread."""
        with self._client_call():
            self._on_delivery = on_delivery

    @abstractmethod
    def drain(self, timeout_s: float) -> int:
        """Wait this long at most, and hand over the messages that came; return their number.

        Raises BrokerUnavailable when the connection is lost.
        """

    @abstractmethod
    def ack(self, delivery: Delivery) -> bool:
        """Remove the message for good; False if it is not in hand. A loss shows in `drain`."""

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

    def wake(self) -> None:  # noqa: B027 - not every client can be woken
        """End a `drain` that waits, or else the next one (any thread): there is something to do."""

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
        """Put back what is in hand and disconnect; never raises."""
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
        """Put back what is in hand, in its order, and tell the server."""

    @abstractmethod
    def _abandon(self) -> None:
        """Close the sockets without a handshake, since the server may be gone; never raises."""

    def _receive(
        self, raw: bytes, token: int | str, read: Callable[[bytes], tuple[bytes, bool]]
    ) -> None:
        """Note a message; `_hand_over` passes it on. ``read`` returns body and redelivered."""
        try:
            body, redelivered = read(raw)
        except Exception as error:  # noqa: BLE001 - bytes of strangers: this message's fault alone
            log.warning("king.message_unpacked", error=one_line(error, 200))
            body, redelivered = raw, True
        if not redelivered:
            self._window = self.settings.prefetch
        delivery = Delivery(body, token, self.generation, redelivered)
        self._in_hand[token] = delivery
        self._inbox.append(delivery)

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
