"""From health files to durations: how long each thing has stood still.

Durations are taken on the watchdog's own monotonic clock, from the moment at which a value was
last seen to change: neither a clock that is set nor a machine that sleeps looks like a stall.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from config.settings import Settings
from deploy.health import Snapshot
from deploy.supervisor import Program
from deploy.watchdog_probes import Probes
from deploy.watchdog_rules import DRAINING_PHASES, LOADING_PHASES, Observation

_CLOCK_SLACK_S = 1.0  # supervisord tells start times in whole seconds
_THREADS = ("main", "broker", "store", "dispatch")


class Progress:
    """What has been seen of the King that runs now."""

    def __init__(
        self, settings: Settings, probes: Probes, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._probes = probes
        self._clock = clock
        self._identity: tuple[int, float] | None = None
        self.forget()

    def forget(self) -> None:
        """Begin anew: every duration counts from now."""
        self._since = self._clock()
        self._changed: dict[str, tuple[object, float]] = {}
        self._starved_since: float | None = None
        self._backlog: int | None = None
        self._probe_due = 0.0

    def observe(self, program: Program, snapshot: Snapshot | None) -> Observation:
        """Add what the supervisor and the health file say now; asks the probes where needed."""
        identity = (program.pid, program.started_at)
        if identity != self._identity:
            self._identity = identity
            self.forget()
        now = self._clock()
        seen_s = now - self._since
        if snapshot is None or not _written_by(program, snapshot):
            return Observation(program, seen_s)
        phase = snapshot.phase
        phase_s = self._held_s("phase", phase, now)
        ages = self._tick_ages(snapshot, now)
        errors = self._excuses(phase, ages)
        backlog_error = self._look_at_queue(snapshot, now)
        oldest_s = _number(snapshot.content.get("oldest_in_flight_s"))
        starved_s = 0.0 if self._starved_since is None else self._clock() - self._starved_since
        return Observation(
            program=program,
            seen_s=seen_s,
            phase=phase,
            phase_s=phase_s,
            tick_ages=ages,
            # What was in flight during an outage has had no chance to end.
            overdue_s=min(oldest_s, phase_s) if phase == "serving" else 0.0,
            starved_s=starved_s,
            backlog=self._backlog,
            broker_error=errors.get("broker") or backlog_error,
            store_error=errors.get("store"),
            file_error=errors.get("main"),
        )

    @property
    def _blink_s(self) -> float:
        """A King that is away from its broker for less than this may just be connecting anew."""
        return self._settings.watchdog.stall_s / 2

    def _held_s(self, name: str, value: object, now: float) -> float:
        """For how long a value has been what it is."""
        if name not in self._changed or self._changed[name][0] != value:
            self._changed[name] = (value, now)
        return now - self._changed[name][1]

    def _tick_ages(self, snapshot: Snapshot, now: float) -> dict[str, float]:
        ticks = snapshot.content.get("ticks")
        # The file as a whole is written by the main thread.
        said: dict[str, Any] = {"main": snapshot.updated_at}
        if isinstance(ticks, dict) and ticks:
            said = {thread: ticks.get(thread) for thread in _THREADS}
        return {thread: self._held_s(f"{thread} tick", tick, now) for thread, tick in said.items()}

    def _excuses(self, phase: str, ages: dict[str, float]) -> dict[str, str]:
        """Ask what a thread that stands still may be waiting for; its age starts anew if it is."""
        if phase in DRAINING_PHASES:
            return {}
        limit_s = self._settings.watchdog.stall_s
        if ages["main"] > limit_s:  # no outage stops this one
            error = self._probes.health_file()
            return {"main": error} if error is not None else {}
        excuses: dict[str, str] = {}
        for thread, ask in (("broker", self._ask_broker), ("store", self._probes.store)):
            if phase in LOADING_PHASES or ages.get(thread, 0.0) <= limit_s:
                continue
            error = ask()
            if error is not None:
                excuses[thread] = error
                ages[thread] = 0.0
                name = f"{thread} tick"
                self._changed[name] = (self._changed[name][0], self._clock())
        return excuses

    def _ask_broker(self) -> str | None:
        return self._probes.broker().error

    def _look_at_queue(self, snapshot: Snapshot, now: float) -> str | None:
        """While the King is idle, ask now and then whether messages wait for it."""
        content = snapshot.content
        work = (content.get("last_delivery_at"), str(content.get("counters")))
        moved = self._held_s("work", work, now) == 0.0
        away = snapshot.phase != "serving"
        if away and not moved and self._held_s("phase", snapshot.phase, now) < self._blink_s:
            return None  # it connects anew, perhaps because it was nudged: that cures nothing yet
        if moved or away or content.get("in_flight"):
            self._starved_since = self._backlog = None
            return None
        if now < self._probe_due:
            return None
        limits = self._settings.watchdog
        depth = self._probes.broker()
        now = self._clock()
        self._probe_due = now + max(limits.interval_s, limits.stall_s / 12)
        self._backlog = depth.messages
        if not depth.messages:
            self._starved_since = None
        elif self._starved_since is None:
            self._starved_since = now
        return depth.error


def _written_by(program: Program, snapshot: Snapshot) -> bool:
    """Whether the King that runs now wrote it; in a container, pids come back after a restart."""
    late_enough = snapshot.updated_at >= program.started_at - _CLOCK_SLACK_S
    return snapshot.pid == program.pid and late_enough


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
