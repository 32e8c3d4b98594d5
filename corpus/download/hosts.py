"""The queue of URLs by host, with a limit on downloads at once and back-off; no I/O.

Hosts take turns, so that one with many URLs does not hold up the others. A host that asks to be
left alone is left alone, with all its URLs. One that cannot be reached time and again is given up
for this run: each of its URLs would cost a time-out.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque

from corpus.download.values import Ask, UrlResult

# Times in a row that a host is not reached before it is given up for this run. Half would give up
# a host that restarts; double costs its last URLs another dozen time-outs.
DEAD_AFTER = 12


class Hosts:
    """The URLs that wait, by host; `size` counts them."""

    def __init__(self, per_host: int) -> None:
        self._per_host = per_host
        # URLs of each host in the order of the times from which on they may be downloaded. The
        # number keeps the order of equal times, and URLs from being compared.
        self._waiting: dict[str, list[tuple[float, int, Ask]]] = {}
        self._turns: deque[str] = deque()  # the hosts of `_waiting`
        self._busy: Counter[str] = Counter()
        self._resume_at: dict[str, float] = {}
        self._unreached: Counter[str] = Counter()
        self._dead: dict[str, UrlResult] = {}
        self._count = 0
        self.size = 0

    def add(self, ask: Ask, at: float) -> None:
        """Queue a URL, not to be downloaded before a time."""
        self.size += 1
        self._count += 1
        if ask.host not in self._waiting:
            self._waiting[ask.host] = []
            self._turns.append(ask.host)
        heapq.heappush(self._waiting[ask.host], (at, self._count, ask))

    def take(self, now: float) -> Ask | None:
        """Return the next URL that may be downloaded now."""
        for _ in range(len(self._turns)):
            name = self._turns.popleft()
            self._turns.append(name)
            waiting = self._waiting[name]
            at = max(waiting[0][0], self._resume_at.get(name, 0.0))
            if at > now or self._busy[name] >= self._per_host:
                continue
            ask = heapq.heappop(waiting)[2]
            self._busy[name] += 1
            self.size -= 1
            if not waiting:
                self._forget(name)
            return ask
        return None

    def done(self, name: str) -> None:
        """Note that one of a host's downloads has ended."""
        self._busy[name] -= 1

    def pause(self, name: str, until: float) -> None:
        """Leave a host alone until then."""
        self._resume_at[name] = max(until, self._resume_at.get(name, 0.0))

    def reached(self, name: str) -> None:
        """Note that a host has answered, whatever it said."""
        del self._unreached[name]

    def unreached(self, name: str, result: UrlResult) -> None:
        """Note that a host could not be reached; `result` is for its URLs when it is given up."""
        self._unreached[name] += 1
        if self._unreached[name] >= DEAD_AFTER:
            self.give_up(name, result)

    def give_up(self, name: str, result: UrlResult) -> None:
        """Ask this host for nothing more in this run."""
        self._dead[name] = result

    def verdict(self, name: str) -> UrlResult | None:
        """Return what every URL of a host that was given up gets; None for any other."""
        return self._dead.get(name)

    def drop(self, name: str) -> list[Ask]:
        """Take the URLs of a host that was given up out of the queue."""
        dropped = [ask for _, _, ask in self._waiting.get(name, ())]
        if dropped:
            self._forget(name)
        self.size -= len(dropped)
        return dropped

    def _forget(self, name: str) -> None:
        del self._waiting[name]
        self._turns.remove(name)
