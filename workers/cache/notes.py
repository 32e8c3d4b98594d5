"""What the feature cache may learn from a task that has ended."""

from __future__ import annotations

from workers.protocol import (
    CacheUpdate,
    Decoded,
    DecodeTask,
    Failure,
    Fetched,
    FetchTask,
    Result,
    Task,
)


def update_of(task: Task, outcome: Result | Failure) -> CacheUpdate | None:
    """What the cache may learn of a media file from a task's outcome."""
    if isinstance(task, FetchTask) and isinstance(outcome, Fetched) and outcome.sha256:
        return CacheUpdate(outcome.sha256, source=task.media.source)
    if not isinstance(task, DecodeTask) or not task.sha256:
        return None
    if isinstance(outcome, Decoded):
        parts = tuple(dict.fromkeys(part.kind for part in outcome.parts))
        return CacheUpdate(task.sha256, kind=task.kind, parts=parts, failures=outcome.failures)
    if isinstance(outcome, Failure) and not outcome.retryable:
        return CacheUpdate(task.sha256, kind=task.kind, failure=outcome)
    return None
