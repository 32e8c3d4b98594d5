"""A broker in memory: `MemoryBroker` passes the contract of `Broker` without a server.

Brokers on one `MemoryQueue` compete for its messages. `lose_connection` acts like a dead socket.
"""

import contextlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from common.errors import BrokerUnavailable, PublishRefused
from config.settings import BrokerSettings
from king.broker.base import Broker, Delivery
from king.messages import PostMessage


@dataclass(order=True)
class _Waiting:
    rank: tuple[int, int]
    body: bytes = field(compare=False)
    redelivered: bool = field(default=False, compare=False)
    headers: object = field(default=None, compare=False)


@dataclass
class MemoryQueue:
    """A server's memory: the waiting messages, highest priority first, then oldest first.

    Attributes:
        reachable: Set to False for a server that is down.
        full: Set to True for a server that takes no messages.
    """

    waiting: list[_Waiting] = field(default_factory=list)
    reachable: bool = True
    full: bool = False
    _order: "itertools.count[int]" = field(default_factory=itertools.count)

    def put(self, body: bytes, priority: int = 0, headers: object = None) -> None:
        """Publish a raw body, as any client could."""
        rank = (-priority, next(self._order))
        self.waiting.append(_Waiting(rank, body, headers=headers))
        self.waiting.sort()

    def put_back(self, message: _Waiting) -> None:
        """Return a message to its old position."""
        message.redelivered = True
        self.waiting.append(message)
        self.waiting.sort()


class MemoryBroker(Broker):
    """A broker on a `MemoryQueue`.

    Attributes:
        published: Every message that was published here.
        acked: Every delivery that was acknowledged here.
        unacked: The messages in hand.
    """

    def __init__(
        self, queue: MemoryQueue | None = None, prefetch: int | Literal["auto"] = 32
    ) -> None:
        super().__init__(BrokerSettings(url="memory://", prefetch=prefetch))
        self.queue = queue if queue is not None else MemoryQueue()
        self.published: list[PostMessage] = []
        self.acked: list[Delivery] = []
        self.unacked: dict[int | str, _Waiting] = {}
        self._tokens = itertools.count(1)

    def _open(self, declare: bool) -> None:
        if not self.queue.reachable:
            raise BrokerUnavailable("broker memory://: refused")

    def drain(self, timeout_s: float) -> int:
        """Hand over the waiting messages, or else sleep."""
        with self._server_call():
            self._acked.clear()
            self._keep_pace()
            while (
                self._on_delivery is not None
                and self.queue.waiting
                and len(self._in_hand) < self._window
            ):
                message = self.queue.waiting.pop(0)
                token = next(self._tokens)
                self.unacked[token] = message
                self._receive(message.body, token, partial(_as_is, message))
        if not self._inbox:
            self._waker.wait(min(timeout_s, 0.01))
        return self._hand_over()

    def ack(self, delivery: Delivery) -> bool:
        if not super().ack(delivery):
            return False
        del self.unacked[delivery.token]
        self.acked.append(delivery)
        return True

    def requeue(self, delivery: Delivery) -> bool:
        if not self._settle(delivery):
            return False
        self.queue.put_back(self.unacked.pop(delivery.token))
        return True

    def publish(self, messages: Iterable[PostMessage]) -> int:
        with self._server_call():
            if self.queue.full:
                raise PublishRefused("broker memory://: the queue is full")
            batch = list(messages)
            for message in batch:
                self.published.append(message)
                self.queue.put(message.encode(), message.priority)
        return len(batch)

    def depth(self, queue: str | None = None) -> int:
        with self._server_call():
            return len(self.queue.waiting)

    def lose_connection(self) -> None:
        """Let the next `drain`, `publish` or `depth` raise; the server takes back all messages."""
        self._drop()

    def _leave(self) -> None:
        """Nothing to say goodbye to."""

    def _abandon(self) -> None:
        for message in self.unacked.values():
            self.queue.put_back(message)
        self.unacked.clear()

    def _server_call(self) -> contextlib.AbstractContextManager[None]:
        if not self.queue.reachable:
            self._drop()
        return self._client_call()


def _as_is(message: _Waiting, body: bytes) -> tuple[bytes, bool, object]:
    return body, message.redelivered, message.headers
