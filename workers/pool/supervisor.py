"""All worker processes and their channels: starts, watches, replaces and ends them.

It knows nothing of tasks; `workers.pool.pool` reads its reports and gives it messages to send.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

import structlog

from common.retry import backoff_s
from workers.pool.events import WorkerState, WorkerView
from workers.pool.launch import WorkerSpec
from workers.pool.process import WorkerProcess
from workers.pool.scheduler import WorkerLoad
from workers.protocol import Command, Launch, ProtocolError, Reply, Stop

_log = structlog.get_logger()

TICK_S = 0.1
"""Interval between checks of deadlines while tasks run. A second would add half of one to each
death by deadline; a tenth of it would only cost wake-ups."""

_CLOSING_S = 2.0
"""Time for an exiting worker's interpreter after it has closed its channel, before it is killed."""

_CANNOT_START_S = 5.0
"""Pause after the system refused a process (no memory, no process left): long enough to pass,
short against the time that a worker needs to load."""

_LONGEST_WAIT_S = 3600.0
"""Longest sleep of the selector, because it refuses infinity; nothing depends on it."""

_FIRST_BACKOFF_S = 0.1
_MOST_BACKOFF_S = 30.0
"""Pause before a dead worker is started again, doubled with each death in a row. The first death is
most often one bad file, and the pause only delays its neighbours; the cap keeps a worker that
cannot live from loading its models all the time."""


@dataclass(eq=False)
class ManagedProcess:
    """One worker of the pool: the process that it has now, and when that is to be replaced.

    Attributes:
        since: When the state was entered, `time.monotonic()`.
        restart_at: When to start it, in state ``waiting``.
        closing_at: When its channel was found closed, while its process has not ended yet.
        strikes: Deaths in a row without a task answered in between; back-off grows with them.
        false_starts: Deaths in a row before `Ready`.
        info: Of its `Ready`.
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
        return self.spec.name

    def started(self, process: WorkerProcess, now: float) -> None:
        """Record that a process was started."""
        self.process, self.state, self.since = process, "starting", now
        self.kill_for, self.closing_at = None, None

    def became_ready(self, info: Mapping[str, str], now: float) -> None:
        """Record that it has loaded."""
        self.state, self.since, self.info = "ready", now, info
        self.false_starts = 0

    def ended(self, now: float, *, answered: int, planned: bool) -> float:
        """Record its end; return the seconds until it is started again.

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
            delay_s = backoff_s(self.strikes, _FIRST_BACKOFF_S, _MOST_BACKOFF_S)
        self.state, self.since, self.restart_at = "waiting", now, now + delay_s
        return delay_s

    def view(self, load: WorkerLoad | None) -> WorkerView:
        """Return it as seen from outside."""
        return WorkerView(
            name=self.spec.name,
            role=self.spec.role,
            device=self.spec.device,
            extractors=self.spec.extractors,
            state=self.state,
            pid=self.process.pid if self.process else None,
            held=len(load.tasks) if load else 0,
            done=load.done if load else 0,
            deaths=self.deaths,
        )


@dataclass(frozen=True, slots=True)
class Received:
    """A worker sent a message."""

    worker: ManagedProcess
    message: Reply


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker's process has ended; everything it had sent has been reported before.

    Attributes:
        how: ``signal SIGKILL`` or ``status 3``.
    """

    worker: ManagedProcess
    how: str
    status: int | None


Report: TypeAlias = Received | Ended


class Supervisor:
    """The worker processes.

    Attributes:
        woken: `wake` was called since the caller last cleared this.
        workers: Name -> worker.
    """

    def __init__(
        self,
        specs: Iterable[WorkerSpec],
        launch: Callable[[WorkerSpec], Launch],
        *,
        start_timeout_s: float,
    ) -> None:
        self.workers = {spec.name: ManagedProcess(spec) for spec in specs}
        self.woken = False
        self._launch = launch
        self._start_timeout_s = start_timeout_s
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
        self._selector.register(self._wake_in, selectors.EVENT_READ, None)

    def wake(self) -> None:
        """Interrupt `collect`; from any thread."""
        with suppress(OSError):  # full: it will wake anyway; closed: nothing waits
            self._wake_out.send(b"w")

    def send(self, worker: ManagedProcess, message: Command) -> None:
        """Send a message without waiting for the worker to read it."""
        if worker.process is not None and worker.closing_at is None:
            worker.process.channel.send(message)
            self._watch_room(worker, worker.process)

    def kill(self, worker: ManagedProcess) -> None:
        """End a worker now; `collect` will report its end."""
        if worker.process is not None:
            worker.process.kill()

    def on_time(self, now: float, *, restart: bool) -> None:
        """Start what is due, and kill what loads or exits for too long."""
        for worker in self.workers.values():
            process = worker.process
            if process is None:
                if restart and worker.state == "waiting" and worker.restart_at <= now:
                    self._spawn(worker, now)
            elif worker.closing_at is not None:
                if worker.closing_at + _CLOSING_S <= now:
                    process.kill()
            elif worker.state == "starting" and worker.since + self._start_timeout_s <= now:
                _log.error("workers.start_timeout", worker=worker.name)
                process.kill()

    def next_timer(self) -> float:
        """Return when `on_time` has something to do next, `time.monotonic()`."""
        timers: list[float] = []
        for worker in self.workers.values():
            if worker.process is None:
                if worker.state == "waiting":
                    timers.append(worker.restart_at)
                continue
            if worker.closing_at is not None:
                timers.append(worker.closing_at + _CLOSING_S)
            elif worker.state == "starting":
                timers.append(worker.since + self._start_timeout_s)
            if worker.process.sentinel is None:
                timers.append(time.monotonic() + TICK_S)
        return min(timers, default=float("inf"))

    def collect(self, timeout_s: float) -> list[Report]:
        """Wait for a first report; return them in the order in which each worker made them."""
        reports: list[Report] = []
        ended: list[ManagedProcess] = []
        for key, mask in self._selector.select(min(timeout_s, _LONGEST_WAIT_S)):
            if key.data is None:
                self._clear_wake()
                continue
            worker, is_end = key.data
            if is_end:
                ended.append(worker)
                continue
            if mask & selectors.EVENT_WRITE:
                worker.process.channel.flush()
                self._watch_room(worker, worker.process)
            if mask & selectors.EVENT_READ:
                reports += self._read(worker)
        for worker in self.workers.values():
            process = worker.process
            if process is not None and process.sentinel is None and process.ended:
                ended.append(worker)
        for worker in ended:
            reports += self._collect_ended(worker)
        return reports

    def stop(self, timeout_s: float) -> None:
        """Ask the ready ones to finish, kill the others, and wait until none is left."""
        end = time.monotonic() + timeout_s
        for worker in self.workers.values():
            if worker.state == "ready":
                self.send(worker, Stop())
            else:
                self.kill(worker)  # it is loading, and has nothing to finish
        while time.monotonic() < end and any(each.process for each in self.workers.values()):
            self.collect(min(TICK_S, max(0.0, end - time.monotonic())))
        for worker in self.workers.values():
            if worker.process is not None:
                worker.process.close()
                worker.process = None
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()

    def _spawn(self, worker: ManagedProcess, now: float) -> None:
        try:
            process = WorkerProcess(worker.spec, self._launch(worker.spec))
        except OSError as error:  # no memory or no process left: that may pass
            _log.error("workers.cannot_start", worker=worker.name, error=str(error))
            worker.restart_at = now + _CANNOT_START_S
            return
        worker.started(process, now)
        self._selector.register(process.channel, selectors.EVENT_READ, (worker, False))
        if process.sentinel is not None:
            self._selector.register(process.sentinel, selectors.EVENT_READ, (worker, True))
        _log.debug("workers.started", worker=worker.name, pid=process.pid)

    def _watch_room(self, worker: ManagedProcess, process: WorkerProcess) -> None:
        """Wait for room in the channel too, while something is unsent."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if process.channel.unsent else 0)
        if self._selector.get_key(process.channel).events != events:
            self._selector.modify(process.channel, events, (worker, False))

    def _read(self, worker: ManagedProcess) -> list[Report]:
        process = worker.process
        if process is None or worker.closing_at is not None:
            return []
        messages: list[Reply] = []
        try:
            messages = process.channel.receive()
        except ProtocolError as error:
            _log.error("workers.bad_message", worker=worker.name, error=str(error))
            process.kill()
        if process.channel.closed:
            self._selector.unregister(process.channel)
            worker.closing_at = time.monotonic()
        return [Received(worker, message) for message in messages]

    def _collect_ended(self, worker: ManagedProcess) -> list[Report]:
        process = worker.process
        if process is None or not process.ended:
            return []
        reports: list[Report] = []
        while more := self._read(worker):  # its answers from before count
            reports += more
        if worker.closing_at is None:
            self._selector.unregister(process.channel)
        if process.sentinel is not None:
            self._selector.unregister(process.sentinel)
        reports.append(Ended(worker, process.exit_text, process.exit_status))
        process.close()
        worker.process = None
        return reports

    def _clear_wake(self) -> None:
        self.woken = True
        with suppress(OSError):
            while self._wake_in.recv(4096):
                pass
