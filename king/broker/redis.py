"""Redis: lists, and leases on what is taken; both are looked after in `RedisLink.wait`."""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from config.settings import BrokerSettings
from king.broker.link import CONFIRM_WINDOW, Link
from king.broker.redis_transport import QueueTransport, unacked_keys
from king.messages import PostMessage

POLL_S = 0.05


class RedisLink(Link):
    """One connection to Redis."""

    def __init__(self, settings: BrokerSettings, *, declare: bool = True) -> None:
        super().__init__(
            settings,
            QueueTransport,
            {
                "socket_timeout": settings.socket_timeout_s,
                "socket_connect_timeout": settings.socket_timeout_s,
                "socket_keepalive": True,
                "health_check_interval": settings.heartbeat_s,
                "visibility_timeout": settings.visibility_timeout_s,
                "client_name": "insighttag",
                **unacked_keys(settings.queue),
            },
        )
        self._interval_s = settings.visibility_timeout_s / 4
        self._next_renewal = time.monotonic() + self._interval_s
        self._next_collection = 0.0
        if declare:
            try:
                self.depth(self.queue)  # the key may be of another type
            except BaseException:
                self.abandon()
                raise

    def publish(self, messages: Iterable[PostMessage]) -> int:
        """Push onto the queue's lists, a window in one round trip."""
        count = 0
        iterator = iter(messages)
        while window := list(islice(iterator, CONFIRM_WINDOW)):
            for message in window:
                self._send(message)
            self._channel.flush()
            count += len(window)
        return count

    def wait(self, timeout_s: float, held: Sequence[Any]) -> None:
        """Take what comes; renew leases; give back what others let expire."""
        end = time.monotonic() + timeout_s
        self._channel.flush()  # the acknowledgements since the last time
        while True:
            now = time.monotonic()
            if now >= self._next_renewal:
                self.renew(held)
            if now >= self._next_collection:
                self._channel.give_back_expired()
                self._next_collection = now + min(5.0, self._interval_s)
            with contextlib.suppress(TimeoutError):
                self._raw.drain_events(self._raw)
                return
            left = end - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, POLL_S))

    def renew(self, held: Sequence[Any]) -> None:
        """Hold the messages for another visibility time-out."""
        self._channel.renew(held)
        self._next_renewal = time.monotonic() + self._interval_s

    def recover(self, tokens: Sequence[Any]) -> None:
        """Put back at once what an earlier connection of this process held."""
        self._channel.give_back(reversed(tokens))

    def depth(self, queue: str) -> int:
        """Ready messages of all priorities."""
        return int(self._channel._size(queue))

    def close(self, held: Sequence[Any]) -> None:
        """Put back what is held, in its order, and close."""
        try:
            self.cancel()
            self._channel.flush()
            self._channel.give_back(reversed(held))
        finally:
            self.abandon()

    def _tls(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True, **asked}
