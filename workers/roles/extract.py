"""An extractor process: the models of one placement on one device, batching across posts."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence

import structlog

from common.errors import ConfigError
from common.fingerprint import packed
from extractors.suite import ExtractorSuite
from workers.cache.features import FeatureCache
from workers.cache.store import GuardedStore
from workers.pool.arena import Arena
from workers.pool.channel import Channel
from workers.protocol import Command, Extracted, ExtractTask, Task
from workers.roles.loop import Context, serve
from workers.roles.tasks import Outcome, run_extract

_MOST_WAITING = 512
_MOST_WAITING_BYTES = 64 << 20
"""Results that wait for the cache, in count and in bytes; beyond it they are not written. 64 MiB is
a minute of a fast GPU's features; a cache that is that far behind will not catch up, and half as
much would drop results when a bucket is slow for some seconds."""

_FLUSH_S = 2.0
"""Time to write the waiting results at the end, less than the King waits before it kills."""

_log = structlog.get_logger()


class CacheWriter:
    """A thread that writes results to the cache, so that the device never waits for it."""

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache
        self._queue: deque[tuple[ExtractTask, Extracted, int]] = deque()
        self._bytes = 0
        self._dropped = 0
        self._changed = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)
        self._thread.start()

    def keep(self, task: ExtractTask, result: Extracted) -> None:
        """Queue a result; never waits."""
        arrays = [a for a in (result.array, *result.also.values()) if a is not None]
        size = sum(a.nbytes for a in arrays) + len(result.text or "")
        with self._changed:
            if len(self._queue) < _MOST_WAITING and self._bytes + size <= _MOST_WAITING_BYTES:
                self._queue.append((task, result, size))
                self._bytes += size
                self._changed.notify()
                return
            self._dropped += 1
            if self._dropped & (self._dropped - 1) == 0:  # 1, 2, 4, 8 and so on
                _log.warning("cache.too_slow", not_kept=self._dropped)

    def close(self) -> None:
        """Write the waiting results for `_FLUSH_S` at most, then end."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(_FLUSH_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._ending)
                if not self._queue:
                    return
                task, result, size = self._queue.popleft()
                self._bytes -= size
            try:
                self._cache.keep(task, result)
            except Exception:  # noqa: BLE001 - the thread's loop: only this result is lost
                _log.exception("cache.not_kept", extractor=task.extractor)


class _Extractors:
    def __init__(self, context: Context, arena: Arena) -> None:
        launch = context.launch
        self._suite = ExtractorSuite(
            context.settings.features, launch.device, launch.extractors, threads=launch.threads
        )
        self._arena = arena
        self._settings = context.settings
        self._writer: CacheWriter | None = None

    def load(self) -> Mapping[str, str]:
        self._suite.load()
        if self._settings.cache.url is not None:
            cache = FeatureCache(GuardedStore.open(self._settings.cache), self._settings)
            cache.expect(self._suite.by_extractor)
            self._writer = CacheWriter(cache)
        return {"fingerprints": packed(self._suite.by_extractor)}

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        extracts = [task for task in tasks if isinstance(task, ExtractTask)]
        outcomes = run_extract(self._suite, extracts, self._arena)
        if self._writer is not None:
            for task, outcome in zip(extracts, outcomes, strict=True):
                if isinstance(outcome, Extracted):
                    self._writer.keep(task, outcome)
        return outcomes

    def between_batches(self, channel: Channel[Command]) -> float | None:
        return None

    def control(self, message: Command) -> None:
        pass

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._suite.close()
        self._arena.close()


def run(context: Context) -> None:
    """Serve extract tasks.

    Raises:
        ConfigError: The King passed no slots.
    """
    if context.arena is None:
        raise ConfigError("an extractor needs the slots")
    serve(context, _Extractors(context, context.arena))
