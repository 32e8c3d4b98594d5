"""Posts on their way through a pool: which steps of which post run, and what becomes of it.

For the one thread that owns the pool. What fails inside a post costs that modality. What kills a
worker costs the attempt: the post is begun once more, and then it costs the modality.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from common.errors import (
    DeadlineExceeded,
    FeatureError,
    PermanentError,
    RetryableError,
    TaggingError,
)
from workers.fetch.sources import is_url, local_file
from workers.plan import PostPlan, Step, costs_attempt
from workers.pool.events import TaskDone, TaskFailed, TaskPool
from workers.protocol import (
    Decoded,
    Failure,
    Features,
    Fetched,
    FetchTask,
    FuseTask,
    Tags,
)

_ATTEMPTS = 2

_log = structlog.get_logger()


@dataclass(frozen=True)
class Ran:
    """What became of a post.

    Attributes:
        tags: None where there is no fusion.
        timings_ms: Stage ─► milliseconds that workers spent; ``total`` is by the clock.
    """

    features: Features
    tags: Tags | None
    timings_ms: Mapping[str, int]


@dataclass(slots=True, eq=False)
class Walk:
    """One post on the pool.

    Attributes:
        plan: Of the present attempt.
        limit_s: How long the post may take, from `began` on (`time.monotonic`).
        attempt: 1 for the first.
        tasks: Task ID ─► step, for what runs.
        downloads: Files that are ours to delete.
        seconds: Stage ─► time that workers spent.
    """

    plan: PostPlan
    limit_s: float
    future: Future[Ran] = field(default_factory=Future)
    began: float = field(default_factory=time.monotonic)
    attempt: int = 1
    tasks: dict[int, Step] = field(default_factory=dict)
    fusing: int | None = None
    features: Features | None = None
    downloads: set[str] = field(default_factory=set)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def deadline(self) -> float:
        """`time.monotonic` past which the post has failed."""
        return self.began + self.limit_s

    @property
    def timings_ms(self) -> dict[str, int]:
        """Milliseconds of work by stage, and of the whole by the clock."""
        by_stage = {stage: round(seconds * 1000) for stage, seconds in self.seconds.items()}
        return {**by_stage, "total": round((time.monotonic() - self.began) * 1000)}

    def end(self, outcome: Ran | TaggingError) -> None:
        """Tell who waits, unless he has cancelled."""
        if not self.future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Ran):
            self.future.set_result(outcome)
        else:
            self.future.set_exception(outcome)


class Walks:
    """The posts on a pool."""

    def __init__(
        self,
        pool: TaskPool,
        *,
        fuse: bool,
        local_root: Path | None,
        replan: Callable[[PostPlan], PostPlan],
        on_end: Callable[[Walk, Ran | TaggingError], None],
    ) -> None:
        """Nothing runs yet.

        Args:
            pool: Of this thread.
            fuse: Whether features are followed by tags.
            local_root: The only folder whose files may be read in place; None: any.
            replan: A fresh plan of the same post, for the second attempt.
            on_end: Called once for each post, when it is off the pool.
        """
        self._pool = pool
        self._fuse = fuse
        self._local_root = local_root
        self._replan = replan
        self._on_end = on_end
        self._walks: set[Walk] = set()
        self._by_task: dict[int, Walk] = {}

    def begin(self, walk: Walk) -> None:
        """Start a post."""
        self._walks.add(walk)
        self._submit(walk, walk.plan.start())
        self._advance(walk)  # a post without text and media has no step to wait for

    def expire(self) -> None:
        """End what was cancelled, and what runs past its deadline."""
        now = time.monotonic()
        for walk in list(self._walks):
            if walk.future.cancelled():
                self._end(walk, RetryableError("cancelled"))
            elif walk.deadline <= now:
                self._end(walk, DeadlineExceeded(f"the post ran past {walk.limit_s:g} s"))

    def end_all(self, error: TaggingError) -> None:
        """End every post with this error."""
        for walk in list(self._walks):
            self._end(walk, error)

    def done(self, event: TaskDone) -> None:
        """Take a task's result."""
        walk = self._by_task.pop(event.task_id, None)
        result = event.result
        if walk is None:  # its post ended while this event was on its way
            if isinstance(result, Fetched):
                _delete(result.path)
            self._release(result)
            return
        if event.task_id == walk.fusing:
            walk.seconds["fuse"] += event.seconds
            self._tagged(walk, result)
            return
        step = walk.tasks.pop(event.task_id)
        walk.seconds[step.stage] += event.seconds
        if isinstance(result, Fetched):
            walk.downloads.add(result.path)
        follow = walk.plan.done(step, result)
        self._clean(walk, step, follow)
        self._submit(walk, follow)
        # Only now: the slot must not be free before the tasks that read it are known.
        self._release(result)
        self._advance(walk)

    def failed(self, event: TaskFailed) -> None:
        """Take a task's failure."""
        walk = self._by_task.pop(event.task_id, None)
        if walk is None:
            return
        if event.task_id == walk.fusing:
            self._not_fused(walk, event.failure)
            return
        step = walk.tasks.pop(event.task_id)
        if costs_attempt(step, event.failure) and walk.attempt < _ATTEMPTS:
            self._begin_again(walk)
            return
        follow = walk.plan.failed(step, event.failure)
        self._clean(walk, step, follow)
        self._submit(walk, follow)
        self._advance(walk)

    # Parts ------------------------------------------------------------------------------------

    def _submit(self, walk: Walk, steps: Sequence[Step]) -> None:
        todo = deque(steps)
        while todo:
            step = todo.popleft()
            if isinstance(step.task, FetchTask) and not is_url(step.task.media.source):
                todo.extend(self._in_place(walk.plan, step, step.task.media.source))
                continue
            task_id = self._pool.submit(step.task, deadline=walk.deadline)
            walk.tasks[task_id] = step
            self._by_task[task_id] = walk

    def _in_place(self, plan: PostPlan, step: Step, source: str) -> list[Step]:
        try:
            return plan.done(step, local_file(source, root=self._local_root))
        except PermanentError as error:
            return plan.failed(step, Failure.of("fetch", error))

    def _begin_again(self, walk: Walk) -> None:
        _log.info("runner.begun_again", post_id=walk.plan.post.post_id)
        self._drop_tasks(walk)
        walk.attempt += 1
        walk.plan = self._replan(walk.plan)
        self.begin(walk)

    def _advance(self, walk: Walk) -> None:
        if not walk.plan.finished or walk.tasks:
            return
        try:
            features = walk.plan.features()
        except TaggingError as error:
            self._end(walk, error)
            return
        except ValueError as error:  # arrays of one modality that do not fit together
            self._end(walk, FeatureError(f"the features do not fit together: {error}"))
            return
        walk.features = features
        if self._fuse:
            self._tag(walk, features)
        else:
            self._end(walk, Ran(features, None, walk.timings_ms))

    def _tag(self, walk: Walk, features: Features) -> None:
        walk.fusing = self._pool.submit(FuseTask(features), deadline=walk.deadline)
        self._by_task[walk.fusing] = walk

    def _tagged(self, walk: Walk, result: object) -> None:
        if isinstance(result, Tags) and walk.features is not None:
            self._end(walk, Ran(walk.features, result, walk.timings_ms))
        else:
            self._end(walk, FeatureError(f"the fusion gave {type(result).__name__}, not tags"))

    def _not_fused(self, walk: Walk, failure: Failure) -> None:
        walk.fusing = None
        if failure.retryable and walk.attempt < _ATTEMPTS and walk.features is not None:
            walk.attempt += 1
            self._tag(walk, walk.features)
            return
        kind = RetryableError if failure.retryable else FeatureError
        self._end(walk, kind(failure.message))

    def _release(self, result: object) -> None:
        if isinstance(result, Decoded) and result.parts:
            self._pool.release(result.parts[0].ref.slot)

    def _end(self, walk: Walk, outcome: Ran | TaggingError) -> None:
        self._walks.discard(walk)
        self._drop_tasks(walk)
        self._on_end(walk, outcome)

    def _drop_tasks(self, walk: Walk) -> None:
        fusing = [walk.fusing] if walk.fusing is not None else []
        for task_id in [*walk.tasks, *fusing]:
            if self._by_task.pop(task_id, None) is not None:
                self._pool.cancel(task_id)
        walk.tasks.clear()
        walk.fusing = None
        while walk.downloads:
            _delete(walk.downloads.pop())

    def _clean(self, walk: Walk, step: Step, follow: Sequence[Step]) -> None:
        """A download is of no more use once no step holds it; a file read in place stays."""
        held = step.path
        if held in walk.downloads and all(each.path != held for each in follow):
            walk.downloads.discard(held)
            _delete(held)


def _delete(path: str) -> None:
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        _log.warning("runner.spool_file_left", error=error.strerror)
