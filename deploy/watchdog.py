"""The watchdog: restarts a King that lives but makes no progress.

An ordinary program under supervisord. Every ``watchdog.interval_s`` it observes three things
(what supervisord says, what the King last wrote into its health file, whether that process is
there), judges them by the rules in `RULES`, and acts within a budget of restarts. A King that
died is supervisord's business, a King that loads its models has a limit of its own.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import structlog

from config.errors import ConfigError, RetryableError, TaggingError
from config.load import load_settings
from config.logs import configure_logs
from config.settings import Settings, WatchdogSettings
from deploy import embedded
from deploy.health import Snapshot, read_snapshot
from deploy.supervisor import Program, Supervisor, SupervisorClient

LOADING_PHASES = frozenset({"starting", "loading"})
_ALIVE_STATES = frozenset({"RUNNING", "STARTING"})
_CLOCK_SLACK_S = 1.0  # supervisord tells start times in whole seconds

log = structlog.get_logger()


@dataclass(frozen=True)
class Observation:
    """What the watchdog sees at one moment.

    Attributes:
        now: Unix time in seconds.
        snapshot: The King's health file; None when there is none or it cannot be read.
        snapshot_pid_exists: Whether the process that wrote it is still there.
    """

    now: float
    program: Program
    snapshot: Snapshot | None
    snapshot_pid_exists: bool

    @property
    def uptime_s(self) -> float:
        """Since supervisord started the King."""
        return self.now - self.program.started_at

    @property
    def current(self) -> Snapshot | None:
        """The snapshot, when it was written by the King that runs now."""
        if self.snapshot is None:
            return None
        written_since = self.program.started_at - _CLOCK_SLACK_S
        return self.snapshot if self.snapshot.updated_at >= written_since else None


@dataclass(frozen=True)
class Decision:
    """What to do, and why in one line."""

    action: Literal["none", "wait", "restart"]
    reason: str


Rule = Callable[[Observation, WatchdogSettings], "Decision | None"]


# Rules, in order; the first that has something to say decides. --------------------------------


def not_running(seen: Observation, settings: WatchdogSettings) -> Decision | None:
    """Supervisord starts, stops and gives up on programs by itself."""
    del settings
    if seen.program.state in _ALIVE_STATES:
        return None
    return Decision("none", f"the King is {seen.program.state}: supervisord's business")


def starting(seen: Observation, settings: WatchdogSettings) -> Decision | None:
    """No word yet, or models are loading: that has a limit of its own."""
    snapshot = seen.current
    if snapshot is not None and snapshot.phase not in LOADING_PHASES:
        return None
    what = "wrote no health file" if snapshot is None else f"is still {snapshot.phase}"
    if seen.uptime_s > settings.start_timeout_s:
        limit = f"start_timeout_s {settings.start_timeout_s:g}"
        return Decision("restart", f"the King {what} after {seen.uptime_s:.0f} s ({limit})")
    return Decision("wait", f"the King {what}")


def process_gone(seen: Observation, settings: WatchdogSettings) -> Decision | None:
    """The King has just died: supervisord starts it again."""
    del settings
    if seen.snapshot_pid_exists:
        return None
    return Decision("none", "the King's process is gone: supervisord's business")


def stale_tick(seen: Observation, settings: WatchdogSettings) -> Decision | None:
    """The King's loop writes its health file all the time; it has stopped."""
    if seen.current is None:
        return None
    age_s = seen.now - seen.current.updated_at
    if age_s <= settings.stall_s:
        return None
    limit = f"stall_s {settings.stall_s:g}"
    return Decision("restart", f"the King's health file is {age_s:.0f} s old ({limit})")


RULES: tuple[Rule, ...] = (not_running, starting, process_gone, stale_tick)
"""Later rules (work past its deadline, idle beside a backlog) join this list."""


def decide(seen: Observation, settings: WatchdogSettings) -> Decision:
    """Judge one observation; pure."""
    for rule in RULES:
        decision = rule(seen, settings)
        if decision is not None:
            return decision
    return Decision("none", "the King makes progress")


# The loop ------------------------------------------------------------------------------------


class Budget:
    """At most ``limit`` restarts within any ``window_s`` seconds."""

    def __init__(self, limit: int, window_s: float) -> None:
        self._limit = limit
        self._window_s = window_s
        self._spent: deque[float] = deque()

    def take(self, now: float) -> bool:
        """Spend one restart; False when none is left."""
        while self._spent and now - self._spent[0] > self._window_s:
            self._spent.popleft()
        if len(self._spent) >= self._limit:
            return False
        self._spent.append(now)
        return True


class Watchdog:
    """Observes, decides, acts; one log line for each new decision."""

    def __init__(self, settings: Settings, supervisor: Supervisor) -> None:
        self._settings = settings
        self._supervisor = supervisor
        self._budget = Budget(settings.watchdog.restarts, settings.watchdog.restart_window_s)
        self._said: tuple[str, str] | None = None
        self._stop = threading.Event()

    def stop(self) -> None:
        """Let `run` return; may be called from a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Watch until `stop`, or until supervisord itself is gone."""
        parent = os.getppid()
        while not self._stop.wait(self._settings.watchdog.interval_s):
            if os.getppid() != parent:
                log.warning("watchdog.supervisor_gone")
                return
            self.tick()

    def tick(self) -> Decision | None:
        """One round; None when supervisord could not be asked."""
        self._revive_services()
        try:
            seen = self._observe()
            decision = decide(seen, self._settings.watchdog)
            if decision.action == "restart":
                self._restart(seen, decision)
            else:
                self._say("info", "watchdog.decision", decision.action, decision.reason)
        except RetryableError as error:
            self._say("warning", "watchdog.supervisor_unreachable", "none", str(error))
            return None
        return decision

    def _observe(self) -> Observation:
        snapshot = read_snapshot(self._settings.king.health_file)
        return Observation(
            now=time.time(),
            program=self._supervisor.program(),
            snapshot=snapshot,
            snapshot_pid_exists=snapshot is not None and snapshot.process_exists,
        )

    def _restart(self, seen: Observation, decision: Decision) -> None:
        if not self._budget.take(seen.now):
            limits = self._settings.watchdog
            spent = f"{limits.restarts} restarts in {limits.restart_window_s:g} s are spent"
            self._say("error", "watchdog.budget_spent", "none", spent)
            return
        log.warning(
            "watchdog.decision", action="restart", reason=decision.reason, pid=seen.program.pid
        )
        self._said = None
        self._supervisor.kill()

    def _say(self, level: str, event: str, action: str, reason: str) -> None:
        """Log a decision when it is not the one of the last round."""
        if (event, reason) == self._said:
            return
        self._said = (event, reason)
        getattr(log, level)(event, action=action, reason=reason)

    def _revive_services(self) -> None:
        try:
            revived = embedded.revive(self._settings)
        except TaggingError as error:
            log.warning("watchdog.services_down", reason=str(error))
            return
        if revived:
            log.warning("watchdog.services_revived", services=list(revived))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the watchdog until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m deploy.watchdog", description=__doc__)
    parser.add_argument("--config", metavar="F", help="settings, YAML")
    parser.add_argument("--set", metavar="a.b=c", action="append", default=[], dest="overrides")
    options, _ = parser.parse_known_args(arguments)  # KING_ARGS may hold more than ours
    try:
        settings = load_settings(options.config, options.overrides)
    except ConfigError as error:
        sys.stderr.write(f"watchdog: {error}\n")
        return 2
    configure_logs(settings.log.format, settings.log.level)
    limits = settings.watchdog
    client = SupervisorClient(limits.supervisor_url, limits.program, limits.rpc_timeout_s)
    watchdog = Watchdog(settings, client)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: watchdog.stop())
    log.info("watchdog.started", stall_s=limits.stall_s, program=limits.program)
    watchdog.run()
    log.info("watchdog.stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
