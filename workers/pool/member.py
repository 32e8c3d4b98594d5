"""One place in the pool: the worker that fills it now, and when it is to be replaced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.retry import backoff_s
from workers.pool.events import WorkerState, WorkerView
from workers.pool.launch import WorkerSpec
from workers.pool.process import WorkerProcess
from workers.pool.schedule import Load

_BACKOFF_FIRST_S = 0.1
_BACKOFF_MOST_S = 30.0


@dataclass(eq=False)
class Member:
    """A worker's place.

    Attributes:
        since: When the state was entered, `time.monotonic()`.
        restart_at: When to start it, in state ``waiting``.
        closing_at: When its pipe was found closed, while its process has not ended yet.
        strikes: Deaths in a row without a task answered in between; back-off grows with them.
        false_starts: Deaths in a row before `Ready`.
        info: What it said in `Ready`.
        kill_for: The overdue tasks that it was killed for.
    """

    spec: WorkerSpec
    state: WorkerState = "waiting"
    process: WorkerProcess | None = None
    since: float = 0.0
    restart_at: float = 0.0
    closing_at: float | None = None
    deaths: int = 0
    strikes: int = 0
    false_starts: int = 0
    info: Mapping[str, str] = field(default_factory=dict)
    kill_for: frozenset[int] | None = None

    @property
    def name(self) -> str:
        """The worker's name."""
        return self.spec.name

    def started(self, process: WorkerProcess, now: float) -> None:
        """A process was started."""
        self.process, self.state, self.since = process, "starting", now
        self.kill_for, self.closing_at = None, None

    def became_ready(self, info: Mapping[str, str], now: float) -> None:
        """It has loaded."""
        self.state, self.since, self.info = "ready", now, info
        self.false_starts = 0

    def died(self, now: float, *, answered: int, planned: bool) -> float:
        """It is gone; the seconds until it is started again.

        Args:
            now: `time.monotonic()`.
            answered: Tasks that it had answered.
            planned: It asked to be replaced, and held nothing.
        """
        delay_s = 0.0
        if not planned:
            self.deaths += 1
            self.false_starts += self.state == "starting"
            self.strikes = 1 if answered else self.strikes + 1
            delay_s = backoff_s(self.strikes, _BACKOFF_FIRST_S, _BACKOFF_MOST_S)
        self.state, self.since, self.restart_at = "waiting", now, now + delay_s
        return delay_s

    def view(self, load: Load | None) -> WorkerView:
        """As seen from outside."""
        return WorkerView(
            name=self.spec.name,
            role=self.spec.role,
            device=self.spec.device,
            extractors=self.spec.extractors,
            state=self.state,
            pid=self.process.pid if self.process else None,
            held=len(load.held) if load else 0,
            done=load.done if load else 0,
            deaths=self.deaths,
        )
