"""The cache process: looks up what is known of posts, in time or not at all.

The main thread alone reads and writes the pipe. Threads ask the backend; one that hangs there
costs its post `cache.timeout_s`, and the cache is then left alone for a while.
"""

from __future__ import annotations

import os
import queue
import select
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import structlog

from config.settings import Settings
from workers.cache.features import FeatureCache
from workers.cache.guarded import GuardedStore
from workers.pool.pipe import Pipe
from workers.protocol import (
    CacheFingerprints,
    CacheHits,
    CacheLookup,
    CacheUpdate,
    Envelope,
    Ready,
    Reply,
    Stop,
)
from workers.roles.loop import Context, answer

_MOST_NOTES = 4096
_LOCAL_BYTES_PER_S = 50 << 20
_FINISH_S = 2.0

_Work: TypeAlias = Envelope | CacheUpdate | None
_log = structlog.get_logger()


class _Lookups:
    """The threads, and what they were given."""

    def __init__(self, settings: Settings) -> None:
        self.store = GuardedStore.open(settings.cache)
        self.cache = FeatureCache(self.store, settings)
        self._timeout_s = settings.cache.timeout_s
        self._todo: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        self._open: dict[int, float] = {}
        self._replies: queue.SimpleQueue[tuple[int, Reply]] = queue.SimpleQueue()
        self.answered, self._signal = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._threads = [
            threading.Thread(target=self._work, name=f"cache-{i}", daemon=True)
            for i in range(settings.cache.threads)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, envelope: Envelope) -> Reply | None:
        """Queue a look-up; a reply at once where the cache is left alone."""
        if not self.store.available:
            return answer(envelope.task_id, CacheHits(), 0.0)
        self._open[envelope.task_id] = time.monotonic() + self._timeout_s + _reading_s(envelope)
        self._todo.put(envelope)
        return None

    def note(self, note: CacheUpdate) -> None:
        """Queue what is to be kept, unless too much waits."""
        if self.store.available and self._todo.qsize() < _MOST_NOTES:
            self._todo.put(note)

    def replies(self) -> list[Reply]:
        """What was found, and empty answers for what takes too long."""
        with suppress(BlockingIOError):
            while os.read(self.answered, 4096):
                pass
        replies: list[Reply] = []
        while not self._replies.empty():
            task_id, reply = self._replies.get_nowait()
            if self._open.pop(task_id, None) is not None:
                replies.append(reply)
        now = time.monotonic()
        late = [task_id for task_id, end in self._open.items() if end <= now]
        if late:
            self.store.failed(f"no answer within cache.timeout_s ({self._timeout_s:g} s)")
            late = list(self._open)  # the others would wait as long
        for task_id in late:
            del self._open[task_id]
            replies.append(answer(task_id, CacheHits(), self._timeout_s))
        return replies

    def wait_ms(self) -> float | None:
        """Until the next look-up takes too long."""
        if not self._open:
            return None
        return max(0.0, min(self._open.values()) - time.monotonic()) * 1000 + 1

    def finish(self, timeout_s: float) -> None:
        """Let the threads end what was queued."""
        for _ in self._threads:
            self._todo.put(None)
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _work(self) -> None:
        while (work := self._todo.get()) is not None:
            try:
                if isinstance(work, CacheUpdate):
                    self.cache.remember(work)
                else:
                    self._look(work)
            except Exception:  # noqa: BLE001 - the loop: what goes wrong here is a miss
                _log.exception("cache.failed")
                if isinstance(work, Envelope):
                    self._say(work.task_id, answer(work.task_id, CacheHits(), 0.0))

    def _look(self, envelope: Envelope) -> None:
        started = time.perf_counter()
        task = envelope.task
        found = self.cache.lookup(task) if isinstance(task, CacheLookup) else CacheHits()
        self._say(envelope.task_id, answer(envelope.task_id, found, time.perf_counter() - started))

    def _say(self, task_id: int, reply: Reply) -> None:
        self._replies.put((task_id, reply))
        with suppress(BlockingIOError):  # full: the main thread will wake anyway
            os.write(self._signal, b"r")


def _reading_s(envelope: Envelope) -> float:
    """Files that are read in place take their time, which says nothing about the cache."""
    total = 0
    if isinstance(envelope.task, CacheLookup):
        for asked in envelope.task.media:
            if asked.local:
                with suppress(OSError, ValueError):
                    total += Path(asked.media.source).stat().st_size
    return total / _LOCAL_BYTES_PER_S


def run(context: Context) -> None:
    """Serve look-ups until told to stop or the King is gone.

    Raises:
        ConfigError: There is no such cache.
    """
    lookups = _Lookups(context.settings)
    pipe = context.pipe
    pipe.send_wait(Ready())
    poller = select.poll()
    poller.register(lookups.answered, select.POLLIN)
    poller.register(pipe.fileno(), select.POLLIN)
    while True:
        poller.poll(lookups.wait_ms())
        for message in pipe.receive():
            if isinstance(message, Stop):
                _finish(lookups, pipe)
                return
            _take(lookups, pipe, message)
        if pipe.closed:
            return
        for reply in lookups.replies():
            pipe.send_wait(reply)


def _take(lookups: _Lookups, pipe: Pipe, message: object) -> None:
    if isinstance(message, Envelope):
        reply = lookups.add(message)
        if reply is not None:
            pipe.send_wait(reply)
    elif isinstance(message, CacheUpdate):
        lookups.note(message)
    elif isinstance(message, CacheFingerprints):
        lookups.cache.expect(message.fingerprints)


def _finish(lookups: _Lookups, pipe: Pipe) -> None:
    lookups.finish(_FINISH_S)
    for reply in lookups.replies():
        pipe.send_wait(reply)
    lookups.store.close()
