"""The watchdog: restarts a King that is alive but makes no progress.

An ordinary program under supervisord or systemd. Every ``watchdog.interval_s`` it reads the King's
health file and decides:

    nudge     ask the King to connect to the broker again (SIGUSR1), after half of ``stall_s``
    restart   let the King write its stacks (SIGUSR2), kill it; the supervisor starts it again

A stall is a thread whose loop has stopped, a post in flight past its deadline, or an idle King
while messages wait. An empty queue, models that load, a drain, or a broker or database that is
down are not. After ``watchdog.restarts`` restarts in ``watchdog.restart_window_s`` it only reports.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import psutil
import structlog
import typer

from common.cli import ConfigFile, Overrides, exit_code, read_options
from common.errors import RetryableError, TaggingError, one_line
from common.logs import configure_logs
from config.load import load_settings
from config.settings import Settings
from deploy import embedded
from deploy.supervisor import Program, Supervisor, open_supervisor
from king.broker.connect import queue_depth
from king.king import SUBSCRIBE_SIGNAL
from king.status import DUMP_SIGNAL, read_health, stack_file

THREADS = ("main", "broker", "store", "dispatch")

# How often a stop is noticed while waiting for the next round; longer delays the supervisor's stop.
_STEP_S = 0.1
# The King sets its stack file aside at 4 MiB when it starts; a King that never starts stops here.
_MAX_STACK_BYTES = 8 * 2**20
# Stacks come within milliseconds; a shorter step only burns CPU, a longer one delays the restart.
_DUMP_STEP_S = 0.05
# A drain also flushes and joins three threads; less kills drains that would have ended.
_DRAIN_SLACK_S = 40.0

Action: TypeAlias = Literal["none", "wait", "nudge", "restart", "alarm"]

log = structlog.get_logger()


@dataclass(frozen=True)
class Observation:
    """The King at one moment; durations are measured on the watchdog's monotonic clock.

    Attributes:
        seen_s: Time since this process was first seen.
        phase: Phase in the health file; None until this process has written one.
        phase_s: Time in this phase.
        tick_ages: Thread -> seconds since its loop last ticked.
        overdue_s: Time that the oldest post has been in flight while the King was serving.
        starved_s: Time that the King has been idle while messages waited.
        backlog: Messages waiting, when the queue was asked.
        file_error: Reason that the health file cannot be written by anybody.
    """

    program: Program
    seen_s: float
    phase: str | None = None
    phase_s: float = 0.0
    tick_ages: Mapping[str, float] = field(default_factory=dict)
    overdue_s: float = 0.0
    starved_s: float = 0.0
    backlog: int | None = None
    file_error: str | None = None


@dataclass(frozen=True)
class Decision:
    """One action and its reason in one line."""

    action: Action
    reason: str


def decide(seen: Observation, settings: Settings) -> Decision:
    """Judge one observation; the first rule that applies decides."""
    state, limits = seen.program.state, settings.watchdog
    if state in ("FATAL", "UNKNOWN"):
        return Decision("alarm", f"the King is {state}: the supervisor has given up, start it")
    if state not in ("RUNNING", "STARTING"):
        return Decision("none", f"the King is {state}: the supervisor deals with that")
    stale = next((n for n in THREADS if seen.tick_ages.get(n, 0.0) > limits.stall_s), None)
    if seen.phase in ("draining", "stopped"):  # its threads end one by one
        limit_s = settings.king.drain_timeout_s + settings.workers.shutdown_timeout_s
        late = seen.phase_s > limit_s + _DRAIN_SLACK_S
        how_long = f" for {seen.phase_s:.0f} s" if late else ""
        return Decision("restart" if late else "wait", f"the King is {seen.phase}{how_long}")
    if seen.phase in (None, "starting", "loading"):
        what = "wrote no health file" if seen.phase is None else f"is still {seen.phase}"
        if seen.seen_s > limits.start_timeout_s:
            limit = f"start_timeout_s {limits.start_timeout_s:g}"
            return Decision("restart", f"the King {what} after {seen.seen_s:.0f} s ({limit})")
        if stale != "main":  # the other threads wait for the models too
            return Decision("wait", f"the King {what}")
    if stale is not None:
        if stale == "main" and seen.file_error is not None:
            return Decision("alarm", f"the King cannot be judged: {seen.file_error}")
        age, limit = f"{seen.tick_ages[stale]:.0f} s ago", f"stall_s {limits.stall_s:g}"
        return Decision("restart", f"the King's {stale} thread last moved {age} ({limit})")
    return _judge_work(seen, settings)


def _judge_work(seen: Observation, settings: Settings) -> Decision:
    """Judge a King whose threads all tick by what it does with the posts."""
    stall_s, king = settings.watchdog.stall_s, settings.king
    if seen.phase in ("store_down", "broker_down"):  # a restart repairs neither
        what = "database" if seen.phase == "store_down" else "broker"
        return Decision("wait", f"the King waits for the {what}")
    # A post may first wait for the lease of a King that died.
    margin_s = max(stall_s, king.lease_s + 5)
    if seen.overdue_s > king.post_deadline_s + margin_s:
        limit = f"king.post_deadline_s {king.post_deadline_s:g} + {margin_s:g}"
        return Decision("restart", f"a post is in flight for {seen.overdue_s:.0f} s ({limit})")
    what = f"the King is idle for {seen.starved_s:.0f} s while {seen.backlog} messages wait"
    if seen.starved_s > stall_s:
        return Decision("restart", f"{what} (stall_s {stall_s:g})")
    if seen.starved_s > stall_s / 2:
        return Decision("nudge", what)
    return Decision("none", "the King makes progress")


class Progress:
    """The durations that health files show.

    A duration runs from the moment at which a value was last seen to change, on the watchdog's own
    clock: a clock that is set is not a stall. ``ask_queue`` returns the number of waiting messages.
    """

    def __init__(
        self,
        settings: Settings,
        ask_queue: Callable[[], int | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._ask_queue = ask_queue
        self._clock = clock
        self._identity: str | None = None
        self.forget()

    def forget(self) -> None:
        """Start every duration again."""
        self._since = self._clock()
        self._changes: dict[str, tuple[object, float]] = {}
        self._starved_since: float | None = None
        self._backlog: int | None = None
        self._ask_at = 0.0

    def observe(self, program: Program, health: Mapping[str, Any] | None) -> Observation:
        """Add what the supervisor and the health file say now."""
        if program.identity != self._identity:
            self._identity = program.identity
            self.forget()
        seen_s = self._clock() - self._since
        # In a container PIDs come back after a restart, and dates of files move with the clock.
        if health is None or health.get("process") != program.identity or not program.identity:
            return Observation(program, seen_s)
        phase = str(health.get("phase", ""))
        phase_s = self._age_s("phase", phase)
        ticks = health.get("ticks") or {"main": health["updated_at"]}
        ages = {name: self._age_s(name, tick) for name, tick in ticks.items()}
        self._look_at_queue(phase, phase_s, health)
        oldest_s = _number(health.get("oldest_in_flight_s"))
        starved_s = 0.0 if self._starved_since is None else self._clock() - self._starved_since
        stuck = ages.get("main", 0.0) > self._settings.watchdog.stall_s
        return Observation(
            program=program,
            seen_s=seen_s,
            phase=phase,
            phase_s=phase_s,
            tick_ages=ages,
            # A post in flight during an outage had no chance to end.
            overdue_s=min(oldest_s, phase_s) if phase == "serving" else 0.0,
            starved_s=starved_s,
            backlog=self._backlog,
            file_error=_write_error(self._settings.king.health_file) if stuck else None,
        )

    def _age_s(self, name: str, value: object) -> float:
        """Return how long a value has been the same."""
        now = self._clock()
        if name not in self._changes or self._changes[name][0] != value:
            self._changes[name] = (value, now)
        return now - self._changes[name][1]

    def _look_at_queue(self, phase: str, phase_s: float, health: Mapping[str, Any]) -> None:
        """Ask now and then, while the King is idle, whether messages wait for it."""
        limits = self._settings.watchdog
        work = (health.get("last_delivery_at"), str(health.get("counters")))
        moved = self._age_s("work", work) == 0.0
        if phase != "serving" and not moved and phase_s < limits.stall_s / 2:
            return  # it reconnects, perhaps because it was nudged: that has cured nothing yet
        if moved or phase != "serving" or health.get("in_flight"):
            self._starved_since = self._backlog = None
            return
        now = self._clock()
        if now < self._ask_at:
            return
        # Twelve looks in stall_s are enough to be sure, and cost the broker nothing.
        self._ask_at = now + max(limits.interval_s, limits.stall_s / 12)
        self._backlog = self._ask_queue()
        if not self._backlog:
            self._starved_since = None
        elif self._starved_since is None:
            self._starved_since = now


class Watchdog:
    """A loop that observes, decides and acts; each decision is logged once."""

    def __init__(
        self, settings: Settings, supervisor: Supervisor, progress: Progress | None = None
    ) -> None:
        self._settings = settings
        self._limits = settings.watchdog
        self._supervisor = supervisor
        self._progress = progress or Progress(settings, lambda: waiting_messages(settings))
        self._restarts: deque[float] = deque(maxlen=self._limits.restarts)
        self._logged: tuple[str, str] | None = None
        self._nudged = False
        self._stopping = False

    def stop(self) -> None:
        """Let `run` return; safe in a signal handler, where an Event would not be."""
        self._stopping = True

    def run(self) -> None:
        """Watch until `stop`, or until the supervisor itself is gone."""
        parent = os.getppid()
        while not self._sleep():
            if os.getppid() != parent:
                log.warning("watchdog.supervisor_gone")
                return
            self.tick()

    def _sleep(self) -> bool:
        """Wait for the next round; return True to stop."""
        end = time.monotonic() + self._limits.interval_s
        while not self._stopping and (remaining_s := end - time.monotonic()) > 0:
            time.sleep(min(remaining_s, _STEP_S))
        late_s = time.monotonic() - end
        if late_s > self._limits.stall_s / 2:  # the whole machine stood still, not only the King
            log.warning("watchdog.slept", seconds=round(late_s, 1))
            self._progress.forget()
        return self._stopping

    def tick(self) -> Decision | None:
        """Do one round; None when the supervisor does not answer."""
        self._revive_services()
        try:
            health = read_health(self._settings.king.health_file)
            seen = self._progress.observe(self._supervisor.program(), health)
            decision = decide(seen, self._settings)
            self._act(seen, decision)
        except (RetryableError, OSError) as error:  # OSError: no descriptors are left, for now
            self._log_once("watchdog.supervisor_unreachable", Decision("none", one_line(error)))
            return None
        return decision

    def _act(self, seen: Observation, decision: Decision) -> None:
        if not seen.starved_s:
            self._nudged = False
        match decision.action:
            case "restart":
                self._restart(seen.program.pid, decision)
            case "nudge":
                if not self._nudged and catches(seen.program.pid, SUBSCRIBE_SIGNAL):
                    self._nudged = True
                    self._log_once("watchdog.decision", decision)
                    send_signal(seen.program.pid, SUBSCRIBE_SIGNAL)
            case "alarm":
                log.error("watchdog.decision", action="none", reason=decision.reason)
            case _:
                self._log_once("watchdog.decision", decision)

    def _restart(self, pid: int, decision: Decision) -> None:
        now, limits = time.monotonic(), self._limits
        full = len(self._restarts) == limits.restarts
        if full and now - self._restarts[0] < limits.restart_window_s:
            because = f"{limits.restarts} restarts in {limits.restart_window_s:g} s are used up"
            log.error("watchdog.restart_withheld", reason=decision.reason, because=because)
            return
        stacks = write_stacks(pid, self._settings.king.health_file, decision.reason, limits.dump_s)
        if self._supervisor.program().pid != pid:
            return  # it ended by itself meanwhile
        log.warning(
            "watchdog.decision",
            action="restart",
            reason=decision.reason,
            pid=pid,
            stacks=str(stacks),
        )
        self._logged = None
        self._supervisor.kill()
        self._restarts.append(now)

    def _log_once(self, event: str, decision: Decision) -> None:
        if (event, decision.reason) != self._logged:
            self._logged = (event, decision.reason)
            log.info(event, action=decision.action, reason=decision.reason)

    def _revive_services(self) -> None:
        try:
            revived = embedded.revive(self._settings)
        except (TaggingError, OSError) as error:
            log.warning("watchdog.services_down", reason=one_line(error))
            return
        if revived:
            log.warning("watchdog.services_revived", services=list(revived))


def waiting_messages(settings: Settings) -> int | None:
    """Ask the broker on a connection of our own; None when it does not answer in time."""
    broker = embedded.peek(settings).broker
    limit_s = min(broker.socket_timeout_s, settings.watchdog.probe_timeout_s)
    if broker.url.startswith(embedded.SCHEME):
        return None
    try:
        return queue_depth(broker.model_copy(update={"socket_timeout_s": limit_s}))
    except TaggingError:
        return None


def catches(pid: int, number: int) -> bool:
    """Tell whether a process handles a signal; without a handler the signal would end it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def send_signal(pid: int, number: int) -> None:
    """Send a signal to a process that may just have ended."""
    try:
        os.kill(pid, number)
    except OSError as error:
        log.warning("watchdog.signal_failed", pid=pid, reason=error.strerror)


def write_stacks(pid: int, health_file: Path, reason: str, wait_s: float) -> Path | None:
    """Let the King append its Python stacks to the stack file, under a line with the reason.

    A stopped process writes nothing, and is not waited for. Returns None when the file cannot be
    written; never raises.
    """
    path = stack_file(health_file)
    try:
        status = str(psutil.Process(pid).status())
    except psutil.Error:
        status = "gone"
    moment = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        if not path.exists() or path.stat().st_size < _MAX_STACK_BYTES:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"==== {moment} pid {pid} ({status}): {reason}\n")
        size = path.stat().st_size
        if status != psutil.STATUS_STOPPED and catches(pid, DUMP_SIGNAL):
            os.kill(pid, DUMP_SIGNAL)
            end = time.monotonic() + wait_s
            while time.monotonic() < end and path.stat().st_size == size:
                time.sleep(_DUMP_STEP_S)
            time.sleep(_DUMP_STEP_S)  # the rest of the stacks, once the first have come
    except OSError:
        return path if path.exists() else None
    return path


def _write_error(health_file: Path) -> str | None:
    """Return why nobody can write next to the health file, for example a full disk."""
    scratch = health_file.with_name(f".{health_file.name}.watchdog")
    try:
        scratch.write_text(f"{os.getpid()}\n", encoding="utf-8")
        scratch.unlink()
    except OSError as error:
        return f"{health_file.parent} cannot be written: {error.strerror or error}"
    return None


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line."""

    config: ConfigFile = None
    overrides: Overrides
    # The daemon's option, which KING_ARGS may hold.
    drain: Annotated[bool, typer.Option("--drain", hidden=True)] = False


def run(arguments: Sequence[str] | None) -> None:
    """Run the watchdog until SIGTERM."""
    line = read_options(CommandLine, "python -m deploy.watchdog", arguments, about=__doc__)
    settings = load_settings(line.config, line.overrides)
    configure_logs(settings.log.format, settings.log.level)
    limits = settings.watchdog
    watchdog = Watchdog(settings, open_supervisor(limits))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: watchdog.stop())
    log.info("watchdog.started", stall_s=limits.stall_s, program=limits.program)
    longest_s = max(settings.store.timeout_s, settings.broker.socket_timeout_s)
    if limits.stall_s <= 2 * longest_s:  # a King that waits for one of them would be restarted
        log.warning("watchdog.stall_s_is_short", stall_s=limits.stall_s, timeouts_s=longest_s)
    watchdog.run()
    log.info("watchdog.stopped")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the watchdog; 0 done, 2 the configuration is wrong, 1 anything else."""
    return exit_code("watchdog", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
