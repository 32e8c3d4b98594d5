"""Fixtures of the broker tests: one queue on one kind of broker, and a recording consumer."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from common.errors import BrokerUnavailable
from config.settings import BrokerSettings
from king.broker.base import Broker, Delivery
from king.broker.connect import open_broker
from tests.support.fakes.broker import MemoryBroker, MemoryQueue


@dataclass
class Rig:
    """Makes brokers on one queue.

    Attributes:
        settings: None for the tests' own broker in memory.
    """

    settings: BrokerSettings | None
    memory: MemoryQueue = field(default_factory=MemoryQueue)
    _open: list[Broker] = field(default_factory=list)

    def broker(self, *, prefetch: int | Literal["auto"] = 32) -> Broker:
        """A connected broker; closed at the end of the test."""
        broker: Broker
        if self.settings is None:
            broker = MemoryBroker(self.memory, prefetch)
        else:
            broker = open_broker(self.settings.model_copy(update={"prefetch": prefetch}))
        broker.connect()
        self._open.append(broker)
        return broker

    def close(self) -> None:
        for broker in self._open:
            broker.close()


def settings_for(url: str, queue: str, **changes: Any) -> BrokerSettings:
    """Settings with the short time-outs that the tests of lost connections need."""
    values: dict[str, Any] = {"heartbeat_s": 1, "socket_timeout_s": 3, "visibility_timeout_s": 2}
    return BrokerSettings(url=url, queue=queue, **{**values, **changes})


class Consumer:
    """Drains a broker and remembers what came; reconnects when it is told to."""

    def __init__(self, broker: Broker, *, ack: bool = False) -> None:
        self.broker = broker
        self.got: list[Delivery] = []
        self.losses = 0
        self.last_loss: BrokerUnavailable | None = None
        self._ack = ack
        broker.consume(self._take)

    def _take(self, delivery: Delivery) -> None:
        self.got.append(delivery)
        if self._ack:
            self.broker.ack(delivery)

    @property
    def bodies(self) -> list[bytes]:
        return [delivery.body for delivery in self.got]

    def until(self, done: Callable[[], bool], timeout_s: float = 60, *, heal: bool = False) -> None:
        """Drain until `done`; with `heal`, reconnect after a loss, as the King does.

        Raises:
            TimeoutError: It was not done in time.
        """
        end = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > end:
                raise TimeoutError(
                    f"not done within {timeout_s:g} s; got {len(self.got)}; {self.last_loss}"
                )
            try:
                if not self.broker.connected and heal:
                    self.broker.connect()
                self.broker.drain(0.1)
            except BrokerUnavailable as error:
                self.last_loss = error
                if not heal:
                    raise
                self.losses += 1
                time.sleep(0.1)

    def take(self, count: int, timeout_s: float = 60) -> list[Delivery]:
        """Drain until this many came in all."""
        self.until(lambda: len(self.got) >= count, timeout_s)
        return self.got

    def idle(self, seconds: float = 0.3) -> int:
        """Drain for a while; how many came."""
        before, end = len(self.got), time.monotonic() + seconds
        while time.monotonic() < end:
            self.broker.drain(0.05)
        return len(self.got) - before


def connected(settings: BrokerSettings) -> contextlib.closing[Broker]:
    broker = open_broker(settings)
    broker.connect()
    return contextlib.closing(broker)
