"""The broker thread: it alone touches the broker.

It drains with a short time-out (which drives the heartbeats too), and between two drains does
what the other threads asked for: acknowledge, requeue, publish. A lost connection is made anew
with back-off; the broker then delivers again what was not acknowledged.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import structlog

from common.errors import BrokerUnavailable
from king.broker.broker import Broker, Delivery
from king.health import Board
from king.messages import PostMessage
from king.retry import RECONNECT

DRAIN_S = 0.05
"""An acknowledgement waits at most this long for the connection."""
_DEPTH_EVERY_S = 1.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Ack:
    delivery: Delivery


@dataclass(frozen=True, slots=True)
class _Requeue:
    delivery: Delivery


@dataclass(frozen=True, slots=True)
class _Publish:
    messages: Sequence[PostMessage]
    confirmed: Callable[[], None]


_Command: TypeAlias = _Ack | _Requeue | _Publish


class Consumer:
    """Runs the broker; the other threads' side only appends to a deque.

    The deque is bounded by what it is made of: a delivery is acknowledged once, and the broker
    gives no more than ``broker.prefetch`` of them; one batch of retries is published at a time.
    """

    def __init__(
        self, broker: Broker, url: str, board: Board, on_delivery: Callable[[Delivery], None]
    ) -> None:
        self._broker = broker
        self._url = url
        self._board = board
        self._on_delivery = on_delivery
        self._commands: deque[_Command] = deque()
        self._consuming = False
        self._wanted = True
        self._lapsed = False
        self._stopping = threading.Event()
        self._depth_due = 0.0
        self._rng = random.Random()  # noqa: S311 - jitter

    # For the other threads -------------------------------------------------------------------

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge."""
        self._commands.extend(_Ack(delivery) for delivery in deliveries)

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        """Put messages back."""
        self._commands.extend(_Requeue(delivery) for delivery in deliveries)

    def publish(self, messages: Sequence[PostMessage], confirmed: Callable[[], None]) -> None:
        """Publish; ``confirmed`` is called on the broker thread once the broker has them all."""
        self._commands.append(_Publish(messages, confirmed))

    def stop_consuming(self) -> None:
        """Take no more messages."""
        self._wanted = False

    def subscribe_anew(self) -> None:
        """Drop the connection and subscribe again; for a subscription that the broker has lost.

        Only sets a flag: it is called in a signal handler, and only the thread touches the broker.
        """
        self._lapsed = True

    @property
    def quiet(self) -> bool:
        """No more messages come, and everything that was asked for is done."""
        return not self._commands and not self._consuming

    def stop(self) -> None:
        """Let `run` return; what the other threads asked for before is done first."""
        self._stopping.set()

    # The thread ------------------------------------------------------------------------------

    def run(self) -> None:
        """Keep the connection until `stop`."""
        failures = 0
        try:
            while not self._stopping.is_set():
                try:
                    self._connect(failures)
                    failures = 0
                    self._serve()
                except BrokerUnavailable as error:
                    failures += 1
                    self._wait(failures, error)
                    self._steer_away()
            if self._board.broker_up.is_set():
                self._obey()
        except BrokerUnavailable as error:  # it delivers again what it did not hear of
            log.warning("king.broker_unreachable", url=self._url, error=str(error))
        finally:
            self._broker.close()

    def _connect(self, failures: int) -> None:
        self._board.tick("broker")
        self._broker.connect()
        self._board.broker_up.set()
        if failures:
            log.info("king.broker_reached", url=self._url)

    def _serve(self) -> None:
        while not self._stopping.is_set():
            self._board.tick("broker")
            self._renounce()
            self._steer()
            self._obey()
            self._broker.drain(DRAIN_S)
            if time.monotonic() >= self._depth_due:
                depth = self._broker.depth()
                self._board.queue_depth = (depth, time.monotonic())
                self._depth_due = time.monotonic() + _DEPTH_EVERY_S

    def _steer(self) -> None:
        """Consume when posts can be worked on; until then they wait where others may take them."""
        able = self._board.ready.is_set() and self._board.store_up.is_set()
        if self._wanted and able and not self._consuming:
            self._broker.consume(self._deliver)
            self._consuming = True  # and stays so: after a lost connection the broker goes on
        self._steer_away()

    def _renounce(self) -> None:
        if self._lapsed:
            self._lapsed = self._consuming = False
            self._broker.cancel()
            raise BrokerUnavailable("a new connection was asked for")

    def _steer_away(self) -> None:
        if self._consuming and not self._wanted:
            self._broker.cancel()
            self._consuming = False

    def _deliver(self, delivery: Delivery) -> None:
        self._board.delivered()
        self._on_delivery(delivery)

    def _obey(self) -> None:
        while self._commands:
            command = self._commands[0]
            if isinstance(command, _Ack):
                self._broker.ack(command.delivery)
            elif isinstance(command, _Requeue):
                self._broker.requeue(command.delivery)
            else:
                for message in command.messages:
                    self._broker.publish(message)
                command.confirmed()
            # Removed only now: a lost connection must not lose what is to be published.
            self._commands.popleft()

    def _wait(self, failures: int, error: BrokerUnavailable) -> None:
        self._board.broker_up.clear()
        self._board.queue_depth = None
        delay_s = RECONNECT.limit_s(failures) * self._rng.uniform(0.5, 1.0)
        log.warning(
            "king.broker_unreachable",
            url=self._url,
            error=str(error),
            retry_in_s=round(delay_s, 2),
        )
        end = time.monotonic() + delay_s
        while not self._stopping.is_set() and time.monotonic() < end:
            self._board.tick("broker")
            self._stopping.wait(0.2)
