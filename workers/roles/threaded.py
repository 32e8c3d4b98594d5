"""The roles that wait for others in threads: downloads, and look-ups in the cache."""

from __future__ import annotations

import os
import queue
import select
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path

import structlog

from common.errors import ConfigError, RetryableError
from common.fingerprint import unpacked
from common.post import Failure
from config.settings import FetchSettings, Settings
from workers.cache.entries import GuardedStore
from workers.cache.features import FeatureCache
from workers.fetch.client import Fetcher
from workers.fetch.spool import file_name
from workers.pool.channel import Channel
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
    Ready,
    Reply,
    Stop,
)
from workers.roles.loop import Context, answer, failure_of

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
        with suppress(BlockingIOError):  # full: the main thread will wake anyway
            os.write(self._wake_out, b"r")

    def serve(self, channel: Channel[Command]) -> None:
        """Work until told to stop or the King is gone."""
        for thread in self._threads:
            thread.start()
        channel.send_wait(Ready())
        poller = select.poll()
        poller.register(self._wake_in, select.POLLIN)
        poller.register(channel.fileno(), select.POLLIN)
        while True:
            timer = self.next_timer()
            poller.poll(None if timer is None else max(0.0, timer - time.monotonic()) * 1000 + 1)
            for message in channel.receive():
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
        with suppress(BlockingIOError):
            while os.read(self._wake_in, 4096):
                pass
        replies: list[Reply] = []
        with suppress(queue.Empty):
            while True:
                replies.append(self._replies.get_nowait())
        for reply in self.settle(replies):
            channel.send_wait(reply)

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
        super().__init__(settings.connections, "fetch")
        self._settings = settings
        self._spool = spool

    @contextmanager
    def worker(self) -> Iterator[Callable[[Command], None]]:
        with closing(Fetcher(self._settings)) as fetcher:
            yield lambda message: self._download(fetcher, message)

    def _download(self, fetcher: Fetcher, message: Command) -> None:
        if not isinstance(message, Envelope) or not isinstance(message.task, FetchTask):
            return
        task_id = message.task_id
        if message.deadline <= time.monotonic():
            late = Failure("fetch", RetryableError.__name__, "waited past its deadline", True)
            self.reply(Failed(task_id, late))
            return
        self.reply(Began((task_id,)))
        started = time.perf_counter()
        try:
            fetched = fetcher.fetch(message.task.media, self._spool / file_name(task_id))
        except Exception as error:  # noqa: BLE001 - the loop: a download costs only itself
            self.reply(Failed(task_id, failure_of("fetch", error)))
            return
        self.reply(answer(task_id, fetched, time.perf_counter() - started))


def fetch(context: Context) -> None:
    """Serve downloads until told to stop or the King is gone.

    Raises:
        ConfigError: The spool is not a folder.
    """
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
                    return answer(task_id, CacheHits(), 0.0)
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
                yield answer(task_id, CacheHits(), self._timeout_s)

    def next_timer(self) -> float | None:
        return min(self._end_of.values(), default=None)

    def _work(self, message: Command) -> None:
        started = time.perf_counter()
        hits = CacheHits()
        try:
            if isinstance(message, CacheUpdate):
                self._cache.update(message)
            elif isinstance(message, Envelope) and isinstance(message.task, CacheLookup):
                hits = self._cache.lookup(message.task)
        except Exception:  # noqa: BLE001 - the loop: what goes wrong here is a miss
            _log.exception("cache.failed")
        if isinstance(message, Envelope):
            self.reply(answer(message.task_id, hits, time.perf_counter() - started))


def _reading_s(task: CacheLookup) -> float:
    """Return the time to read local files, which does not count against the cache."""
    total = 0
    for query in task.media:
        if query.local:
            with suppress(OSError, ValueError):
                total += Path(query.media.source).stat().st_size
    return total / _LOCAL_BYTES_PER_S


def lookup(context: Context) -> None:
    """Serve look-ups until told to stop or the King is gone.

    Raises:
        ConfigError: There is no such cache.
    """
    lookups = _Lookups(context.settings)
    try:
        lookups.serve(context.channel)
    finally:
        lookups.store.close()
