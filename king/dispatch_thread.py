"""The dispatch thread: it alone touches the worker pool.

It runs each begun post on the pool (`workers.post_run`), tells the store thread the outcome of the
attempt, and reports the pool's state for health.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict

import psutil
import structlog

from config.settings import Settings
from king.jobs import Dead, Outcome, Released, Retry, Started, Tagged
from king.status import IDLE_TICK_S, Status
from workers.post_run import PostFailed, PostOutcome, PostPlan, PostRun, PostRuns, PostTags
from workers.protocol import (
    BundleLoaded,
    CacheHits,
    Decoded,
    Done,
    Failed,
    PoolEvent,
    PoolReady,
    PoolRefused,
    Result,
    TaskPool,
)

# Events of the pool and `wake` end a poll at once; only deadlines wait for it. At double these come
# half a second late; at half a King that waits for its workers wakes up eight times a second.
_POLL_S = 0.25
# With many posts in work, more events are waited for where there are few. A round of this thread
# costs as much as what it does with ten events; the workers have their next tasks by then, and a
# post of five stages takes 20 ms more. At half, rounds are of a few events; at double, small
# decoders wait for the King.
_PAUSE_S = 0.004
_FEW = 8
_MANY = 8
# The memory of every worker is read from /proc: at half it shows in a profile, at double the
# health page lags.
_WORKER_STATUS_EVERY_S = 1.0

log = structlog.get_logger()


class DispatchThread:
    """The thread that runs posts on the pool and reports the outcome of each attempt."""

    def __init__(
        self,
        pool: TaskPool,
        settings: Settings,
        status: Status,
        on_outcome: Callable[[Outcome], None],
        rng: random.Random | None = None,
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._status = status
        self._on_outcome = on_outcome
        self._retry = settings.king.retry
        self._rng = rng or random.Random()  # noqa: S311 - jitter
        self._inbox: deque[Started] = deque()
        self._runs = PostRuns(pool)
        self._started: dict[PostRun, Started] = {}
        self._releasing = False
        self._stopping = threading.Event()
        self._worker_status_due = 0.0

    @property
    def in_flight(self) -> int:
        """Return posts on the pool."""
        return len(self._runs)

    def start(self, started: Started) -> None:
        """Work on a post; called by the store thread, at most ``broker.prefetch`` at once."""
        self._inbox.append(started)
        self._pool.wake()

    def give_back(self) -> None:
        """Release every post: a drain has run out of time. For any thread."""
        self._releasing = True
        self._pool.wake()

    def stop(self) -> None:
        """Let `run` stop the pool and return. For any thread."""
        self._stopping.set()
        self._pool.wake()

    def run(self) -> None:
        """Drive the pool until `stop`."""
        try:
            self._pool.start()
            while not self._stopping.is_set():
                self._status.tick("dispatch")
                while self._inbox:
                    self._begin(self._inbox.popleft())
                if self._releasing:
                    self._release_all()
                wait_s = _POLL_S if len(self._runs) else IDLE_TICK_S
                events = self._pool.poll(wait_s)
                for event in events:
                    self._handle(event)
                if len(events) < _FEW and len(self._runs) >= _MANY:
                    time.sleep(_PAUSE_S)
                self._runs.expire()
                self._report_workers()
        finally:
            self._pool.stop(self._settings.workers.shutdown_timeout_s)

    def _begin(self, started: Started) -> None:
        plan = PostPlan(
            started.post,
            self._settings.features,
            max_media=self._settings.fetch.max_media,
            cache=self._settings.cache.url is not None,
        )
        if plan.cache_lookups:
            self._status.count("cache_lookups", plan.cache_lookups)
        if plan.media_left_out:
            log.warning("king.media_left_out", post_id=started.post_id, number=plan.media_left_out)
        limit_s = self._settings.king.post_deadline_s
        run = PostRun(
            plan,
            deadline=time.monotonic() + limit_s,
            limit=f"king.post_deadline_s ({limit_s:g} s)",
            last=self._retry.is_last(started.attempt),
            on_end=self._ended,
            priority=started.priority,
        )
        self._started[run] = started
        self._runs.begin(run)

    def _handle(self, event: PoolEvent) -> None:
        match event:
            case Done() | Failed():
                if isinstance(event, Done):
                    self._count(event.result)
                self._runs.handle(event)
            case PoolReady():
                self._status.bundle = self._pool.bundle
                self._status.ready.set()
                log.info("king.workers_ready", bundle=self._status.bundle)
            case BundleLoaded():
                self._take_bundle(event)
            case PoolRefused():
                self._status.refused = event

    def _count(self, result: Result) -> None:
        match result:
            case CacheHits(media=media):
                self._status.count("cache_hits", sum(hit.whole for hit in media))
            case Decoded(on_gpu=bool(on_gpu)):
                self._status.count("gpu_decoded" if on_gpu else "gpu_refused")

    def _take_bundle(self, loaded: BundleLoaded) -> None:
        before, status = self._status.bundle, self._status
        status.bundle = (loaded.name, loaded.version)
        status.bundle_refused = loaded.refused or None
        status.shadow = loaded.shadow
        status.shadow_refused = loaded.shadow_refused or None
        if status.bundle != before:
            log.info("king.bundle_changed", name=loaded.name, version=loaded.version)

    def _ended(self, run: PostRun, outcome: PostOutcome) -> None:
        self._on_outcome(self._outcome(self._started.pop(run), outcome))

    def _outcome(self, started: Started, outcome: PostOutcome) -> Outcome:
        match outcome:
            case PostTags(result=result, timings_ms=timings_ms):
                attempts, now = started.attempt, time.time()
                return Tagged(started, result.measured(timings_ms, attempts=attempts, ended_at=now))
            case PostFailed(failure=failure, timings_ms=timings_ms):
                if self._retry.tries_again(failure, started.attempt):
                    delay_s = self._retry.delay_s(started.attempt, self._rng)
                    return Retry(started, failure, delay_s, timings_ms)
                return Dead(started, failure, timings_ms)

    def _release_all(self) -> None:
        for run in self._runs:
            self._runs.drop(run)
            self._on_outcome(Released(self._started.pop(run)))

    def _report_workers(self) -> None:
        now = time.monotonic()
        if now < self._worker_status_due:
            return
        self._worker_status_due = now + _WORKER_STATUS_EVERY_S
        self._status.bundle = self._pool.bundle or self._status.bundle
        views = [asdict(view) for view in self._pool.workers]
        self._status.workers = [{**view, "rss_mb": _rss_mb(view["pid"])} for view in views]


def _rss_mb(pid: int | None) -> float | None:
    """Return the memory of a process, or None if it is gone."""
    if pid is None:
        return None
    try:
        return round(psutil.Process(pid).memory_info().rss / 2**20, 1)
    except (psutil.Error, OSError):  # OSError: no descriptors are left, for now
        return None
