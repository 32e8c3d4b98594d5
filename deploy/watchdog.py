"""The watchdog: restarts a King that lives but makes no progress.

An ordinary program under supervisord (or systemd). Every ``watchdog.interval_s`` it looks at what
the supervisor says and at the King's health file, measures how long each thing has stood still
(`deploy.watchdog_progress`), judges that (`deploy.watchdog_rules`), and acts:

    nudge     the King is asked to connect to the broker anew (SIGUSR1), after half of ``stall_s``
    restart   its stacks are written to a file, it is killed, and the supervisor starts it again

A King that stalls again and again is restarted ever more slowly, and within a budget. One that
died is the supervisor's business.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence

import structlog

from common.cli import OneLineParser
from common.errors import ConfigError, RetryableError, TaggingError
from common.logs import configure_logs
from config.load import load_settings
from config.settings import Settings, WatchdogSettings
from deploy import embedded
from deploy.health import read_snapshot
from deploy.supervisor import Supervisor, SupervisorClient
from deploy.watchdog_dump import catches, write_dump
from deploy.watchdog_probes import RealProbes
from deploy.watchdog_progress import Progress
from deploy.watchdog_rules import Decision, Observation, decide
from deploy.watchdog_systemd import SystemdClient
from king.king import SUBSCRIBE_SIGNAL

_STEP_S = 0.1
_MAX_BACKOFF_S = 900.0

log = structlog.get_logger()


class Budget:
    """How often a King may be restarted: so many within a window, and ever more slowly.

    The second restart in a row may follow at once; later ones wait twice as long each time.
    """

    def __init__(self, settings: WatchdogSettings) -> None:
        self._settings = settings
        self._spent: deque[float] = deque()
        self._in_a_row = 0

    def refusal(self, now: float) -> str | None:
        """Why there may be no restart now; None when there may."""
        limits = self._settings
        while self._spent and now - self._spent[0] > limits.restart_window_s:
            self._spent.popleft()
        if len(self._spent) >= limits.restarts:
            return f"{limits.restarts} restarts in {limits.restart_window_s:g} s are spent"
        if self._in_a_row >= 2 and self._spent:
            pause_s = min(limits.stall_s * 2 ** (self._in_a_row - 2), _MAX_BACKOFF_S)
            left_s = self._spent[-1] + pause_s - now
            if left_s > 0:
                return f"{self._in_a_row} restarts in a row did not help: waiting {pause_s:g} s"
        return None

    def spend(self, now: float) -> None:
        """Count a restart."""
        self._spent.append(now)
        self._in_a_row += 1

    def recovered(self) -> None:
        """The King has been well for some time: its next stall is a new story."""
        self._in_a_row = 0


class Watchdog:
    """Observes, decides, acts; one log line for each new decision."""

    def __init__(
        self, settings: Settings, supervisor: Supervisor, progress: Progress | None = None
    ) -> None:
        self._settings = settings
        self._limits = settings.watchdog
        self._supervisor = supervisor
        self._progress = progress or Progress(settings, RealProbes(settings))
        self._budget = Budget(settings.watchdog)
        self._said: tuple[str, str, str] | None = None
        self._nudged = False
        self._stopping = False

    def stop(self) -> None:
        """Let `run` return; may be called from a signal handler."""
        self._stopping = True  # not an Event: a signal handler could not set it safely

    def run(self) -> None:
        """Watch until `stop`, or until the supervisor itself is gone."""
        parent = os.getppid()
        while not self._sleep():
            if os.getppid() != parent:
                log.warning("watchdog.supervisor_gone")
                return
            self.tick()

    def _sleep(self) -> bool:
        """Wait for the next round; gives whether to stop."""
        end = time.monotonic() + self._limits.interval_s
        while not self._stopping and (left_s := end - time.monotonic()) > 0:
            time.sleep(min(left_s, _STEP_S))
        late_s = time.monotonic() - end
        if late_s > self._limits.stall_s / 2:
            # The whole machine stood still, and the King with it.
            log.warning("watchdog.slept", seconds=round(late_s, 1))
            self._progress.forget()
        return self._stopping

    def tick(self) -> Decision | None:
        """One round; None when the supervisor could not be asked."""
        self._revive_services()
        try:
            snapshot = read_snapshot(self._settings.king.health_file)
            seen = self._progress.observe(self._supervisor.program(), snapshot)
            decision = decide(seen, self._settings)
            self._act(seen, decision)
        except RetryableError as error:
            self._say("warning", "watchdog.supervisor_unreachable", "none", str(error))
            return None
        return decision

    def _act(self, seen: Observation, decision: Decision) -> None:
        if decision.action == "restart":
            self._restart(seen, decision)
            return
        if decision.action == "nudge":
            self._nudge(seen, decision)
            return
        if not seen.starved_s:
            self._nudged = False
        if seen.phase == "serving" and seen.seen_s > 2 * self._limits.stall_s:
            self._budget.recovered()
        if decision.action == "alarm":
            log.error("watchdog.decision", action="none", reason=decision.reason)
            return
        self._say("info", "watchdog.decision", decision.action, decision.reason)

    def _nudge(self, seen: Observation, decision: Decision) -> None:
        """Ask the King to connect and subscribe anew, once for each time it starves."""
        pid = seen.program.pid
        if self._nudged or not catches(pid, SUBSCRIBE_SIGNAL):
            return
        self._nudged = True
        self._say("warning", "watchdog.decision", "nudge", decision.reason)
        try:
            os.kill(pid, SUBSCRIBE_SIGNAL)
        except OSError as error:
            log.warning("watchdog.nudge_failed", pid=pid, reason=error.strerror)

    def _restart(self, seen: Observation, decision: Decision) -> None:
        now = time.monotonic()
        refusal = self._budget.refusal(now)
        if refusal is not None:  # loud: a person must look
            log.error("watchdog.restart_withheld", reason=decision.reason, because=refusal)
            return
        pid = seen.program.pid
        dump = write_dump(
            pid, self._settings.king.health_file, decision.reason, self._limits.dump_s
        )
        if self._supervisor.program().pid != pid:
            self._say("info", "watchdog.decision", "none", "the King has ended by itself")
            return
        stacks = str(dump) if dump is not None else None
        log.warning(
            "watchdog.decision", action="restart", reason=decision.reason, pid=pid, stacks=stacks
        )
        self._said = None
        self._supervisor.kill()
        self._budget.spend(now)

    def _say(self, level: str, event: str, action: str, reason: str) -> None:
        """Log a decision when it is not the one of the last round."""
        if (event, action, reason) == self._said:
            return
        self._said = (event, action, reason)
        getattr(log, level)(event, action=action, reason=reason)

    def _revive_services(self) -> None:
        try:
            revived = embedded.revive(self._settings)
        except TaggingError as error:
            log.warning("watchdog.services_down", reason=str(error))
            return
        if revived:
            log.warning("watchdog.services_revived", services=list(revived))


def client_of(limits: WatchdogSettings) -> Supervisor:
    """The supervisor that the settings name."""
    if limits.supervisor_url == "systemd":
        return SystemdClient(limits.program, limits.rpc_timeout_s)
    return SupervisorClient(limits.supervisor_url, limits.program, limits.rpc_timeout_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the watchdog until SIGTERM."""
    parser = OneLineParser(prog="python -m deploy.watchdog", description=__doc__)
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
    watchdog = Watchdog(settings, client_of(limits))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: watchdog.stop())
    log.info("watchdog.started", stall_s=limits.stall_s, program=limits.program)
    longest_s = max(settings.store.timeout_s, settings.broker.socket_timeout_s)
    if limits.stall_s <= 2 * longest_s:
        log.warning("watchdog.stall_s_is_short", stall_s=limits.stall_s, timeouts_s=longest_s)
    watchdog.run()
    log.info("watchdog.stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
