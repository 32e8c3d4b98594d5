"""The queue of URLs by host, with a limit on downloads at once and back-off; no I/O.

Hosts take turns, so that one with many URLs does not hold up the others. A host that asks to be
left alone is left alone, with all its URLs. One that cannot be reached time and again is given up
for this run: each of its URLs would cost a time-out.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from corpus.download.values import Ask, UrlResult

# Times in a row that a host is not reached before it is given up for this run. Half would give up
# a host that restarts; double costs its last URLs another dozen time-outs.
DEAD_AFTER = 12


@dataclass(slots=True)
class Try:
    """A URL on its way, and how many tries have failed."""

    ask: Ask
    host: str
    failed: int = 0


@dataclass(slots=True)
class _Host:
    """A host with URLs that wait or are being downloaded, or one that is left alone."""

    waiting: deque[Try] = field(default_factory=deque)
    busy: int = 0
    resume_at: float = 0.0  # 0: it may be asked
    queued: bool = False  # it stands in the turns


class Hosts:
    """The URLs that wait, by host; `size` counts those that wait for another try too."""

    def __init__(self, per_host: int) -> None:
        self._per_host = per_host
        self._hosts: dict[str, _Host] = {}
        self._turns: deque[str] = deque()  # hosts that may have something to give
        # URLs that come back, and names of hosts whose rest ends, by their time.
        self._timed: list[tuple[float, int, Try | str]] = []
        self._count = 0
        self._unreached: dict[str, int] = {}
        self._dead: dict[str, UrlResult] = {}
        self.size = 0

    def add(self, item: Try) -> None:
        """Queue a URL for its host's next turn."""
        self.size += 1
        host = self._hosts.setdefault(item.host, _Host())
        host.waiting.append(item)
        self._queue(item.host, host)

    def again(self, item: Try, at: float) -> None:
        """Queue a URL for another try, not before `at`."""
        self.size += 1
        self._push(at, item)

    def take(self, now: float) -> Try | None:
        """Return the next URL that may be downloaded now."""
        self._wake(now)
        while self._turns:
            name = self._turns.popleft()
            host = self._hosts.get(name)
            if host is None:
                continue
            host.queued = False
            # Back in turn when its rest is over, or when one of its downloads ends.
            if host.resume_at or not host.waiting or host.busy >= self._per_host:
                continue
            item = host.waiting.popleft()
            host.busy += 1
            self.size -= 1
            self._queue(name, host)
            return item
        return None

    def done(self, name: str) -> None:
        """Note that one of a host's downloads has ended."""
        host = self._hosts[name]
        host.busy -= 1
        self._queue(name, host)
        self._forget_idle(name, host)

    def pause(self, name: str, until: float) -> None:
        """Leave a host alone until then."""
        host = self._hosts[name]
        if until > host.resume_at:
            host.resume_at = until
            self._push(until, name)

    def reached(self, name: str) -> None:
        """Note that a host has answered, whatever it said."""
        self._unreached.pop(name, None)

    def unreached(self, name: str, result: UrlResult) -> None:
        """Note that a host could not be reached; `result` is for its URLs when it is given up."""
        self._unreached[name] = self._unreached.get(name, 0) + 1
        if self._unreached[name] >= DEAD_AFTER:
            self.give_up(name, result)

    def give_up(self, name: str, result: UrlResult) -> None:
        """Ask this host for nothing more in this run."""
        self._dead[name] = result

    def verdict(self, name: str) -> UrlResult | None:
        """Return what every URL of a host that was given up gets; None for any other."""
        return self._dead.get(name)

    def drop(self, name: str) -> list[Try]:
        """Take the URLs of a host that was given up out of the queue."""
        host = self._hosts.get(name) or _Host()
        dropped, timed = list(host.waiting), []
        host.waiting.clear()
        for entry in self._timed:
            item = entry[2]
            if isinstance(item, Try) and item.host == name:
                dropped.append(item)
            else:
                timed.append(entry)
        self._timed = timed
        heapq.heapify(self._timed)
        self.size -= len(dropped)
        return dropped

    def next_at(self) -> float | None:
        """Return when the next wait ends; None when nothing waits for a time."""
        return self._timed[0][0] if self._timed else None

    def _push(self, at: float, item: Try | str) -> None:
        self._count += 1  # keeps the order of equal times, and items from being compared
        heapq.heappush(self._timed, (at, self._count, item))

    def _wake(self, now: float) -> None:
        while self._timed and self._timed[0][0] <= now:
            item = heapq.heappop(self._timed)[2]
            if isinstance(item, Try):
                self.size -= 1
                self.add(item)
                continue
            host = self._hosts.get(item)
            if host is not None and host.resume_at <= now:
                host.resume_at = 0.0
                self._queue(item, host)
                self._forget_idle(item, host)

    def _queue(self, name: str, host: _Host) -> None:
        if host.waiting and not host.queued and not host.resume_at:
            host.queued = True
            self._turns.append(name)

    def _forget_idle(self, name: str, host: _Host) -> None:
        if not (host.waiting or host.busy or host.resume_at):
            del self._hosts[name]


def host_of(source: str) -> str:
    """Return the host and port that a URL leads to; empty for what is no URL."""
    try:
        return urlsplit(source).netloc.rpartition("@")[2].lower()
    except ValueError:
        return ""
