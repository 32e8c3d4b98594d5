"""Posts through a pool of workers, without queue or database: for HTTP and the offline scripts.

    with PostRunner(settings) as runner:
        futures = [runner.submit(post) for post in posts]  # waits while too many are in flight
        for future in futures:
            ran = future.result()

One thread owns the pool and walks the posts' plans on it (`workers.post_run`), as the daemon's
does.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType

import structlog

from common.errors import Busy, ConfigError, PermanentError, RetryableError, TaggingError
from config.settings import ExtractorName, FeatureSettings, Settings
from workers.fetch.sources import is_url, local_file
from workers.plan import PostPlan
from workers.pool.events import (
    PoolEvent,
    PoolReady,
    PoolRefused,
    TaskDone,
    TaskFailed,
    TaskPool,
    WorkerView,
)
from workers.pool.pool import ProcessPool
from workers.post_run import Ran, Walk, Walks
from workers.protocol import Modality, Post, Stream

__all__ = ["PostRunner", "Ran", "extractors_of"]

_POLL_S = 0.25

_log = structlog.get_logger()


class PostRunner:
    """Runs posts on a pool of workers; `start` it, `submit` posts, `close` it.

    URLs are downloaded by the pool's downloader under `fetch`'s limits; sources that are paths
    are read in place by the decoders, and are never deleted.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        fuse: bool = True,
        modalities: frozenset[Modality] | None = None,
        pool: TaskPool | None = None,
        local_root: Path | None = None,
        limit: int = 32,
    ) -> None:
        """Describe it; starts nothing.

        Args:
            settings: Of the pool, and of the features.
            fuse: Whether tags are wanted; without, there is no fusion worker, and no bundle.
            modalities: Only these, and only their extractors are loaded; None: all.
            pool: The workers; None takes real ones.
            local_root: The only folder whose files may be read in place; None: any file that
                this process may read, for sources that this machine's user names himself.
            limit: Posts in flight at most.
        """
        self._settings = settings
        self._modalities = modalities
        self._pool: TaskPool = pool or ProcessPool(
            settings, fuse=fuse, extractors=extractors_of(modalities, settings.features)
        )
        self._walks = Walks(
            self._pool,
            fuse=fuse,
            local_root=local_root,
            replan=lambda plan: self._plan(plan.post),
            on_end=self._on_end,
        )
        self._local_root = local_root
        self._limit = limit
        self._room = threading.Condition()
        self._in_flight = 0
        self._inbox: deque[Walk] = deque()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._told = threading.Event()
        self._over: TaggingError | None = None

    # For any thread ---------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the workers have loaded, and nothing has ended them."""
        return self._pool.ready and self.trouble is None and not self._stopping.is_set()

    @property
    def trouble(self) -> str | None:
        """Why no post can be run (any more), or None."""
        return str(self._over) if self._over is not None else self._pool.refused

    @property
    def bundle(self) -> tuple[str, str] | None:
        """Name and version of the bundle that is served."""
        return self._pool.bundle

    @property
    def fingerprints(self) -> Mapping[Stream, str]:
        """Stream ─► fingerprint of the features that the extractors give, once ready."""
        return self._pool.fingerprints

    @property
    def workers(self) -> list[WorkerView]:
        """Every worker, for health."""
        return self._pool.workers

    @property
    def in_flight(self) -> int:
        """Posts that were submitted and have not ended."""
        return self._in_flight

    def start(self, *, wait: bool = True) -> None:
        """Start the workers.

        Args:
            wait: Return when they have loaded; without, at once: see `ready` and `trouble`.

        Raises:
            ConfigError: The pool refuses the configuration, weights or bundle.
        """
        if self._thread is None:
            # The workers die with this thread: it lives as long as they may.
            self._thread = threading.Thread(target=self._run, name="runner", daemon=True)
            self._thread.start()
        if not wait:
            return
        self._told.wait()
        if self._over is not None:
            self.close()
            raise self._again(self._over)

    def submit(
        self, post: Post, *, deadline_s: float | None = None, wait_s: float | None = None
    ) -> Future[Ran]:
        """Run a post; cancelling the future breaks it off.

        The future fails with `NothingUsable` or `RetryableError` where no modality could be used
        (its `reasons` name them), with `DeadlineExceeded`, or with `FeatureError`.

        Args:
            post: With URLs or local paths as sources.
            deadline_s: How long it may take; None takes ``king.post_deadline_s``.
            wait_s: How long to wait while `limit` posts are in flight; None: until there is room.

        Raises:
            Busy: There was no room in time.
            TaggingError: The runner has ended, and why.
        """
        limit_s = deadline_s if deadline_s is not None else self._settings.king.post_deadline_s
        with self._room:
            if not self._room.wait_for(self._has_room, wait_s):
                raise Busy(f"{self._limit} posts are in flight already")
            if self._over is not None:
                raise self._again(self._over)
            if self._thread is None or self._stopping.is_set():
                raise RetryableError("the workers are not running")
            self._in_flight += 1
            walk = Walk(self._plan(post), limit_s)
            self._inbox.append(walk)
        walk.future.add_done_callback(self._on_done)
        self._pool.wake()
        return walk.future

    def close(self) -> None:
        """Break off what is in flight, and end the workers; may be called again."""
        self._stopping.set()
        with self._room:
            self._room.notify_all()
        if self._thread is None:
            self._pool.stop(0)
        else:
            self._pool.wake()
            self._thread.join()

    def __enter__(self) -> PostRunner:
        """Started."""
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _has_room(self) -> bool:
        ended = self._stopping.is_set() or self._over is not None
        return ended or self._in_flight < self._limit

    def _on_done(self, future: Future[Ran]) -> None:
        if future.cancelled():
            self._pool.wake()

    @staticmethod
    def _again(error: TaggingError) -> TaggingError:
        """The same error for another thread: each has a traceback of its own."""
        return type(error)(str(error))

    # The thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._pool.start()
            while not self._stopping.is_set():
                while self._inbox:
                    self._walks.begin(self._inbox.popleft())
                for event in self._pool.poll(_POLL_S):
                    self._handle(event)
                self._walks.expire()
        except TaggingError as error:
            self._end_all(error)
        except BaseException as error:  # noqa: BLE001 - the thread's end: who waits must be told
            _log.exception("runner.thread_died")
            self._end_all(RetryableError(f"the workers' thread has ended: {type(error).__name__}"))
        finally:
            self._pool.stop(self._settings.workers.shutdown_timeout_s)
            self._end_all(RetryableError("the workers have been stopped"))

    def _handle(self, event: PoolEvent) -> None:
        if isinstance(event, TaskDone):
            self._walks.done(event)
        elif isinstance(event, TaskFailed):
            self._walks.failed(event)
        elif isinstance(event, PoolReady):
            self._told.set()
        elif isinstance(event, PoolRefused):
            self._end_all(ConfigError(event.message))

    def _end_all(self, error: TaggingError) -> None:
        with self._room:
            self._over = self._over or error
            self._room.notify_all()
        self._told.set()
        self._walks.end_all(error)
        while self._inbox:
            self._on_end(self._inbox.popleft(), error)

    def _on_end(self, walk: Walk, outcome: Ran | TaggingError) -> None:
        with self._room:  # before the future: who has its answer finds room for the next post
            self._in_flight -= 1
            self._room.notify()
        walk.end(outcome)

    def _plan(self, post: Post) -> PostPlan:
        return PostPlan(
            post,
            self._settings.features,
            max_media=self._settings.fetch.max_media,
            modalities=self._modalities,
            cache=self._settings.cache.url is not None,
            local=self._is_local,
        )

    def _is_local(self, source: str) -> bool:
        """Whether a source is a file that may be read in place."""
        try:
            return not is_url(source) and bool(local_file(source, root=self._local_root))
        except PermanentError:
            return False


def extractors_of(
    modalities: Collection[Modality] | None, features: FeatureSettings
) -> frozenset[ExtractorName] | None:
    """The extractors that give these modalities; None: all."""
    if modalities is None:
        return None
    names: set[ExtractorName] = set(modalities)
    if "ocr" in names or ("text" in names and features.ocr_mode == "append"):
        names |= {"ocr", "text"}  # what is read in pictures is embedded as text
    return frozenset(names)
