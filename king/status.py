"""The status of the King, which its threads write and the main thread puts into the health file.

The file is one JSON object, replaced as a whole once a second. It shows progress rather than life:
the tick of every thread, the latest delivery and completion, the oldest post in flight. On SIGUSR2
the King also writes the stack of each thread, into a file next to it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import structlog

from common.files import write_whole
from common.processes import process_identity
from king.jobs import (
    Bundle,
    Dead,
    Rejected,
    Retry,
    Settled,
    Superseded,
    Tagged,
    Unreadable,
)
from workers.protocol import PoolRefused

Phase: TypeAlias = Literal[
    "starting", "loading", "serving", "draining", "stopped", "store_down", "broker_down"
]
COUNTERS: dict[str, bool] = {
    "tagged": True,
    "superseded": True,
    "failed": True,
    "retried": True,
    "dead": False,
    "settled": False,
    "cache_lookups": False,
    "cache_hits": False,
    "gpu_decoded": False,
    "gpu_refused": False,
}
"""Counter -> whether it counts ends of attempts. A new counter is a line here, and where it counts.

``superseded`` counts tags that were not written, since a later bundle has tagged the post; ``dead``
dead letters, ``settled`` messages for which there was nothing to do; ``cache_lookups`` media files
that were looked up, ``cache_hits`` those that need not be decoded; ``gpu_decoded`` videos that a
GPU decoded, ``gpu_refused`` those that it was to decode, and the CPU did.
"""

End: TypeAlias = Tagged | Superseded | Retry | Dead | Rejected | Settled | Unreadable
"""The end of an attempt or of a message."""
_COUNTED: Mapping[type, tuple[str, ...]] = {
    Tagged: ("tagged",),
    Superseded: ("superseded",),
    Retry: ("retried",),
    Dead: ("failed", "dead"),
    Rejected: ("failed", "dead"),
    Settled: ("settled",),
    Unreadable: ("dead",),
}

OUTCOMES: Mapping[type, str] = {
    Tagged: "tagged",
    Superseded: "superseded",
    Retry: "retried",
    Dead: "failed",
}
"""Names of the ends of attempts in metrics and traces."""

# The rate is that of the last minute: half of it jumps with every batch, double hides a stall.
RATE_WINDOW_S = 60
_RATE_STEP_S = 0.5  # at double, the rate of a King that has just begun moves in steps

# The longest wait of each thread of an idle King: half the period of the health file, so that each
# file shows a new tick. At double, two in a row may show the same; at half, a King wakes twice as
# often.
IDLE_TICK_S = 0.5

DUMP_SIGNAL = signal.SIGUSR2
# The file is set aside at this size: some hundred dumps, and still quick to open.
_LIMIT_BYTES = 4 * 2**20

log = structlog.get_logger()


class Status:
    """State that several threads write and the main thread shows."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        on_end: Sequence[Callable[[End, float | None], object]] = (),
    ) -> None:
        """Start the status of a King; ``clock`` measures durations, dates are for people.

        Each of ``on_end`` is called once for each end, with what `ended` got.
        """
        self._clock = clock
        self._on_end = on_end
        self._identity = process_identity(os.getpid())
        self.started_at = time.time()
        self._began = self._clock()
        self.ready = threading.Event()
        """Set when the workers are loaded: posts may be taken."""
        self.store_up = threading.Event()
        self.broker_up = threading.Event()
        self.has_served = False
        """Posts were taken: workers, broker and database had accepted the configuration."""
        self.draining = False
        self.stopped = False
        self.bundle: Bundle | None = None
        self.bundle_refused: str | None = None
        """Why the bundle that is in ``fusion.bundle`` now is not served."""
        self.shadow: Bundle | None = None
        self.shadow_refused: str | None = None
        self.refused: PoolRefused | None = None
        self.publish_refused: str | None = None
        """The reason for which the broker takes no messages now."""
        self.workers: Sequence[Mapping[str, Any]] = ()
        self.queue_depth: tuple[int, float] | None = None
        """Number of waiting messages, and when (`time.monotonic`) the broker was asked."""
        self.unacknowledged: int | None = None
        """Number of messages in the hands of any consumer; None where the broker does not tell."""
        self.open_jobs: tuple[int, float] | None = None
        """Number of jobs that are not dead letters, and when (`time.monotonic`) it was counted."""
        self._seen_store = False
        self._seen_broker = False
        self.ticks: dict[str, float] = {}
        """Thread -> Unix time of its latest tick."""
        self._last: dict[str, float] = {}
        self._lock = threading.Lock()
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._recent: deque[tuple[float, int]] = deque()

    def tick(self, thread: str) -> None:
        """Note that a thread's loop has come round."""
        self.ticks[thread] = time.time()

    def delivered(self) -> None:
        """Note that a message arrived."""
        self._last["delivery"] = time.time()

    def ended(self, end: End, total_s: float | None = None) -> None:
        """Count an end, whose message came ``total_s`` ago."""
        for name in _COUNTED[type(end)]:
            self.count(name)
        for tell in self._on_end:
            tell(end, total_s)

    def count(self, name: str, number: int = 1) -> None:
        """Count posts under a name of `COUNTERS`."""
        now = self._clock()
        with self._lock:
            self._counters[name] += number
            if name == "tagged":
                self._count_recent(now, number)
        if COUNTERS[name]:
            self._last["done"] = time.time()

    def _count_recent(self, now: float, number: int) -> None:
        """Count into parts of a second: one entry for each post would be summed every second."""
        if self._recent and now - self._recent[-1][0] < _RATE_STEP_S:
            since, before = self._recent.pop()
            self._recent.append((since, before + number))
        else:
            self._recent.append((now, number))

    def counter(self, name: str) -> int:
        """Return one counter."""
        with self._lock:
            return self._counters[name]

    @property
    def phase(self) -> Phase:
        """Return the state of the King, the most telling first."""
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
        return self._clock() - self._began

    def snapshot(self, *, in_flight: int, oldest_in_flight_s: float) -> dict[str, Any]:
        """Return the content of the health file."""
        with self._lock:
            counters = dict(self._counters)
            rate = self._rate()
        return {
            "pid": os.getpid(),
            "process": self._identity,
            "started_at": self.started_at,
            "updated_at": time.time(),
            "phase": self.phase,
            "ticks": dict(self.ticks),
            "last_delivery_at": self._last.get("delivery"),
            "last_done_at": self._last.get("done"),
            "in_flight": in_flight,
            "oldest_in_flight_s": round(oldest_in_flight_s, 3),
            "counters": counters,
            "posts_tagged": counters["tagged"],
            "posts_per_s": rate,
            "bundle": _named(self.bundle),
            "bundle_refused": self.bundle_refused,
            "shadow": _named(self.shadow),
            "shadow_refused": self.shadow_refused,
            "workers": [dict(worker) for worker in self.workers],
            "queue_depth": self.queue_depth[0] if self.queue_depth else None,
            "unacknowledged": self.unacknowledged,
            "open_jobs": self.open_jobs[0] if self.open_jobs else None,
            "publish_refused": self.publish_refused,
        }

    def _rate(self) -> float:
        """Return the tagged posts per second of the last minute (at first: since the start)."""
        while self._recent and self._recent[0][0] <= self._clock() - RATE_WINDOW_S:
            self._recent.popleft()
        window_s = min(max(self._age_s, 1.0), float(RATE_WINDOW_S))
        return round(sum(number for _, number in self._recent) / window_s, 3)


def _named(bundle: Bundle | None) -> dict[str, str] | None:
    return {"name": bundle[0], "version": bundle[1]} if bundle is not None else None


def write_health(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the health file as a whole; OSError when the folder cannot be written."""
    write_whole(path, json.dumps(content, ensure_ascii=False), sync=False, shared=True)


def read_health(path: Path) -> dict[str, Any] | None:
    """Return the latest content; None when the file is missing, half written, or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {**content, "pid": int(content["pid"]), "updated_at": float(content["updated_at"])}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def stack_file(health_file: Path) -> Path:
    """Return the file for the stacks, next to the health file."""
    return health_file.with_suffix(".stacks")


@contextlib.contextmanager
def dumped_on_signal(health_file: Path) -> Iterator[None]:
    """Write the Python stack of every thread on `DUMP_SIGNAL`, as long as the block runs.

    The handler is C code that needs neither the interpreter lock nor the main thread, so it shows
    where a King hangs. When the file cannot be opened, that is only logged.
    """
    path = stack_file(health_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _LIMIT_BYTES:
            path.replace(path.with_name(path.name + ".1"))
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        log.warning("king.stack_file_failed", file=str(path), error=error.strerror)
        yield
        return
    with file:
        faulthandler.register(DUMP_SIGNAL, file=file, all_threads=True)
        try:
            yield
        finally:
            # Ignored and not default: a late signal must not end a King that ends by itself.
            faulthandler.unregister(DUMP_SIGNAL)
            signal.signal(DUMP_SIGNAL, signal.SIG_IGN)
