"""The worker processes: which there are, each pinned and with one channel, and their lives.

It starts, watches, replaces and ends them, and knows nothing of tasks; `workers.pool.pool` reads
its reports and gives it messages to send.
"""

from __future__ import annotations

import itertools
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

import structlog

from common.processes import python_path
from common.retry import backoff_s
from config.features import ExtractorName
from config.section import Section
from config.settings import BrokerSettings, CacheSettings, Settings, StoreSettings
from workers.pool.channel import Channel, to_king
from workers.pool.scheduler import TaskQueue, WorkerLoad
from workers.protocol import (
    Command,
    Launch,
    ProtocolError,
    Reply,
    Stop,
    WorkerRole,
    WorkerState,
    WorkerView,
)

_log = structlog.get_logger()

ROLES: Mapping[WorkerRole, str] = MappingProxyType(
    {
        "fetch": "workers.roles.loop:fetch",
        "decode": "workers.roles.batched:decode",
        "extract": "workers.roles.batched:extract",
        "fuse": "workers.roles.batched:fuse",
        "cache": "workers.roles.loop:lookup",
    }
)
"""Role -> ``module:function``, by name so that the King never imports what the workers load."""

TICK_S = 0.1
"""Interval between checks of deadlines while tasks run. A second would add half of one to each
death by deadline; a tenth of it would only cost wake-ups."""

_REAP_S = 0.01
"""Interval between looks at a process that has closed its channel, and ends within milliseconds.
Double would be felt in tests alone; half would only cost wake-ups."""

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

_MARGIN_S = 30
"""Seconds beyond the own limit of a downloader or a cache worker before it is killed. Both keep
their limits by themselves, but for name resolution, which cannot be interrupted from inside the
process and gives up after some 20 s; with less, a slow name server would cost the downloads of all
other posts."""

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_CACHE_USERS = ("cache", "extract")
_STORE_KEYS = ("AWS_", "AZURE_", "GOOGLE_", "FSSPEC_")


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker process of the pool, as the settings describe it.

    Attributes:
        queues: The task queues that it serves.
        limit_s: Seconds that a task may run once begun.
        at_most: Tasks that it may hold at once, begun or not; None leaves it to the batches.
        device: As configured: ``cpu`` or ``cuda:N`` of this host.
    """

    role: WorkerRole
    name: str
    queues: tuple[TaskQueue, ...]
    limit_s: float
    at_most: int | None = None
    device: str = "cpu"
    extractors: tuple[ExtractorName, ...] = ()
    threads: int = 1


def worker_specs(
    settings: Settings,
    *,
    fuse: bool = True,
    extractors: Collection[ExtractorName] | None = None,
) -> list[WorkerSpec]:
    """Return every worker process that the settings ask for.

    Args:
        settings: Of the whole.
        fuse: Whether there is a fusion worker, which needs a bundle.
        extractors: Only these are hosted; None: all.
    """
    fetch, cache, decode = settings.fetch, settings.cache, settings.decode
    workers, fusion = settings.workers, settings.fusion
    limit_s = fetch.total_timeout_s + _MARGIN_S
    specs = [WorkerSpec("fetch", "fetch-0", ("fetch",), limit_s, at_most=fetch.connections)]
    if cache.url is not None:
        limit_s = 2 * cache.timeout_s + _MARGIN_S
        at_most = 4 * cache.threads  # it has the next ones while the King polls
        specs.append(WorkerSpec("cache", "cache-0", ("lookup",), limit_s, at_most))
    specs += [
        # It has the next one while the King is told of the last.
        WorkerSpec("decode", f"decode-{i}", ("decode",), decode.deadline_s, 2, device)
        for i, device in zip(range(decode.processes), _decoder_devices(settings), strict=False)
    ]

    def is_hosted(name: ExtractorName) -> bool:
        return (extractors is None or name in extractors) and settings.features.runs(name)

    limit_s = workers.task_timeout_s
    number = itertools.count()
    for group in workers.extractors:
        names = tuple(filter(is_hosted, group.extractors))
        specs += [
            WorkerSpec(
                role="extract",
                name=f"extract-{next(number)}",
                queues=names,
                limit_s=limit_s,
                device=group.device,
                extractors=names,
                threads=group.threads,
            )
            for _ in range(group.processes if names else 0)
        ]
    if fuse:
        device, threads = fusion.device, fusion.threads
        spec = WorkerSpec("fuse", "fuse-0", ("fuse",), limit_s, device=device, threads=threads)
        specs.append(spec)
    return specs


def _decoder_devices(settings: Settings) -> Iterator[str]:
    """Return the devices of decoders, in turn: the GPUs of the encoders, else the first one."""
    if settings.decode.hwaccel == "none":
        return itertools.repeat("cpu")
    devices = dict.fromkeys(group.device for group in settings.workers.extractors)
    return itertools.cycle([each for each in devices if each != "cpu"] or ["cuda:0"])


def without_credentials(settings: Settings, role: WorkerRole = "decode") -> Settings:
    """Return the settings without what a worker does not need: broker, database, cache.

    A decoder that is taken over by what it decodes finds no password in its memory; the feature
    cache is known only to those who use it.
    """
    hidden: dict[str, Section] = {"broker": BrokerSettings(), "store": StoreSettings()}
    if role not in _CACHE_USERS:
        hidden["cache"] = CacheSettings()
    return settings.model_copy(update=hidden)


def pinned_environment(spec: WorkerSpec, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a worker, with what must be set before torch is imported.

    ``cuda:N`` counts in the devices that the King itself may see; the worker sees only that one,
    as ``cuda:0``.
    """
    # Settings come through the channel, without the URLs of broker and database: see `Launch`.
    # Hostile files are opened in the roles that do not use the cache.
    hidden = ("INSIGHTTAG_", "OTEL_", *(() if spec.role in _CACHE_USERS else _STORE_KEYS))
    pinned = {key: value for key, value in environ.items() if not key.upper().startswith(hidden)}
    pinned.update(dict.fromkeys(_THREAD_VARIABLES, str(spec.threads)))
    # Threads that spin while they wait take the cores of the other processes.
    pinned.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    pinned["TOKENIZERS_PARALLELISM"] = "false"
    pinned.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    pinned["CUDA_VISIBLE_DEVICES"] = ""
    if spec.device.startswith("cuda:"):
        index = int(spec.device.removeprefix("cuda:"))
        names = environ.get("CUDA_VISIBLE_DEVICES")
        visible = None if names is None else names.replace(" ", "").split(",")
        # One that the King may not see stays hidden: the worker says that it is not there.
        beyond = visible is not None and index >= len(visible)
        pinned["CUDA_VISIBLE_DEVICES"] = (
            str(index) if visible is None else "" if beyond else visible[index]
        )
    pinned["PYTHONPATH"] = python_path(environ)
    return pinned


@dataclass(eq=False)
class ManagedProcess:
    """One worker of the pool: the process that it has now, and when that is to be replaced.

    Attributes:
        channel: The King's end; None while there is no process.
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
    channel: Channel[Reply] | None = None
    since: float = 0.0
    restart_at: float = 0.0
    closing_at: float | None = None
    deaths: int = 0
    strikes: int = 0
    false_starts: int = 0
    info: Mapping[str, str] = field(default_factory=dict)
    kill_for: frozenset[int] | None = None
    _popen: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def running(self) -> bool:
        return self._popen is not None

    def start(self, launch: Launch, now: float) -> Channel[Reply]:
        """Start a process and return the channel to it.

        The calling thread must live as long as the process may: the kernel sends the process
        SIGKILL when that thread ends (PR_SET_PDEATHSIG).

        Raises:
            OSError: The system refuses another process.
        """
        ours, theirs = socket.socketpair()
        channel = Channel(ours, to_king)
        passed = [theirs.fileno()] + ([launch.arena] if launch.arena >= 0 else [])
        command = [sys.executable, "-m", "workers", str(theirs.fileno()), str(os.getpid())]
        # A worker inherits these blocked, and ignores them. Else a Ctrl-C, or supervisor's SIGTERM
        # to the group, kills it in its first milliseconds.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            self._popen = subprocess.Popen(  # noqa: S603 - our own module, no shell
                command,
                pass_fds=passed,
                env=pinned_environment(self.spec, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard output is the King's
            )
        except BaseException:
            channel.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self.channel, self.state, self.since = channel, "starting", now
        self.kill_for, self.closing_at = None, None
        channel.send(launch)
        return channel

    def kill(self) -> None:
        """Send SIGKILL, which ends a stopped process too."""
        if self._popen is not None:
            self._popen.kill()

    def reap(self, *, kill: bool = False) -> int | None:
        """Return the exit status, negative for a signal, and close the channel; None: it lives."""
        if self._popen is None:
            return None
        if kill:
            self._popen.kill()
            self._popen.wait()
        status = self._popen.poll()
        if status is not None:
            self._popen = None
            if self.channel is not None:
                self.channel.close()
                self.channel = None
        return status

    def became_ready(self, info: Mapping[str, str], now: float) -> None:
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
        return WorkerView(
            name=self.spec.name,
            role=self.spec.role,
            device=self.spec.device,
            extractors=self.spec.extractors,
            state=self.state,
            pid=self._popen.pid if self._popen else None,
            held=len(load.tasks) if load else 0,
            done=load.done if load else 0,
            batches=load.batches if load else 0,
            deaths=self.deaths,
        )


@dataclass(frozen=True, slots=True)
class Received:
    """A worker sent a message."""

    worker: ManagedProcess
    message: Reply


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker's process has ended; everything it had sent has been reported before."""

    worker: ManagedProcess
    status: int

    @property
    def how(self) -> str:
        """Return ``signal SIGKILL`` or ``status 3``."""
        if self.status >= 0:
            return f"status {self.status}"
        with suppress(ValueError):
            return f"signal {signal.Signals(-self.status).name}"
        return f"signal {-self.status}"


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

    def send(self, worker: ManagedProcess, *messages: Command) -> None:
        if worker.channel is not None and worker.closing_at is None:
            worker.channel.send(*messages)
            self._watch_room(worker, worker.channel)

    def on_time(self, now: float, *, restart: bool) -> None:
        """Start what is due, and kill what loads or exits for too long."""
        for worker in self.workers.values():
            due = self._due_at(worker) <= now
            if not worker.running:
                if restart and due:
                    self._start(worker, now)
            elif due:
                if worker.closing_at is None:
                    _log.error("workers.start_timeout", worker=worker.name)
                worker.kill()

    def next_timer(self) -> float:
        return min(map(self._due_at, self.workers.values()), default=float("inf"))

    def _due_at(self, worker: ManagedProcess) -> float:
        if not worker.running:
            return worker.restart_at if worker.state == "waiting" else float("inf")
        if worker.closing_at is not None:
            return worker.closing_at + _CLOSING_S
        return worker.since + self._start_timeout_s if worker.state == "starting" else float("inf")

    def collect(self, timeout_s: float) -> list[Report]:
        """Wait for a first report; return them in the order in which each worker made them."""
        reports: list[Report] = []
        closing = any(worker.closing_at is not None for worker in self.workers.values())
        wait_s = min(timeout_s, _REAP_S if closing else _LONGEST_WAIT_S)
        for key, mask in self._selector.select(wait_s):
            if key.data is None:
                self._clear_wake()
                continue
            worker: ManagedProcess = key.data
            if worker.channel is None:
                continue
            if mask & selectors.EVENT_WRITE:
                worker.channel.flush()
                self._watch_room(worker, worker.channel)
            if mask & selectors.EVENT_READ:
                reports += self._read(worker, worker.channel)
        for worker in self.workers.values():
            if worker.closing_at is not None and (status := worker.reap()) is not None:
                worker.closing_at = None
                reports.append(Ended(worker, status))
        return reports

    def stop(self, timeout_s: float) -> None:
        """Ask the ready ones to finish, kill the others, and wait until none is left."""
        end = time.monotonic() + timeout_s
        for worker in self.workers.values():
            if worker.state == "ready":
                self.send(worker, Stop())
            else:
                worker.kill()  # it is loading, and has nothing to finish
        while time.monotonic() < end and any(each.running for each in self.workers.values()):
            self.collect(min(TICK_S, max(0.0, end - time.monotonic())))
        for worker in self.workers.values():
            worker.reap(kill=True)
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()

    def _start(self, worker: ManagedProcess, now: float) -> None:
        try:
            channel = worker.start(self._launch(worker.spec), now)
        except OSError as error:  # no memory or no process left: that may pass
            _log.error("workers.cannot_start", worker=worker.name, error=str(error))
            worker.restart_at = now + _CANNOT_START_S
            return
        self._selector.register(channel, selectors.EVENT_READ, worker)
        _log.debug("workers.started", worker=worker.name, pid=worker.view(None).pid)

    def _watch_room(self, worker: ManagedProcess, channel: Channel[Reply]) -> None:
        """Wait for room in the channel too, while something is unsent."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.unsent else 0)
        if self._selector.get_key(channel).events != events:
            self._selector.modify(channel, events, worker)

    def _read(self, worker: ManagedProcess, channel: Channel[Reply]) -> list[Report]:
        messages: Sequence[Reply]
        broken = False
        try:
            messages = channel.receive()
        except ProtocolError as error:
            _log.error("workers.bad_message", worker=worker.name, error=str(error))
            worker.kill()
            messages, broken = error.before, True  # the `Began` of the task that is charged
        if broken or channel.closed:
            self._selector.unregister(channel)
            worker.closing_at = time.monotonic()
        return [Received(worker, message) for message in messages]

    def _clear_wake(self) -> None:
        self.woken = True
        with suppress(OSError):
            self._wake_in.recv(4096)  # what is left after that wakes again
