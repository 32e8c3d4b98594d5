"""One step of a post's plan."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import WorkerDied
from workers.protocol import DecodeTask, Failure, FetchTask, RecallTask, Task

NO_SLOT = -1
"""Slot of a `DecodeTask` before its executor has assigned one."""


@dataclass(frozen=True, slots=True)
class Step:
    """One task of the plan and the media file it belongs to."""

    task: Task
    media_index: int

    @property
    def stage(self) -> str:
        """``recall``, ``fetch``, ``decode`` or ``extract``."""
        if isinstance(self.task, RecallTask):
            return "recall"
        if isinstance(self.task, FetchTask):
            return "fetch"
        return "decode" if isinstance(self.task, DecodeTask) else "extract"

    @property
    def holds(self) -> str | None:
        """The downloaded file that it needs; nobody needs it once no step holds it."""
        if isinstance(self.task, (RecallTask, DecodeTask)):
            return self.task.path or None
        return None


def costs_attempt(step: Step, failure: Failure) -> bool:
    """Whether a step's failure says more about its worker than about its media file."""
    if step.stage == "recall":
        return False  # the post goes on as if nothing were known
    return is_worker_death(failure) or (failure.retryable and step.stage in ("decode", "extract"))


def is_worker_death(failure: Failure) -> bool:
    """Whether a step failed because its worker died, which costs the post an attempt."""
    return failure.type == WorkerDied.__name__
