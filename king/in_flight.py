"""Which deliveries this King holds, by post; and the King's own name.

The broker thread adds, the store thread takes away: a message for a post that is in flight joins
it, and all messages of a post are acknowledged together once its outcome is written.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from king.broker.broker import Delivery


@dataclass(slots=True)
class _Held:
    since: float = field(default_factory=time.monotonic)
    deliveries: list[Delivery] = field(default_factory=list)


class Flights:
    """Posts in flight and their deliveries; safe between threads."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of posts in flight."""
        return len(self._held)

    def join(self, post_id: str, delivery: Delivery) -> bool:
        """Hold a delivery; False when its post was in flight already."""
        with self._lock:
            new = post_id not in self._held
            self._held.setdefault(post_id, _Held()).deliveries.append(delivery)
            return new

    def leave(self, post_id: str) -> Sequence[Delivery]:
        """The post is not in flight any more; gives all of its deliveries."""
        with self._lock:
            held = self._held.pop(post_id, None)
        return held.deliveries if held is not None else ()

    def touch(self, post_id: str) -> None:
        """The post is held on purpose, and no sign of a stall: its time begins anew."""
        with self._lock:
            if post_id in self._held:
                self._held[post_id].since = time.monotonic()

    @property
    def oldest_s(self) -> float:
        """How long the oldest post has been in flight."""
        with self._lock:
            since = [held.since for held in self._held.values()]
        return time.monotonic() - min(since) if since else 0.0


# The King's name -----------------------------------------------------------------------------


def own_name() -> str:
    """``host:namespace:pid:started``: unique to this process, and testable by its neighbours."""
    return f"{_host()}:{_namespace()}:{os.getpid()}:{_started(psutil.Process())}"


def is_dead(owner: str) -> bool:
    """Whether a King is certainly dead: it ran on this host, among these processes, and is gone.

    False when it cannot be known; then its lease decides.
    """
    parts = owner.split(":")
    if len(parts) != 4 or parts[:2] != [_host(), _namespace()] or not parts[2].isdigit():
        return False
    try:
        process = psutil.Process(int(parts[2]))
        return process.status() == psutil.STATUS_ZOMBIE or _started(process) != parts[3]
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _started(process: psutil.Process) -> str:
    return str(round(process.create_time() * 1000))


def _host() -> str:
    return socket.gethostname().replace(":", "-").replace(" ", "-")


def _namespace() -> str:
    """Process IDs mean the same only within one namespace: containers share hosts' names."""
    try:
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return "-"
