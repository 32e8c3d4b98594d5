"""What the King tells about itself: a status that its threads write on, and the health file.

The file is one JSON object, replaced as a whole once a second. Progress is what it shows, not
life: the tick of every thread, the latest delivery and completion, the oldest post in flight.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from common.files import write_whole
from king.jobs import Bundle

Phase: TypeAlias = Literal[
    "starting", "loading", "serving", "draining", "stopped", "store_down", "broker_down"
]
CounterName: TypeAlias = Literal["tagged", "failed", "retried", "dead", "settled"]

RATE_WINDOW_S = 60


class Status:
    """State that several threads write and the main thread shows."""

    def __init__(self) -> None:
        self.started_at = time.time()
        self.ready = threading.Event()
        """The workers are loaded: posts may be taken."""
        self.store_up = threading.Event()
        self.broker_up = threading.Event()
        self.draining = False
        self.stopped = False
        self.bundle: Bundle | None = None
        self.refused: str | None = None
        self.workers: Sequence[Mapping[str, Any]] = ()
        self.queue_depth: tuple[int, float] | None = None
        """Messages that wait in the queue, and when (`time.monotonic`) that was asked."""
        self.open_jobs: tuple[int, float] | None = None
        """Jobs that are no dead letters, and when (`time.monotonic`) that was asked."""
        self._seen_store = False
        self._seen_broker = False
        self._ticks: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter()
        self._per_second: deque[tuple[int, int]] = deque()

    def tick(self, thread: str) -> None:
        """A thread's loop has come round."""
        self._ticks[thread] = time.time()

    def delivered(self) -> None:
        """A message arrived."""
        self._last["delivery"] = time.time()

    def count(self, name: CounterName, number: int = 1) -> None:
        """Count posts; `tagged`, `failed` and `retried` are the ends of attempts."""
        now = time.time()
        with self._lock:
            self._counters[name] += number
            if name == "tagged":
                self._remember(int(now), number)
        if name in ("tagged", "failed", "retried"):
            self._last["done"] = now

    def counter(self, name: CounterName) -> int:
        """One counter."""
        with self._lock:
            return self._counters[name]

    @property
    def phase(self) -> Phase:
        """What the King is doing, the most telling first."""
        self._seen_store = self._seen_store or self.store_up.is_set()
        self._seen_broker = self._seen_broker or self.broker_up.is_set()
        if self.draining:
            return "stopped" if self.stopped else "draining"
        if not self.store_up.is_set() and (self._seen_store or self._age_s > 1):
            return "store_down"
        if not self.broker_up.is_set() and (self._seen_broker or self._age_s > 1):
            return "broker_down"
        if not (self._seen_store and self._seen_broker):
            return "starting"
        return "serving" if self.ready.is_set() else "loading"

    @property
    def _age_s(self) -> float:
        return time.time() - self.started_at

    def snapshot(self, *, in_flight: int, oldest_in_flight_s: float) -> dict[str, Any]:
        """The content of the health file."""
        with self._lock:
            counters = {name: self._counters[name] for name in ("tagged", "failed", "retried")}
            counters |= {name: self._counters[name] for name in ("dead", "settled")}
            rate = self._rate()
        return {
            "pid": os.getpid(),
            "started_at": self.started_at,
            "updated_at": time.time(),
            "phase": self.phase,
            "ticks": dict(self._ticks),
            "last_delivery_at": self._last.get("delivery"),
            "last_done_at": self._last.get("done"),
            "in_flight": in_flight,
            "oldest_in_flight_s": round(oldest_in_flight_s, 3),
            "counters": counters,
            "posts_tagged": counters["tagged"],
            "posts_per_s": rate,
            "bundle": {"name": self.bundle[0], "version": self.bundle[1]} if self.bundle else None,
            "workers": [dict(worker) for worker in self.workers],
            "queue_depth": self.queue_depth[0] if self.queue_depth else None,
            "open_jobs": self.open_jobs[0] if self.open_jobs else None,
        }

    def _remember(self, second: int, number: int) -> None:
        if self._per_second and self._per_second[-1][0] == second:
            number += self._per_second.pop()[1]
        self._per_second.append((second, number))
        self._forget(second)

    def _forget(self, second: int) -> None:
        while self._per_second and self._per_second[0][0] <= second - RATE_WINDOW_S:
            self._per_second.popleft()

    def _rate(self) -> float:
        """Tagged posts per second over the last minute, or since the start when that is less."""
        self._forget(int(time.time()))
        window_s = min(max(self._age_s, 1.0), float(RATE_WINDOW_S))
        return round(sum(number for _, number in self._per_second) / window_s, 3)


def write_health(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the health file as a whole.

    Raises:
        OSError: The folder cannot be written.
    """
    write_whole(path, json.dumps(content, ensure_ascii=False), sync=False, shared=True)


def read_health(path: Path) -> dict[str, Any] | None:
    """Return the latest content; None when the file is missing, half written, or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {**content, "pid": int(content["pid"]), "updated_at": float(content["updated_at"])}
    except (OSError, ValueError, TypeError, KeyError):
        return None
