"""The broker thread: it alone touches the broker.

It drains with a short time-out (which drives heartbeats and leases too), and between two drains
does what the other threads asked for: acknowledge and requeue, then publish. When the connection is
lost it connects again, with back-off; the broker then delivers once more what was not acknowledged.
A broker that takes no messages now is no lost connection: only the publishing waits.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from common.errors import BrokerUnavailable, ConfigError, PublishRefused, one_line
from common.retry import reconnect_delay_s
from common.urls import redact
from king.broker.base import Broker, Delivery
from king.messages import PostMessage
from king.status import IDLE_TICK_S, Status

# The longest drain before the workers and the database are ready, whose events end no drain, and
# while a message that was refused waits to be published. At half, a King that starts polls its
# broker 40 times a second; at double, a start takes a tenth of a second longer.
_EARLY_DRAIN_S = 0.05

# Period of looks at how many messages wait. `--drain` and the watchdog work in seconds, so a
# shorter one only costs round trips; from two on, `--drain` would end later.
_DEPTH_EVERY_S = 1.0

# How often a wait for the next attempt to connect looks up, to end at `stop` and to tick. The
# watchdog's shortest limit is seconds, so twice or half of this changes nothing that is seen.
_BACK_OFF_TICK_S = 0.2

log = structlog.get_logger()


class BrokerThread:
    """The broker's thread; methods that other threads call only append to a deque or set a flag.

    ``broker.prefetch`` bounds the deque: each delivery is acknowledged once.
    """

    def __init__(
        self,
        broker: Broker,
        status: Status,
        on_deliveries: Callable[[Sequence[Delivery]], Sequence[Delivery]],
    ) -> None:
        """Describe the thread; `on_deliveries` returns those that are settled already."""
        self._broker = broker
        self._url = redact(broker.settings.url)
        self._status = status
        self._on_deliveries = on_deliveries
        self._received: list[Delivery] = []
        self._settlements: deque[Callable[[], object]] = deque()
        self._publishes: deque[Callable[[], object]] = deque()
        self._publish_due = 0.0
        self._refusals = 0  # in a row
        self._failures = 0  # of connections, since the last one that did some work
        self._consuming = False
        self._may_consume = True
        self._reconnect_asked = False
        self._stopping = threading.Event()
        self._depth_due = 0.0

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge messages (any thread)."""
        # A list, which is appended at once: a few at a time would bring new messages as scattered.
        self._settlements.extend([partial(self._broker.ack, delivery) for delivery in deliveries])
        if deliveries:
            self._broker.wake()

    def narrow(self, for_s: float) -> None:
        """Hold few messages for a while, since they have become slow (any thread)."""
        self._settlements.append(partial(self._broker.narrow, for_s))

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        """Put messages back on the queue (any thread)."""
        self._settlements.extend([partial(self._broker.requeue, each) for each in deliveries])
        self._broker.wake()

    def publish(self, messages: Sequence[PostMessage], on_confirmed: Callable[[], None]) -> None:
        """Publish messages (any thread); `on_confirmed` runs once the broker has them."""

        def publish() -> None:
            self._broker.publish(messages)
            on_confirmed()

        self._publishes.append(publish)
        self._broker.wake()

    def stop_consuming(self) -> None:
        """Take no more messages (any thread)."""
        self._may_consume = False
        self._broker.wake()

    def subscribe_anew(self) -> None:
        """Connect and subscribe again; no more than this, since a signal handler calls it."""
        self._reconnect_asked = True
        self._broker.wake()

    @property
    def quiet(self) -> bool:
        """Return True if no more messages come and every command is carried out that can be now."""
        waits = self._settlements or (self._publishes and not self._refusals)
        return not waits and not self._consuming

    def stop(self) -> None:
        """Let `run` return, after the commands queued so far."""
        self._stopping.set()
        self._broker.wake()

    def run(self) -> None:
        """Keep the connection and serve it until `stop`."""
        connected = False
        try:
            while not self._stopping.is_set():
                try:
                    self._status.tick("broker")
                    self._connect(connected)
                    connected = True
                    self._status.broker_up.set()
                    if self._broker.generation == 1 and self._broker.shortcoming:
                        log.warning("king.broker_shortcoming", reason=self._broker.shortcoming)
                    if self._failures:
                        log.info("king.broker_reached", url=self._url)
                    self._serve()
                except BrokerUnavailable as error:
                    self._failures += 1
                    self._back_off(error)
                    self._stop_consuming_if_asked()
            if self._status.broker_up.is_set():
                self._settle()
                while self._publish_next():
                    pass
        except BrokerUnavailable as error:  # what it was not told of is delivered again
            log.warning("king.broker_unreachable", url=self._url, error=str(error))
        finally:
            self._broker.close()

    def _connect(self, connected: bool) -> None:
        """Connect; later a refusal may pass, for example a limit of connections that is reached."""
        try:
            self._broker.connect()
        except ConfigError as error:
            if not connected:
                raise
            raise BrokerUnavailable(str(error)) from error

    def _serve(self) -> None:
        """Loop over one connection: the whole life of the thread while nothing breaks."""
        while not self._stopping.is_set():
            self._status.tick("broker")
            self._reconnect_if_asked()
            self._start_or_stop_consuming()
            settled = self._settle()
            self._broker.drain(
                IDLE_TICK_S if self._consuming and not self._publishes else _EARLY_DRAIN_S
            )
            self._hand_over()
            # After the drain, which sends the acknowledgements: they free what publishing needs.
            published = time.monotonic() >= self._publish_due and self._publish_next()
            # Not as soon as it connects: that may succeed each time, and nothing after it.
            if settled or published:
                self._failures = 0
            if time.monotonic() >= self._depth_due:
                self._status.queue_depth = (self._broker.depth(), time.monotonic())
                self._status.unacknowledged = self._broker.unacknowledged()
                self._depth_due = time.monotonic() + _DEPTH_EVERY_S

    def _reconnect_if_asked(self) -> None:
        if self._reconnect_asked:
            self._reconnect_asked = self._consuming = False
            self._broker.cancel()
            raise BrokerUnavailable("a new connection was requested")

    def _start_or_stop_consuming(self) -> None:
        # Until workers and database are ready, messages wait where another King can take them.
        # Once begun, consuming goes on: after a lost connection the broker subscribes again.
        ready = self._status.ready.is_set() and self._status.store_up.is_set()
        if self._may_consume and ready and not self._consuming:
            self._broker.consume(self._received.append)
            self._consuming = self._status.has_served = True
        self._stop_consuming_if_asked()

    def _stop_consuming_if_asked(self) -> None:
        if self._consuming and not self._may_consume:
            self._broker.cancel()
            self._consuming = False

    def _hand_over(self) -> None:
        """Hand over together what came together: the store asks the same for one as for all."""
        if not self._received:
            return
        self._status.delivered()
        settled = self._on_deliveries(self._received)
        self._received.clear()
        if settled:
            self._status.count("settled", len(settled))
            self.ack(settled)

    def _settle(self) -> bool:
        """Send the requested acks and requeues; return True if there were any."""
        worked = bool(self._settlements)
        while self._settlements:
            self._settlements.popleft()()
        return worked

    def _publish_next(self) -> bool:
        """Publish the oldest request; return True once it is on the queue."""
        if not self._publishes:
            return False
        try:
            self._publishes[0]()
        except PublishRefused as error:
            self._refusals += 1
            delay_s = reconnect_delay_s(self._refusals)
            self._publish_due = time.monotonic() + delay_s
            self._status.publish_refused = one_line(error)
            log.warning("king.publish_refused", error=str(error), retry_in_s=round(delay_s, 2))
            return False
        # Removed only now, so that a lost connection does not lose what is to be published.
        self._publishes.popleft()
        if self._refusals:
            log.info("king.publish_accepted", url=self._url)
        self._refusals = 0
        self._status.publish_refused = None
        return True

    def _back_off(self, error: BrokerUnavailable) -> None:
        self._status.broker_up.clear()
        self._status.queue_depth = self._status.unacknowledged = None
        delay_s = reconnect_delay_s(self._failures)
        log.warning(
            "king.broker_unreachable",
            url=self._url,
            error=str(error),
            retry_in_s=round(delay_s, 2),
        )
        end = time.monotonic() + delay_s
        while not self._stopping.is_set() and time.monotonic() < end:
            self._status.tick("broker")
            self._stopping.wait(_BACK_OFF_TICK_S)
