"""The local engine: a pool of decoders and extractors, many posts in flight, batches across them.

What a file does to a native library costs its post, not the run: see `workers.runner`.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from common.errors import RetryableError, TaggingError
from common.post import Failure, Modality
from config.settings import Settings
from corpus.extract.store import FeatureStore
from corpus.extract.values import Entry, FailedPart, Result, Work
from corpus.runs import Interrupt

if TYPE_CHECKING:
    from workers.post_run import PostTags
    from workers.runner import PostRunner

# The time of a post counts from when it is queued behind others; its tasks have their own limits.
_POST_LIMIT_S = 24 * 3600.0
_POLL_S = 0.5

_Ended: TypeAlias = "queue.SimpleQueue[tuple[Work, Future[PostTags]]]"


class LocalEngine:
    """Extracts on this machine; `open` it, `run` entries through it, `close` it.

    Args:
        force: Extract what is there, too.
        node: Name of this machine in results.
    """

    def __init__(
        self,
        settings: Settings,
        root: Path,
        wanted: frozenset[Modality],
        *,
        force: bool = False,
        retry_failed: bool = False,
        interrupt: Interrupt | None = None,
        node: str = "",
    ) -> None:
        self._settings, self._root, self._wanted = settings, root, wanted
        self._force, self._retry_failed, self._node = force, retry_failed, node
        self._interrupt = interrupt or Interrupt()
        processes = sum(group.processes for group in settings.workers.extractors)
        # Enough that full batches form and no process waits; arrays of each are held until written.
        self._limit = 16 * processes + 2 * settings.decode.processes
        self._runner: PostRunner | None = None
        self._store: FeatureStore | None = None

    def open(self) -> None:
        """Load the models, in processes of their own.

        Raises:
            ConfigError: Weights or devices are not to be had.
        """
        from workers.runner import PostRunner

        runner = PostRunner(self._settings, fuse=False, modalities=self._wanted, limit=self._limit)
        runner.start()
        self._runner = runner
        self._store = FeatureStore(
            self._root,
            self._wanted,
            dict(runner.fingerprints),
            self._retry_failed,
            self._node,
        )

    def close(self) -> None:
        """End the processes."""
        if self._runner is not None:
            self._runner.close()
        self._runner = None

    def run(self, entries: Iterable[Entry]) -> Iterator[Result]:
        """Results in the order in which they come.

        Raises:
            OSError: Features cannot be written.
            TaggingError: The workers have ended.
        """
        ended: _Ended = queue.SimpleQueue()
        open_ = 0
        for entry in entries:
            if self._interrupt.asked:
                break
            settled = self._settled(entry)
            if settled is not None:
                yield settled
                continue
            while open_ and (open_ >= self._limit or not ended.empty()):
                yield self._take(ended)
                open_ -= 1
            if isinstance(entry, Work):
                self._begin(entry, ended)
                open_ += 1
        while open_:
            yield self._take(ended)
            open_ -= 1

    def _settled(self, entry: Entry) -> Result | None:
        if isinstance(entry, Result):
            return entry
        return None if self._force else self._opened[1].find(entry)

    @property
    def _opened(self) -> tuple[PostRunner, FeatureStore]:
        if self._runner is None or self._store is None:
            raise RuntimeError("open() comes first")
        return self._runner, self._store

    def _begin(self, work: Work, ended: _Ended) -> None:
        future = self._opened[0].submit(work.post, deadline_s=_POST_LIMIT_S)
        future.add_done_callback(lambda done: ended.put((work, done)))

    def _take(self, ended: _Ended) -> Result:
        while True:
            try:
                work, future = ended.get(timeout=_POLL_S)  # wakes up for signals
                return self._finish(work, future)
            except queue.Empty:
                continue

    def _finish(self, work: Work, future: Future[PostTags]) -> Result:
        runner, store = self._opened
        try:
            return store.put(work, future.result().features)
        except CancelledError as error:
            raise RetryableError("the extraction was broken off") from error
        except TaggingError as error:
            if runner.trouble is not None:
                raise RetryableError(f"the workers have ended: {runner.trouble}") from error
            retryable = isinstance(error, RetryableError)
            part = FailedPart(
                work.post.post_id,
                None,
                Failure.of(error.stage or "extract", error, retryable=retryable),
            )
            return Result(work.index, work.post.post_id, "failed", {}, (part,), self._node)
