"""One post being worked on, on any pool: the one executor of a post's plan.

The King, the HTTP server, the offline scripts and ``insighttag tag`` all run posts through
`PostRuns`, so that a post gets the same features, tags and failures on every path. A run is one
attempt; `common.retry.RetryPolicy` decides about the next.

What fails inside a post costs that modality. What kills a worker costs the attempt, unless it is
the last one: then it costs the modality too.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import structlog

from common.errors import (
    DeadlineExceeded,
    FeatureError,
    PermanentError,
    RetryableError,
    TaggingError,
)
from common.post import Failure, Features, Tags
from common.retry import RetryPolicy
from workers.fetch.spool import is_url
from workers.plan import PostPlan, Step
from workers.protocol import (
    STAGES,
    Decoded,
    Fetched,
    FetchTask,
    FuseTask,
    Result,
    TaskDone,
    TaskFailed,
    TaskPool,
)

_NO_MEDIA = -1  # media index of the fusion's step

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class PostTags:
    """Features and tags of a post.

    Attributes:
        fused: The tags; None where the runs do not fuse.
        timings_ms: Stage -> milliseconds that workers spent; ``total`` is by the clock.
    """

    features: Features
    fused: Tags | None
    timings_ms: Mapping[str, int]

    @property
    def tags(self) -> Tags:
        """Return the tags.

        Raises:
            RuntimeError: The runs do not fuse.
        """
        if self.fused is None:
            raise RuntimeError(f"post {self.features.post_id}: the fusion was left out")
        return self.fused


@dataclass(frozen=True, slots=True)
class PostFailed:
    """A failed attempt.

    Attributes:
        failure: For documents and logs.
        error: The same for a caller in this process.
    """

    failure: Failure
    error: TaggingError
    timings_ms: Mapping[str, int]


PostOutcome: TypeAlias = PostTags | PostFailed


@dataclass(slots=True, eq=False)
class PostRun:
    """One attempt at one post.

    Attributes:
        plan: Of this attempt.
        deadline: `time.monotonic` past which the attempt has failed.
        limit: The same for a person, for example ``king.post_deadline_s (300 s)``.
        last: No attempt follows: a worker's death costs a modality and not the attempt.
        on_end: Called once, when the run is off the pool; not for a run that was dropped.
        began: `time.monotonic` that the total time counts from.
        tasks: Task ID -> step, of the tasks on the pool.
        downloads: Files that this run has to delete.
        seconds: Stage -> time that workers spent.
    """

    plan: PostPlan
    deadline: float
    limit: str
    last: bool
    on_end: Callable[[PostRun, PostOutcome], None]
    priority: int = 0
    began: float = field(default_factory=time.monotonic)
    features: Features | None = None
    tasks: dict[int, Step] = field(default_factory=dict)
    downloads: set[str] = field(default_factory=set)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def stage(self) -> str:
        """Return the earliest stage that the post waits for."""
        stages = [step.task.stage for step in self.tasks.values()]
        return min(stages, key=STAGES.index, default="fuse")

    @property
    def timings_ms(self) -> dict[str, int]:
        by_stage = {stage: round(seconds * 1000) for stage, seconds in self.seconds.items()}
        return {**by_stage, "total": round((time.monotonic() - self.began) * 1000)}


class PostRuns:
    """The posts on a pool, for the one thread that owns it."""

    def __init__(
        self,
        pool: TaskPool,
        *,
        fuse: bool = True,
        open_local: Callable[[str], Fetched] | None = None,
    ) -> None:
        """Take a pool; nothing runs yet.

        Args:
            pool: Of this thread.
            fuse: Follow features by tags.
            open_local: Opens a source that is a path, in place, or raises `PermanentError`; None
                leaves every source to the pool's downloader, which refuses paths.
        """
        self._pool = pool
        self._fuse = fuse
        self._open_local = open_local
        self._runs: set[PostRun] = set()
        self._by_task: dict[int, PostRun] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[PostRun]:
        return iter(list(self._runs))

    def begin(self, run: PostRun) -> None:
        self._runs.add(run)
        self._submit(run, run.plan.start())
        self._advance(run)  # a post without text and media has no step to wait for

    def drop(self, run: PostRun) -> None:
        """Take a run off the pool without an outcome."""
        self._runs.discard(run)
        for task_id in run.tasks:
            if self._by_task.pop(task_id, None) is not None:
                self._pool.cancel(task_id)
        run.tasks.clear()
        while run.downloads:
            _delete(run.downloads.pop())

    def expire(self) -> None:
        now = time.monotonic()
        for run in self:
            if run.deadline <= now:
                self._expire(run)

    def handle(self, event: TaskDone | TaskFailed) -> None:
        """Take a task's end, and put the tasks that follow from it on the pool."""
        run = self._by_task.pop(event.task_id, None)
        if run is None:  # its run ended while this event was on its way
            if isinstance(event, TaskDone):
                if isinstance(event.result, Fetched):
                    _delete(event.result.path)
                self._release(event.result)
            return
        if isinstance(event, TaskFailed) and run.deadline <= time.monotonic():
            self._expire(run)  # tasks have the same deadline: the worker was only quicker to say so
            return
        step = run.tasks.pop(event.task_id)
        if isinstance(event, TaskDone):
            run.seconds[step.task.stage] += event.seconds
            self._done(run, step, event.result)
        else:
            self._failed(run, step, event.failure)

    def _expire(self, run: PostRun) -> None:
        message = f"the post ran past {run.limit}"
        failure = Failure(run.stage, DeadlineExceeded.__name__, message, retryable=True)
        self._fail(run, failure, DeadlineExceeded(message))

    def _done(self, run: PostRun, step: Step, result: Result) -> None:
        if isinstance(result, Tags) and run.features is not None:
            self._end(run, PostTags(run.features, result, run.timings_ms))
            return
        if isinstance(result, Fetched):
            run.downloads.add(result.path)
        self._follow(run, step, run.plan.done(step, result))
        # Only now: the slot must not be free before the tasks that read it are on the pool.
        self._release(result)
        self._advance(run)

    def _failed(self, run: PostRun, step: Step, failure: Failure) -> None:
        costs_attempt = not run.last and RetryPolicy.costs_attempt(step.task.stage, failure)
        if isinstance(step.task, FuseTask) or costs_attempt:
            kind = RetryableError if failure.retryable else FeatureError
            self._fail(run, failure, kind(failure.message))
            return
        self._follow(run, step, run.plan.failed(step, failure))
        self._advance(run)

    def _follow(self, run: PostRun, ended: Step, follow: Sequence[Step]) -> None:
        """Submit the steps that follow; delete a download that none of them needs."""
        if ended.path in run.downloads and all(step.path != ended.path for step in follow):
            run.downloads.discard(ended.path)
            _delete(ended.path)
        self._submit(run, follow)

    def _submit(self, run: PostRun, steps: Sequence[Step]) -> None:
        todo = deque(steps)
        while todo:
            step = todo.popleft()
            source = step.task.media.source if isinstance(step.task, FetchTask) else None
            if source is not None and self._open_local is not None and not is_url(source):
                try:
                    todo += run.plan.done(step, self._open_local(source))
                except PermanentError as error:
                    todo += run.plan.failed(step, Failure.of("fetch", error))
                continue
            task_id = self._pool.submit(step.task, deadline=run.deadline, priority=run.priority)
            run.tasks[task_id] = step
            self._by_task[task_id] = run

    def _advance(self, run: PostRun) -> None:
        """Fuse the features, once every step of the plan has ended."""
        if run.tasks or not run.plan.finished:
            return
        try:
            run.features = run.plan.features()
        except TaggingError as error:
            retryable = isinstance(error, RetryableError)
            self._fail(run, Failure.of(error.stage, error, retryable=retryable), error)
        except ValueError as mismatch:  # arrays of one stream that differ in width
            misfit = FeatureError(f"the features do not fit together: {mismatch}")
            self._fail(run, Failure.of("extract", misfit), misfit)
        else:
            if self._fuse:
                self._submit(run, [Step(FuseTask(run.features), _NO_MEDIA)])
            else:
                self._end(run, PostTags(run.features, None, run.timings_ms))

    def _fail(self, run: PostRun, failure: Failure, error: TaggingError) -> None:
        error.stage = failure.stage
        self._end(run, PostFailed(failure, error, run.timings_ms))

    def _end(self, run: PostRun, outcome: PostOutcome) -> None:
        self.drop(run)
        run.on_end(run, outcome)

    def _release(self, result: Result) -> None:
        if isinstance(result, Decoded) and result.parts:
            self._pool.release(result.parts[0].ref.slot)


def _delete(path: str) -> None:
    """Delete a download, which may be gone already."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        _log.warning("workers.spool_file_left", error=error.strerror)
