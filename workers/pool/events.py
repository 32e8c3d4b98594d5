"""The events of the pool, its view of the workers, and the protocol `TaskPool` of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from config.settings import ExtractorName
from workers.protocol import Failure, Result, Stream, Task, WorkerRole

WorkerState: TypeAlias = Literal["waiting", "starting", "ready", "refused"]


@dataclass(frozen=True, slots=True)
class TaskDone:
    """A task's result.

    A `Fetched` file is the caller's to delete; the slot of a `Decoded` that has parts is the
    caller's to release, exactly once, even when it no longer wants the post.

    Attributes:
        seconds: The task's share of the time that its batch ran.
    """

    task_id: int
    result: Result
    seconds: float
    worker: str


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """A task failed; ``worker`` is empty when it never reached one."""

    task_id: int
    failure: Failure
    worker: str


@dataclass(frozen=True, slots=True)
class PoolReady:
    """Every worker has loaded, and the bundle fits the extractors; sent once."""


@dataclass(frozen=True, slots=True)
class PoolRefused:
    """The pool cannot work, and trying again would not help; sent once."""

    message: str


@dataclass(frozen=True, slots=True)
class BundleChanged:
    """The fusion worker now serves another bundle."""

    name: str
    version: str


PoolEvent: TypeAlias = TaskDone | TaskFailed | PoolReady | PoolRefused | BundleChanged


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker, for health and logs.

    Attributes:
        pid: None while there is no process.
        held: Tasks that it has, begun or not.
        done: Tasks that it has answered since it started.
        deaths: Number of times it died.
    """

    name: str
    role: WorkerRole
    device: str
    extractors: tuple[ExtractorName, ...]
    state: WorkerState
    pid: int | None
    held: int
    done: int
    deaths: int


class TaskPool(Protocol):
    """The workers as the King sees them; all but `wake` are for one thread."""

    @property
    def ready(self) -> bool:
        """Return True when every worker has been ready once, and none has refused."""
        ...

    @property
    def refused(self) -> str | None:
        """Return why the pool cannot work."""
        ...

    @property
    def bundle(self) -> tuple[str, str] | None:
        """Name and version of the bundle that is served."""
        ...

    @property
    def fingerprints(self) -> Mapping[Stream, str]:
        """Stream -> fingerprint of the features that the extractors give, once ready."""
        ...

    @property
    def workers(self) -> list[WorkerView]: ...

    def start(self) -> None:
        """Start every worker; returns at once."""
        ...

    def submit(self, task: Task, *, deadline: float, priority: int = 0) -> int:
        """Queue a task and return its ID; ``deadline`` is `time.monotonic()`."""
        ...

    def cancel(self, task_id: int) -> None:
        """Forget a task: it has no event, and what it holds is freed."""
        ...

    def release(self, slot: int) -> None:
        """Say that no more tasks will refer to a decoded slot."""
        ...

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        """Drive the pool; returns with the first events, when woken, or after ``timeout_s``."""
        ...

    def wake(self) -> None:
        """Interrupt `poll`; from any thread."""
        ...

    def stop(self, timeout_s: float) -> None:
        """Let workers finish what they have begun, then kill what is left."""
        ...
