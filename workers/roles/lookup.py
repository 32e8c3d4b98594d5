"""The cache process: looks up what is known of posts, in time or not at all.

A thread that hangs in the backend costs its post `cache.timeout_s`; the cache is then left alone
for a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from common.fingerprint import unpacked
from config.settings import Settings
from workers.cache.features import FeatureCache
from workers.cache.store import GuardedStore
from workers.protocol import (
    CacheHits,
    CacheLookup,
    CacheUpdate,
    Command,
    Done,
    Envelope,
    Expect,
    Reply,
)
from workers.roles.loop import Context, ThreadedRole, answer

_MOST_WAITING = 4096
"""Updates beyond this are dropped: some 2 MB of them. They come at the rate of downloads, so this
is a minute of a busy King; what is dropped is only extracted once more."""

_LOCAL_BYTES_PER_S = 50 << 20
"""Rate at which local files are read and hashed, at worst: a slow disk. A lower value would let a
cache that hangs hold its posts longer; a higher one would take large files for a hanging cache."""

_log = structlog.get_logger()


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


def run(context: Context) -> None:
    """Serve look-ups until told to stop or the King is gone.

    Raises:
        ConfigError: There is no such cache.
    """
    lookups = _Lookups(context.settings)
    try:
        lookups.serve(context.channel)
    finally:
        lookups.store.close()
