"""The dispatch thread: it alone touches the worker pool.

Each post is a `PostPlan` whose steps run on the pool. What fails inside a post costs that
modality; what kills a worker costs the attempt, unless it is the last one.
"""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import structlog

from common.errors import FeatureError, RetryableError, TaggingError
from config.settings import Settings
from king.jobs import Dead, Outcome, Released, Retry, Started, Tagged
from king.status import Status
from workers.plan import PostPlan, Step, costs_attempt
from workers.pool.events import (
    BundleChanged,
    PoolEvent,
    PoolReady,
    PoolRefused,
    TaskDone,
    TaskFailed,
    TaskPool,
)
from workers.protocol import Decoded, Failure, Features, Fetched, FuseTask, Tags

_POLL_S = 0.25
_LOOK_EVERY_S = 1.0

log = structlog.get_logger()


@dataclass(slots=True)
class _Flight:
    """One post on the pool.

    Attributes:
        deadline: `time.monotonic` past which the attempt has failed.
        tasks: Task ID ─► step, for what runs.
        seconds: Stage ─► time that workers spent.
    """

    started: Started
    plan: PostPlan
    deadline: float
    began: float = field(default_factory=time.monotonic)
    tasks: dict[int, Step] = field(default_factory=dict)
    fusing: int | None = None
    features: Features | None = None
    failures: list[Failure] = field(default_factory=list)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def stage(self) -> str:
        """What the post is waiting for, the earliest stage first."""
        stages = {step.stage for step in self.tasks.values()}
        order = ("recall", "fetch", "decode", "extract")
        return next((s for s in order if s in stages), "fuse")

    @property
    def timings_ms(self) -> dict[str, int]:
        """Milliseconds of work by stage, and of the whole attempt by the clock."""
        total_s = time.monotonic() - self.began
        by_stage = {stage: round(seconds * 1000) for stage, seconds in self.seconds.items()}
        return {**by_stage, "total": round(total_s * 1000)}


class Dispatcher:
    """Runs begun posts on the pool and says what became of them."""

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
        self._flights: dict[str, _Flight] = {}
        self._by_task: dict[int, _Flight] = {}
        self._giving_back = False
        self._stopping = threading.Event()
        self._look_due = 0.0

    # For the other threads -------------------------------------------------------------------

    def start(self, started: Started) -> None:
        """Work on a post; their number is bounded by ``broker.prefetch``."""
        self._inbox.append(started)
        self._pool.wake()

    def give_back(self) -> None:
        """Break off every post: a drain has run out of time."""
        self._giving_back = True
        self._pool.wake()

    def stop(self) -> None:
        """Let `run` stop the pool and return."""
        self._stopping.set()
        self._pool.wake()

    # The thread ------------------------------------------------------------------------------

    def run(self) -> None:
        """Drive the pool until `stop`."""
        try:
            self._pool.start()
            while not self._stopping.is_set():
                self._status.tick("dispatch")
                self._take()
                for event in self._pool.poll(_POLL_S):
                    self._handle(event)
                self._expire()
                self._look()
        finally:
            self._pool.stop(self._settings.workers.shutdown_timeout_s)

    def _take(self) -> None:
        while self._inbox:
            started = self._inbox.popleft()
            plan = PostPlan(
                started.post,
                self._settings.features,
                max_media=self._settings.fetch.max_media,
                cache=self._settings.cache.url is not None,
            )
            deadline = time.monotonic() + self._settings.king.post_deadline_s
            flight = _Flight(started, plan, deadline)
            self._flights[started.post_id] = flight
            if plan.media_left_out:
                log.warning(
                    "king.media_left_out", post_id=started.post_id, number=plan.media_left_out
                )
            self._submit(flight, plan.start())
            self._advance(flight)  # a post without text and media has no step to wait for
        if self._giving_back:
            for flight in list(self._flights.values()):
                self._end(flight, Released(flight.started))

    def _submit(self, flight: _Flight, steps: Sequence[Step]) -> None:
        for step in steps:
            task_id = self._pool.submit(
                step.task, deadline=flight.deadline, priority=flight.started.priority
            )
            flight.tasks[task_id] = step
            self._by_task[task_id] = flight

    def _handle(self, event: PoolEvent) -> None:
        if isinstance(event, TaskDone):
            self._done(event)
        elif isinstance(event, TaskFailed):
            self._failed(event)
        elif isinstance(event, PoolReady):
            self._status.bundle = self._pool.bundle
            self._status.ready.set()
            log.info("king.workers_ready", bundle=self._status.bundle)
        elif isinstance(event, BundleChanged):
            self._status.bundle = (event.name, event.version)
            log.info("king.bundle_changed", name=event.name, version=event.version)
        elif isinstance(event, PoolRefused):
            self._status.refused = event.message

    def _done(self, event: TaskDone) -> None:
        flight = self._by_task.pop(event.task_id, None)
        result = event.result
        if flight is None:  # its post ended while this event was on its way
            if isinstance(result, Fetched):
                _delete(result.path)
            self._release(result)
            return
        if event.task_id == flight.fusing:
            flight.seconds["fuse"] += event.seconds
            self._tagged(flight, result)
            return
        step = flight.tasks.pop(event.task_id)
        flight.seconds[step.stage] += event.seconds
        follow = flight.plan.done(step, result)
        _let_go(step, follow)
        self._submit(flight, follow)
        # Only now: the slot must not be free before the tasks that read it are known.
        self._release(result)
        self._advance(flight)

    def _release(self, result: object) -> None:
        if isinstance(result, Decoded) and result.parts:
            self._pool.release(result.parts[0].ref.slot)

    def _failed(self, event: TaskFailed) -> None:
        flight = self._by_task.pop(event.task_id, None)
        if flight is None:
            return
        failure = event.failure
        if event.task_id == flight.fusing:
            self._attempt_failed(flight, failure)
            return
        step = flight.tasks.pop(event.task_id)
        if costs_attempt(step, failure) and not self._last(flight):
            _let_go(step)
            self._attempt_failed(flight, failure)
            return
        if step.stage != "recall":
            flight.failures.append(failure)
        follow = flight.plan.failed(step, failure)
        _let_go(step, follow)
        self._submit(flight, follow)
        self._advance(flight)

    def _advance(self, flight: _Flight) -> None:
        if not flight.plan.finished or flight.tasks:
            return
        try:
            flight.features = flight.plan.features()
        except TaggingError as error:
            stage = flight.failures[0].stage if flight.failures else "load"
            retryable = isinstance(error, RetryableError)
            self._attempt_failed(flight, Failure.of(stage, error, retryable=retryable))
            return
        except ValueError as error:  # arrays of one modality that do not fit together
            wrong = FeatureError(f"the features do not fit together: {error}")
            self._attempt_failed(flight, Failure.of("extract", wrong))
            return
        flight.fusing = self._pool.submit(
            FuseTask(flight.features),
            deadline=flight.deadline,
            priority=flight.started.priority,
        )
        self._by_task[flight.fusing] = flight

    # Ends ------------------------------------------------------------------------------------

    def _tagged(self, flight: _Flight, result: object) -> None:
        if not isinstance(result, Tags) or flight.features is None:
            error = FeatureError(f"the fusion gave {type(result).__name__}, not tags")
            failure = Failure.of("fuse", error)
            self._attempt_failed(flight, failure)
            return
        outcome = Tagged(
            started=flight.started,
            tags=result,
            statuses=flight.features.statuses,
            failures=flight.features.failures,
            timings_ms=flight.timings_ms,
        )
        self._end(flight, outcome)

    def _attempt_failed(self, flight: _Flight, failure: Failure) -> None:
        timings_ms = flight.timings_ms
        if self._retry.tries_again(failure, flight.started.attempt):
            due_at = time.time() + self._retry.delay_s(flight.started.attempt, self._rng)
            self._end(flight, Retry(flight.started, failure, due_at, timings_ms))
        else:
            self._end(flight, Dead(flight.started, failure, timings_ms))

    def _end(self, flight: _Flight, outcome: Outcome) -> None:
        del self._flights[flight.started.post_id]
        open_tasks = [*flight.tasks, *([flight.fusing] if flight.fusing is not None else [])]
        for task_id in open_tasks:
            if self._by_task.pop(task_id, None) is not None:
                self._pool.cancel(task_id)
        for step in flight.tasks.values():
            _let_go(step)
        self._on_outcome(outcome)

    def _last(self, flight: _Flight) -> bool:
        return self._retry.is_last(flight.started.attempt)

    def _expire(self) -> None:
        now = time.monotonic()
        for flight in [f for f in self._flights.values() if f.deadline <= now]:
            limit_s = self._settings.king.post_deadline_s
            message = f"the post ran past king.post_deadline_s ({limit_s:g} s)"
            failure = Failure(flight.stage, "DeadlineExceeded", message, retryable=True)
            self._attempt_failed(flight, failure)

    # Health ----------------------------------------------------------------------------------

    def _look(self) -> None:
        now = time.monotonic()
        if now < self._look_due:
            return
        self._look_due = now + _LOOK_EVERY_S
        self._status.bundle = self._pool.bundle or self._status.bundle
        views = [asdict(view) for view in self._pool.workers]
        self._status.workers = [{**view, "rss_mb": _rss_mb(view["pid"])} for view in views]


def _let_go(step: Step, follow: Sequence[Step] = ()) -> None:
    """Remove the file that an ended step held, unless one that follows needs it."""
    if step.path is not None and all(each.path != step.path for each in follow):
        _delete(step.path)


def _delete(path: str) -> None:
    """Remove a spool file, which may be gone already."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        log.warning("king.spool_file_left", error=error.strerror)


def _rss_mb(pid: int | None) -> float | None:
    if pid is None:
        return None
    try:
        return round(psutil.Process(pid).memory_info().rss / 2**20, 1)
    except psutil.Error:
        return None
