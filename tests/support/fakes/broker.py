"""A broker in memory: `MemoryBroker` behaves as `KombuBroker` does, without a server.

Brokers on one `MemoryQueue` compete for its messages. `lose_connection` is what a dead socket is.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from dataclasses import dataclass, field

from common.errors import BrokerUnavailable
from king.broker.broker import Delivery, OnDelivery
from king.messages import PostMessage


@dataclass(order=True)
class _Waiting:
    rank: tuple[int, int]
    body: bytes = field(compare=False)
    redelivered: bool = field(default=False, compare=False)


@dataclass
class MemoryQueue:
    """What a server holds: the waiting messages, highest priority first, then oldest first.

    Attributes:
        reachable: Set to False for a server that is down.
    """

    waiting: list[_Waiting] = field(default_factory=list)
    reachable: bool = True
    _order: itertools.count[int] = field(default_factory=itertools.count)

    def put(self, body: bytes, priority: int = 0) -> None:
        """Publish a raw body, as any client could."""
        self.waiting.append(_Waiting((-priority, next(self._order)), body))
        self.waiting.sort()

    def put_back(self, message: _Waiting) -> None:
        """Return a message to its place."""
        message.redelivered = True
        self.waiting.append(message)
        self.waiting.sort()


class MemoryBroker:
    """A `king.broker.broker.Broker` on a `MemoryQueue`."""

    def __init__(self, queue: MemoryQueue | None = None, prefetch: int = 32) -> None:
        self.queue = queue if queue is not None else MemoryQueue()
        self.published: list[PostMessage] = []
        self.acked: list[Delivery] = []
        self._prefetch = prefetch
        self._generation = 0
        self._connected = False
        self._on_delivery: OnDelivery | None = None
        self._held: dict[int | str, _Waiting] = {}
        self._tokens = itertools.count(1)

    @property
    def generation(self) -> int:
        """Number of the present connection."""
        return self._generation

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._connected

    def connect(self) -> None:
        """Connect, or connect anew."""
        self.lose_connection()
        if not self.queue.reachable:
            raise BrokerUnavailable("broker memory://: refused")
        self._connected = True
        self._generation += 1

    def consume(self, on_delivery: OnDelivery) -> None:
        """Ask for messages."""
        self._require()
        self._on_delivery = on_delivery

    def drain(self, timeout_s: float) -> int:
        """Hand over what is there, or else sleep."""
        self._require()
        batch: deque[Delivery] = deque()
        while self._on_delivery and self.queue.waiting and len(self._held) < self._prefetch:
            message = self.queue.waiting.pop(0)
            token = next(self._tokens)
            self._held[token] = message
            batch.append(Delivery(message.body, token, self._generation, message.redelivered))
        for delivery in batch:
            if self._on_delivery is not None:
                self._on_delivery(delivery)
        if not batch:
            time.sleep(min(timeout_s, 0.01))
        return len(batch)

    def ack(self, delivery: Delivery) -> bool:
        """Done with it."""
        if self._settle(delivery) is None:
            return False
        self.acked.append(delivery)
        return True

    def requeue(self, delivery: Delivery) -> bool:
        """Put it back."""
        message = self._settle(delivery)
        if message is not None:
            self.queue.put_back(message)
        return message is not None

    def touch(self) -> None:
        """Nothing expires here."""

    def publish(self, message: PostMessage) -> None:
        """Put a post on the queue."""
        self._require()
        self.published.append(message)
        self.queue.put(message.encode(), message.priority)

    def depth(self) -> int:
        """Messages that wait."""
        self._require()
        return len(self.queue.waiting)

    def cancel(self) -> None:
        """Ask for no more messages."""
        self._on_delivery = None

    def close(self) -> None:
        """Put back what is in hand and disconnect."""
        self.lose_connection()
        self._on_delivery = None

    def lose_connection(self) -> None:
        """The next `drain`, `publish` or `depth` raises; the server takes back what is held."""
        for message in self._held.values():
            self.queue.put_back(message)
        self._held.clear()
        self._connected = False

    def _settle(self, delivery: Delivery) -> _Waiting | None:
        if not self._connected or delivery.generation != self._generation:
            return None
        return self._held.pop(delivery.token, None)

    def _require(self) -> None:
        if not self.queue.reachable:
            self.lose_connection()
        if not self._connected:
            raise BrokerUnavailable("broker memory://: not connected")
