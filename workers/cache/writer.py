"""Writing behind: what an extractor gave is kept by a thread, so that the device never waits.

What would wait too long is not kept: the queue is bounded in count and in bytes, and a post needs
none of it.
"""

from __future__ import annotations

import threading
from collections import deque

import structlog

from workers.cache.features import FeatureCache
from workers.protocol import Extracted, ExtractTask

_MOST = 512
_MOST_BYTES = 64 << 20
_FLUSH_S = 2.0

_log = structlog.get_logger()


class CacheWriter:
    """One thread that writes to a cache."""

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
            if len(self._queue) < _MOST and self._bytes + size <= _MOST_BYTES:
                self._queue.append((task, result, size))
                self._bytes += size
                self._changed.notify()
                return
            self._dropped += 1
            if self._dropped & (self._dropped - 1) == 0:  # 1, 2, 4, 8, …
                _log.warning("cache.too_slow", not_kept=self._dropped)

    def close(self) -> None:
        """Write what is queued, for a moment; then end."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(_FLUSH_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    if self._ending:
                        return
                    self._changed.wait()
                task, result, size = self._queue.popleft()
                self._bytes -= size
            try:
                self._cache.keep(task, result)
            except Exception:  # noqa: BLE001 - the thread's loop: a result that cannot be kept costs only itself
                _log.exception("cache.not_kept", extractor=task.extractor)
