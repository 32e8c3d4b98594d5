"""The main of every worker process, and the loops of roles in batches and of roles in threads.

    python -m workers DESCRIPTOR KING_PID

The loop in batches is greedy: it drains its channel, takes the oldest task and every waiting task
of the same kind up to a batch, runs them, and never waits for more to come. Downloads and look-ups
in the cache wait for others: threads do the work, and the main thread has the channel.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import pkgutil
import queue
import select
import signal
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import psutil
import structlog
from setproctitle import setproctitle

from common.errors import (
    ConfigError,
    FeatureError,
    FetchRefused,
    FetchRetryable,
    MediaError,
    PermanentError,
    RetryableError,
    TaggingError,
    is_device_lost,
    is_out_of_memory,
    one_line,
)
from common.fingerprint import unpacked
from common.logs import configure_logs
from common.post import Failure, Media
from config.settings import FetchSettings, Settings, WorkerSettings
from workers.cache.entries import GuardedStore
from workers.cache.features import FeatureCache
from workers.pool.channel import Arena, Channel, to_worker
from workers.pool.scheduler import TaskQueue, batch_rows, queue_of, weight_of
from workers.protocol import (
    Began,
    CacheHits,
    CacheLookup,
    CacheUpdate,
    Command,
    Done,
    Envelope,
    Expect,
    Failed,
    FetchTask,
    Launch,
    ProtocolError,
    Ready,
    Refused,
    Reply,
    Result,
    Stop,
    Task,
)

_log = structlog.get_logger()
Item = TypeVar("Item")
Outcome: TypeAlias = Result | Failure
_FOREIGN: dict[str, type[PermanentError]] = {"fetch": FetchRefused, "decode": MediaError}
_PR_SET_PDEATHSIG = 1

REFUSED_STATUS = 2
"""Exit status of a worker that said `Refused`: a restart would not help."""
BROKEN_STATUS = 3
"""Exit status of a worker whose device state is lost (a device-side assert): restart it."""

_LAUNCH_TIMEOUT_S = 30.0
"""Wait for the first message. The King sends it right after the fork, so this only ends a process
whose King hangs; half would do, but a host that swaps needs its time."""

_MIB = 1 << 20

_WARM_TASKS = 200
"""Tasks before memory growth counts: by then allocators and caches have their size. Fewer may take
their warm-up for a leak; twice as many would only find a leak later."""

_LOOK_EVERY_TASKS = 50
"""Tasks between two looks at the memory, each 20 microseconds: rare enough not to matter, often
enough that a leak of 1 MB a task passes its limit by 50 MB at most."""


@dataclass(frozen=True)
class Context:
    """The argument of a role's function.

    Attributes:
        arena: The shared slots; None for a role that does not use them.
    """

    channel: Channel[Command]
    launch: Launch
    settings: Settings
    arena: Arena | None


class Retire(Exception):
    """The end of this process between two batches, so that a fresh one takes over."""


class Handler(ABC):
    """The work of a role that runs in batches; `serve` does the rest."""

    @abstractmethod
    def load(self) -> Mapping[str, str]:
        """Load models, return the content of `Ready`; TaggingError if a restart would not help."""

    @abstractmethod
    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Return one result or failure per task, in order."""

    def between_batches(self, channel: Channel[Command]) -> float | None:
        """Do what is due between batches or when idle; return the seconds until the next time.

        Raises Retire to have this process replaced.
        """
        del channel
        return None

    def control(self, message: Command) -> None:  # noqa: B027 - most roles are told nothing
        """Handle a control message."""

    def close(self) -> None:  # noqa: B027 - the process ends anyway
        """End what must not be cut off."""


def _report_ready(channel: Channel[Command], ready: Ready) -> None:
    """Tell the King; collect garbage from now on, but not the objects of the start."""
    gc.freeze()
    gc.enable()
    channel.send_wait(ready)


def serve(context: Context, handler: Handler) -> None:
    """Load, report `Ready`, and run batches until told to stop or the King is gone."""
    channel = context.channel
    _report_ready(channel, Ready(dict(handler.load())))
    backlog: deque[Envelope] = deque()
    rows = batch_rows(context.settings)
    recycler = Recycler(context.settings.workers)
    try:
        while True:
            if not backlog:  # else the results go with the news of the next batch
                channel.flush_wait()
            idle_s = handler.between_batches(channel)
            for message in channel.receive_wait(0.0 if backlog else idle_s):
                if isinstance(message, Envelope):
                    backlog.append(message)
                elif isinstance(message, Stop):
                    return
                else:
                    handler.control(message)
            if channel.closed:
                return
            if backlog:
                batch = take_batch(backlog, rows)
                _run_batch(channel, handler, batch)
                reason = recycler.served(len(batch))
                if reason is not None:
                    raise Retire(reason)  # the rest of the backlog has not begun
    except Retire as retire:
        _log.info("workers.retired", reason=str(retire) or None)
    finally:
        channel.flush_wait()
        handler.close()


def take_batch(backlog: deque[Envelope], rows: Mapping[TaskQueue, int]) -> list[Envelope]:
    """Take the oldest task and all that fit into its batch; the others keep their order."""
    first = backlog.popleft()
    batch = [first]
    if first.solo:
        return batch
    task_queue, room = queue_of(first.task), 1.0 - weight_of(first.task, rows)
    others: list[Envelope] = []
    while backlog:
        envelope = backlog.popleft()
        weight = weight_of(envelope.task, rows)
        if not envelope.solo and queue_of(envelope.task) == task_queue and weight <= room + 0.001:
            room -= weight
            batch.append(envelope)
        else:
            others.append(envelope)
    backlog.extend(others)
    return batch


def _run_batch(channel: Channel[Command], handler: Handler, batch: list[Envelope]) -> None:
    now = time.monotonic()
    for envelope in batch:
        if envelope.deadline <= now:
            waited = Failure(
                envelope.task.stage, RetryableError.__name__, "waited past its deadline", True
            )
            channel.send_wait(Failed(envelope.task_id, waited))
    live = [envelope for envelope in batch if envelope.deadline > now]
    if not live:
        return
    channel.send_wait(Began(tuple(envelope.task_id for envelope in live)))
    outcomes = handler.run([envelope.task for envelope in live])
    for envelope, outcome in zip(live, outcomes, strict=True):
        channel.put(reply_to(envelope.task_id, outcome))


def reply_to(task_id: int, outcome: Outcome) -> Done | Failed:
    """Return a task's outcome as the reply to it."""
    if isinstance(outcome, Failure):
        return Failed(task_id, outcome)
    return Done(task_id, outcome)


class DeviceLost(Exception):
    """The device's state cannot be recovered in this process: it must end and be replaced."""


def failure_of(stage: str, error: Exception) -> Failure:
    """Return an exception as a failure.

    A foreign exception is logged with its traceback, and becomes the error of its stage with a
    message that begins with the exception's own name.
    """
    if not isinstance(error, TaggingError):
        _log.error("workers.task_error", stage=stage, exc_info=error)
        # A system error in the only role that has connections says nothing about the post.
        ours = stage == "fetch" and isinstance(error, (OSError, MemoryError))
        error = FetchRetryable(one_line(error)) if ours else _typed(stage, error, str(error))
    return Failure.of(stage, error, retryable=isinstance(error, RetryableError))


def _typed(stage: str, error: Exception, text: str) -> TaggingError:
    name = type(error).__name__
    return _FOREIGN.get(stage, FeatureError)(f"{name}: {text}" if text else name)


def run_batch(
    stage: str, run: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]
) -> list[Outcome]:
    """Return the results of all items in order; halve when out of memory, run each alone on errors.

    ``run`` returns one result per item, or raises.

    Raises:
        DeviceLost: A CUDA error that no later call in this process would survive.
    """
    try:
        results = list(run(items))
        if len(results) != len(items):
            raise RuntimeError(f"{stage}: {len(results)} results for {len(items)} items")
        return list(results)
    except Exception as error:  # the worker's loop: it goes on whatever an item does
        if is_out_of_memory(error):
            return _smaller(stage, run, items, error)
        if is_device_lost(error):
            raise DeviceLost(one_line(error, 300)) from error
        if len(items) == 1:
            return [failure_of(stage, error)]
    return [outcome for item in items for outcome in run_batch(stage, run, [item])]


def _smaller(
    stage: str,
    run: Callable[[Sequence[Item]], Sequence[Result]],
    items: Sequence[Item],
    error: Exception,
) -> list[Outcome]:
    text = one_line(error, 200)
    _log.warning("workers.out_of_memory", stage=stage, batch=len(items), error=text)
    # The exception's frames keep the tensors alive that did not fit.
    error.__traceback__ = None
    _empty_cache()
    if len(items) == 1:
        failed = _typed(stage, error, f"out of memory: {text}")
        return [Failure.of(stage, failed, retryable=True)]
    half = len(items) // 2
    return run_batch(stage, run, items[:half]) + run_batch(stage, run, items[half:])


def _empty_cache() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


class Recycler:
    """A watch on a process's tasks and growth, to replace it before leaks add up."""

    def __init__(
        self,
        settings: WorkerSettings,
        resident_bytes: Callable[[], int] | None = None,
    ) -> None:
        self._settings = settings
        process = psutil.Process()  # once: to find out its own start it reads /proc
        self._resident_bytes = resident_bytes or (lambda: int(process.memory_info().rss))
        self._tasks = 0
        self._look_at = _WARM_TASKS
        self._base_bytes: int | None = None

    def served(self, n_tasks: int) -> str | None:
        """Count a batch's tasks; return the reason to end the process, if there is one."""
        self._tasks += n_tasks
        limit_tasks, limit_mb = self._settings.recycle_tasks, self._settings.recycle_growth_mb
        if limit_tasks and self._tasks >= limit_tasks:
            return f"served {self._tasks} tasks (workers.recycle_tasks {limit_tasks})"
        if not limit_mb or self._tasks < self._look_at:
            return None
        self._look_at = self._tasks + _LOOK_EVERY_TASKS
        now_bytes = self._resident_bytes()
        if self._base_bytes is None:
            self._base_bytes = now_bytes
        growth_mb = (now_bytes - self._base_bytes) / _MIB
        if growth_mb > limit_mb:
            return f"grew by {growth_mb:.0f} MiB (workers.recycle_growth_mb {limit_mb})"
        return None


def _obey_the_king_alone(king_pid: int) -> None:
    """Ignore SIGTERM and SIGINT, which reach the whole group, and die when the King ends."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != king_pid:
        sys.exit(1)  # the King ended before the line above


class _LibraryLog(logging.Handler):
    """Standard error holds JSON lines: libraries' lines become events of level debug."""

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())[:300]
        _log.debug("workers.library", logger=record.name, text=text)


def _first_message(channel: Channel[Command]) -> Launch:
    end = time.monotonic() + _LAUNCH_TIMEOUT_S
    while time.monotonic() < end and not channel.closed:
        # The King sends nothing more before `Ready`: there can be only one message.
        for message in channel.receive_wait(end - time.monotonic()):
            if isinstance(message, Launch):
                return message
    raise ProtocolError("the King sent no launch message")


def main(arguments: Sequence[str]) -> int:
    descriptor, king_pid = map(int, arguments)
    _obey_the_king_alone(king_pid)
    channel = Channel(socket.socket(fileno=descriptor), to_worker)
    os.set_inheritable(descriptor, False)
    launch = _first_message(channel)
    devices = f" {launch.device} {','.join(launch.extractors)}" if launch.extractors else ""
    setproctitle(f"insighttag: {launch.role}{devices}")
    settings = Settings.model_validate_json(launch.settings)
    configure_logs(settings.log.format, settings.log.level)
    structlog.contextvars.bind_contextvars(worker=launch.name)
    logging.captureWarnings(True)
    logging.getLogger().addHandler(_LibraryLog(logging.WARNING))
    arena = None
    if launch.arena >= 0:
        arena = Arena.map(launch.arena, launch.slots, launch.slot_bytes)
        os.close(launch.arena)
    try:
        pkgutil.resolve_name(launch.run)(Context(channel, launch, settings, arena))
    except RetryableError as error:
        _log.error("workers.cannot_load", reason=one_line(error))
        return 1
    except TaggingError as error:
        channel.send_wait(Refused(one_line(error)))
        return REFUSED_STATUS
    except DeviceLost as error:
        _log.error("workers.device_lost", error=str(error))
        return BROKEN_STATUS
    except Exception:  # noqa: BLE001 - outermost: a traceback belongs into the log, as one event
        _log.exception("workers.crashed")
        return 1
    return 0


_FINISH_S = 2.0
"""Time that begun work gets after `Stop`. The King waits longer than that before it kills; a
download that needs more is begun again by the next King anyway."""

_MOST_WAITING = 4096
"""Updates beyond this are dropped: some 2 MB of them. They come at the rate of downloads, so this
is a minute of a busy King; what is dropped is only extracted once more."""

_LOCAL_BYTES_PER_S = 50 << 20
"""Rate at which local files are read and hashed, at worst: a slow disk. A lower value would let a
cache that hangs hold its posts longer; a higher one would take large files for a hanging cache."""

_log = structlog.get_logger()


class ThreadedRole(ABC):
    """Base of a role whose tasks run in threads.

    A subclass says in `worker` what a thread does with a message; from there it answers with
    `reply`. The other hooks run in the main thread.
    """

    def __init__(self, threads: int, name: str) -> None:
        self.waiting: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self._wake_in, self._wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._woken = False  # the main thread has a wake-up before it, and need not be woken again
        self._threads = [
            threading.Thread(target=self._run_thread, name=f"{name}-{i}", daemon=True)
            for i in range(threads)
        ]

    @abstractmethod
    def worker(self) -> AbstractContextManager[Callable[[Command], None]]:
        """Return what one thread does with a message, and with it what only that thread uses."""

    def accept(self, message: Command) -> Reply | None:
        """Queue a message, or answer it at once."""
        self.waiting.put(message)
        return None

    def settle(self, replies: Iterable[Reply]) -> Iterable[Reply]:
        """Return the replies to send: those of the threads, and any that are due by themselves."""
        return replies

    def next_timer(self) -> float | None:
        """Return when `settle` is due without a reply, `time.monotonic()`; None for never."""
        return None

    def reply(self, reply: Reply) -> None:
        """Hand a reply to the main thread; from any thread."""
        self._replies.put(reply)
        if not self._woken:
            self._woken = True
            os.write(self._wake_out, b"r")

    def serve(self, channel: Channel[Command]) -> None:
        """Work until told to stop or the King is gone."""
        for thread in self._threads:
            thread.start()
        _report_ready(channel, Ready())
        poller = select.poll()
        poller.register(self._wake_in, select.POLLIN)
        poller.register(channel.fileno(), select.POLLIN)
        while True:
            timer = self.next_timer()
            wait_ms = None if timer is None else max(0.0, timer - time.monotonic()) * 1000 + 1
            ready = dict(poller.poll(wait_ms))
            if self._wake_in in ready:
                os.read(self._wake_in, 4096)
            for message in channel.receive() if channel.fileno() in ready else ():
                if isinstance(message, Stop):
                    self._finish()
                    self._send_replies(channel)
                    return
                reply = self.accept(message)
                if reply is not None:
                    channel.send_wait(reply)
            if channel.closed:
                return
            self._send_replies(channel)

    def _send_replies(self, channel: Channel[Command]) -> None:
        self._woken = False  # before the replies are taken: none comes unseen after them
        replies: list[Reply] = []
        with suppress(queue.Empty):
            while True:
                replies.append(self._replies.get_nowait())
        for reply in self.settle(replies):
            channel.put(reply)
        channel.flush_wait()

    def _finish(self) -> None:
        """Let the threads end what they have begun."""
        for _ in self._threads:
            self.waiting.put(None)
        end = time.monotonic() + _FINISH_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run_thread(self) -> None:
        with self.worker() as work:
            while (message := self.waiting.get()) is not None:
                work(message)


class _Downloads(ThreadedRole):
    def __init__(self, settings: FetchSettings, spool: Path) -> None:
        # TLS and http.client take their time at the start of a process, and other roles do without.
        from workers.fetch import Fetcher, file_name

        super().__init__(settings.connections, "fetch")
        self._fetcher = partial(Fetcher, settings)
        self._spool, self._file_name = spool, file_name

    @contextmanager
    def worker(self) -> Iterator[Callable[[Command], None]]:
        with closing(self._fetcher()) as fetcher:
            yield lambda message: self._download(fetcher.fetch, message)

    def _download(self, download: Callable[[Media, Path], Outcome], message: Command) -> None:
        if not isinstance(message, Envelope) or not isinstance(message.task, FetchTask):
            return
        task_id = message.task_id
        if message.deadline <= time.monotonic():
            late = Failure("fetch", RetryableError.__name__, "waited past its deadline", True)
            self.reply(Failed(task_id, late))
            return
        outcome: Outcome
        try:
            outcome = download(message.task.media, self._spool / self._file_name(task_id))
        except Exception as error:  # noqa: BLE001 - the loop: a download costs only itself
            outcome = failure_of("fetch", error)
        self.reply(reply_to(task_id, outcome))


def fetch(context: Context) -> None:
    """Serve downloads until told to stop or the King is gone; ConfigError without a spool."""
    spool = Path(context.launch.spool)
    if not context.launch.spool or not spool.is_dir():
        raise ConfigError(f"fetch.spool: {spool} is not a folder")
    _Downloads(context.settings.fetch, spool).serve(context.channel)


class _Lookups(ThreadedRole):
    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.cache.threads, "cache")
        self.store = GuardedStore.open(settings.cache)
        self._cache = FeatureCache(self.store, settings)
        self._timeout_s = settings.cache.timeout_s
        self._end_of: dict[int, float] = {}  # task -> when its post goes on without an answer

    @contextmanager
    def worker(self) -> Iterator[Callable[[Command], None]]:
        yield self._work

    def accept(self, message: Command) -> Reply | None:
        match message:
            case Envelope(task_id=task_id, task=CacheLookup() as task):
                if not self.store.available:
                    return Done(task_id, CacheHits())
                self._end_of[task_id] = time.monotonic() + self._timeout_s + _reading_s(task)
                self.waiting.put(message)
            case CacheUpdate():
                if self.store.available and self.waiting.qsize() < _MOST_WAITING:
                    self.waiting.put(message)
            case Expect():
                self._cache.expect(unpacked(message.fingerprints))
        return None

    def settle(self, replies: Iterable[Reply]) -> Iterable[Reply]:
        for reply in replies:
            if isinstance(reply, Done) and self._end_of.pop(reply.task_id, None) is not None:
                yield reply
        now = time.monotonic()
        if any(end <= now for end in self._end_of.values()):
            self.store.failed(f"no answer within cache.timeout_s ({self._timeout_s:g} s)")
            late, self._end_of = list(self._end_of), {}  # the others would wait as long
            for task_id in late:
                yield Done(task_id, CacheHits())

    def next_timer(self) -> float | None:
        return min(self._end_of.values(), default=None)

    def _work(self, message: Command) -> None:
        hits = CacheHits()
        try:
            if isinstance(message, CacheUpdate):
                self._cache.update(message)
            elif isinstance(message, Envelope) and isinstance(message.task, CacheLookup):
                hits = self._cache.lookup(message.task)
        except Exception:  # noqa: BLE001 - the loop: what goes wrong here is a miss
            _log.exception("cache.failed")
        if isinstance(message, Envelope):
            self.reply(Done(message.task_id, hits))


def _reading_s(task: CacheLookup) -> float:
    """Return the time to read local files, which does not count against the cache."""
    total = 0
    for query in task.media:
        if query.local:
            with suppress(OSError, ValueError):
                total += Path(query.media.source).stat().st_size
    return total / _LOCAL_BYTES_PER_S


def lookup(context: Context) -> None:
    """Serve look-ups until told to stop or the King is gone; ConfigError without such a cache."""
    lookups = _Lookups(context.settings)
    try:
        lookups.serve(context.channel)
    finally:
        lookups.store.close()
