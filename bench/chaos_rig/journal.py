"""The daemon's log, read while it is written: who was tagged when, who came back when."""

from __future__ import annotations

import datetime
import json
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Journal(threading.Thread):
    """A follower of a log file of JSON lines; other lines are counted and left out."""

    def __init__(self, file: Path) -> None:
        super().__init__(name="journal", daemon=True)
        self._file = file
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._tagged: dict[str, list[float]] = defaultdict(list)
        self._ends: set[str] = set()
        self._ready: dict[str, list[float]] = defaultdict(list)
        self.counts: Counter[str] = Counter()
        self.tracebacks = 0

    @property
    def ended(self) -> int:
        """Return posts that the log says are tagged or dead."""
        with self._lock:
            return len(self._ends)

    @property
    def tagged_twice(self) -> set[str]:
        """Return posts of which the log says more than once that they were tagged."""
        with self._lock:
            return {post_id for post_id, ats in self._tagged.items() if len(ats) > 1}

    def first_tagged(self, post_ids: Iterable[str]) -> float | None:
        """Return when the first of these posts was tagged; Unix time, None while none is."""
        with self._lock:
            ats = [self._tagged[post_id][0] for post_id in post_ids if post_id in self._tagged]
        return min(ats, default=None)

    def ready_since(self, worker: str, after: float) -> float | None:
        """Return when that worker was ready for the first time after a moment."""
        with self._lock:
            return min((at for at in self._ready[worker] if at >= after), default=None)

    def stop(self) -> None:
        """Read what is there, and end."""
        self._stopping.set()
        self.join(10)

    def run(self) -> None:
        """Follow the file."""
        while not self._file.exists():
            if self._stopping.wait(0.05):
                return
        rest = ""
        with self._file.open(encoding="utf-8", errors="replace") as log:
            while True:
                stopping = self._stopping.is_set()
                text = log.read()
                if text:
                    *lines, rest = (rest + text).split("\n")
                    with self._lock:
                        for line in lines:
                            self._take(line)
                elif stopping:
                    return
                else:
                    self._stopping.wait(0.02)

    def _take(self, line: str) -> None:
        try:
            content: dict[str, Any] = json.loads(line)
            event = str(content["event"])
            at = datetime.datetime.fromisoformat(content["timestamp"].replace("Z", "+00:00"))
        except (ValueError, TypeError, KeyError):
            self.counts["(no JSON)"] += bool(line.strip())
            self.tracebacks += line.startswith("Traceback")
            return
        self.counts[event] += 1
        self.tracebacks += "exception" in content
        seconds = at.timestamp()
        if event == "king.post_tagged":
            self._ends.add(content["post_id"])
            self._tagged[content["post_id"]].append(seconds)
        elif event == "king.post_failed":
            self._ends.add(content["post_id"])
        elif event == "king.message_settled" and content["reason"] != "waiting":
            # Tagged by a King that was killed before it could say so.
            self._ends.add(content["post_id"])
        elif event == "workers.ready":
            self._ready[content["worker"]].append(seconds)
