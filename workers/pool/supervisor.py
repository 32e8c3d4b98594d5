"""All worker processes and their pipes: starts, watches, replaces and ends them.

It knows nothing of tasks; `workers.pool.pool` reads what it reports and gives it messages to send.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import structlog

from workers.pool.launch import Launch, WorkerSpec
from workers.pool.member import Member
from workers.pool.pipe import PipeBroken
from workers.pool.process import WorkerProcess
from workers.protocol import Stop

_log = structlog.get_logger()

TICK_S = 0.1
_CLOSING_S = 2.0  # an exiting worker's interpreter may take this long after its pipe is closed
_CANNOT_START_S = 5.0
_LONGEST_WAIT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Said:
    """A worker sent a message."""

    member: Member
    message: Any


@dataclass(frozen=True, slots=True)
class Gone:
    """A worker's process has ended, and everything it had sent has been reported before.

    Attributes:
        how: ``signal SIGKILL`` or ``status 3``.
    """

    member: Member
    how: str
    status: int | None


Report: TypeAlias = Said | Gone


class Crew:
    """The worker processes.

    Attributes:
        woken: `wake` was called since the caller last cleared this.
        members: Name ─► member.
    """

    def __init__(
        self,
        specs: Iterable[WorkerSpec],
        launch: Callable[[WorkerSpec], Launch],
        *,
        start_timeout_s: float,
    ) -> None:
        self.members = {spec.name: Member(spec) for spec in specs}
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

    def send(self, member: Member, message: object) -> None:
        """Send a message without waiting for the worker to read it."""
        if member.process is not None and member.closing_at is None:
            member.process.pipe.send(message)
            self._watch_room(member, member.process)

    def kill(self, member: Member) -> None:
        """End a worker now; `collect` will report it gone."""
        if member.process is not None:
            member.process.kill()

    def on_time(self, now: float, *, restart: bool) -> None:
        """Start what is due, and kill what loads or exits for too long."""
        for member in self.members.values():
            process = member.process
            if process is None:
                if restart and member.state == "waiting" and member.restart_at <= now:
                    self._spawn(member, now)
            elif member.closing_at is not None:
                if member.closing_at + _CLOSING_S <= now:
                    process.kill()
            elif member.state == "starting" and member.since + self._start_timeout_s <= now:
                _log.error("workers.start_timeout", worker=member.name)
                process.kill()

    def next_timer(self) -> float:
        """When `on_time` has something to do next, `time.monotonic()`."""
        timers: list[float] = []
        for member in self.members.values():
            if member.process is None:
                if member.state == "waiting":
                    timers.append(member.restart_at)
                continue
            if member.closing_at is not None:
                timers.append(member.closing_at + _CLOSING_S)
            elif member.state == "starting":
                timers.append(member.since + self._start_timeout_s)
            if member.process.sentinel is None:
                timers.append(time.monotonic() + TICK_S)
        return min(timers, default=float("inf"))

    def collect(self, timeout_s: float) -> list[Report]:
        """Wait for the first report; in the order in which each worker made them."""
        reports: list[Report] = []
        ended: list[Member] = []
        for key, mask in self._selector.select(min(timeout_s, _LONGEST_WAIT_S)):
            if key.data is None:
                self._clear_wake()
                continue
            member, is_end = key.data
            if is_end:
                ended.append(member)
                continue
            if mask & selectors.EVENT_WRITE:
                member.process.pipe.flush()
                self._watch_room(member, member.process)
            if mask & selectors.EVENT_READ:
                reports += self._read(member)
        for member in self.members.values():
            process = member.process
            if process is not None and process.sentinel is None and process.ended:
                ended.append(member)
        for member in ended:
            reports += self._bury(member)
        return reports

    def stop(self, timeout_s: float) -> None:
        """Ask the ready ones to finish, kill the others, and wait; nothing is left after."""
        end = time.monotonic() + timeout_s
        for member in self.members.values():
            if member.state == "ready":
                self.send(member, Stop())
            else:
                self.kill(member)  # it is loading, and has nothing to finish
        while time.monotonic() < end and any(m.process for m in self.members.values()):
            self.collect(min(TICK_S, max(0.0, end - time.monotonic())))
        for member in self.members.values():
            if member.process is not None:
                member.process.close()
                member.process = None
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()

    # Parts ------------------------------------------------------------------------------------

    def _spawn(self, member: Member, now: float) -> None:
        try:
            process = WorkerProcess(member.spec, self._launch(member.spec))
        except OSError as error:  # no memory or no process left: that may pass
            _log.error("workers.cannot_start", worker=member.name, error=str(error))
            member.restart_at = now + _CANNOT_START_S
            return
        member.started(process, now)
        self._selector.register(process.pipe, selectors.EVENT_READ, (member, False))
        if process.sentinel is not None:
            self._selector.register(process.sentinel, selectors.EVENT_READ, (member, True))
        _log.debug("workers.started", worker=member.name, pid=process.pid)

    def _watch_room(self, member: Member, process: WorkerProcess) -> None:
        """Wait for room in the pipe too, while something is unsent."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if process.pipe.unsent else 0)
        if self._selector.get_key(process.pipe).events != events:
            self._selector.modify(process.pipe, events, (member, False))

    def _read(self, member: Member) -> list[Report]:
        process = member.process
        if process is None or member.closing_at is not None:
            return []
        messages: list[Any] = []
        try:
            messages = process.pipe.receive()
        except PipeBroken as error:
            _log.error("workers.bad_message", worker=member.name, error=str(error))
            process.kill()
        if process.pipe.closed:
            self._selector.unregister(process.pipe)
            member.closing_at = time.monotonic()
        return [Said(member, message) for message in messages]

    def _bury(self, member: Member) -> list[Report]:
        process = member.process
        if process is None or not process.ended:
            return []
        reports: list[Report] = []
        while more := self._read(member):  # what it had answered before it died counts
            reports += more
        if member.closing_at is None:
            self._selector.unregister(process.pipe)
        if process.sentinel is not None:
            self._selector.unregister(process.sentinel)
        reports.append(Gone(member, process.exit_text, process.exit_status))
        process.close()
        member.process = None
        return reports

    def _clear_wake(self) -> None:
        self.woken = True
        with suppress(OSError):
            while self._wake_in.recv(4096):
                pass
