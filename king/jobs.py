"""The values between the King and its store: claims, verdicts, outcomes and jobs.

A job is the record of a post that is being worked on, in the `jobs` collection:

    (none) --claim--> running --tagged--> (none)
                      |  ^ '--permanent, or exhausted--> dead --replay--> queued
        retryable ----'  '--claim-- queued <--due-- waiting

``due_at`` is the time at which a job must be looked at when nothing happened to it before: a
waiting job is published again, the message of a queued one was lost by the broker, a running one
has lost its King. Times are seconds since the epoch as numbers (see `king.store.client`).
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from common.post import Failure, Post, TagResult
from common.processes import process_identity
from common.retry import RetryPolicy
from king.messages import PostMessage

JobState: TypeAlias = Literal["running", "waiting", "queued", "dead"]
JOB_STATES: tuple[JobState, ...] = ("running", "waiting", "queued", "dead")
OPEN_STATES: tuple[JobState, ...] = ("waiting", "queued", "running")

# A published retry that nobody has begun after this time is published again: its message was lost.
# At half, a long queue makes second messages of posts that only wait; at double, a lost one costs
# its post half an hour.
QUEUED_FOR_S = 900.0

_YEAR_10000_S = 253_402_300_800  # Python knows no date behind it

Bundle: TypeAlias = tuple[str, str]
"""Name and version of what is deployed."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A delivered message that asks to begin its post; the payload is its body as text."""

    message: PostMessage
    payload: str
    redelivered: bool = False
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """Verdict: the post is loaded from the document of this ID, and its attempt is recorded.

    The first attempt is 1; its message came at ``received_at``, `time.monotonic()`, with the
    publisher's ``traceparent`` if it had one.
    """

    post: Post
    document_id: Any
    attempt: int
    priority: int = 0
    force: bool = False
    payload: str = ""
    received_at: float = 0.0
    traceparent: str | None = None

    @property
    def post_id(self) -> str:
        """Return the post's ID as its message wrote it."""
        return self.post.post_id


@dataclass(frozen=True, slots=True)
class Settled:
    """Verdict: nothing to do, the message is acknowledged."""

    post_id: str
    reason: Literal["tagged", "waiting", "dead"]


@dataclass(frozen=True, slots=True)
class HeldElsewhere:
    """Verdict: another King runs the post; look again at ``until`` (seconds since the epoch)."""

    post_id: str
    until: float


@dataclass(frozen=True, slots=True)
class NoRoom:
    """Verdict: this King has as many such posts in work as it can use; nothing is recorded."""

    post_id: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """Verdict: the claim was refused and is a dead letter now."""

    post_id: str
    failure: Failure
    attempts: int

    def result(self, context: ClaimContext) -> TagResult:
        """Return the result that is written for the post."""
        result = TagResult.failed(self.post_id, context.bundle, self.failure)
        return result.measured({}, attempts=self.attempts, ended_at=context.now)


@dataclass(frozen=True, slots=True)
class WriteRefused:
    """Verdict or outcome: the database refused to write this job; the post waits, no other does."""

    post_id: str
    reason: str


Verdict: TypeAlias = Started | Settled | HeldElsewhere | NoRoom | Rejected | WriteRefused


@dataclass(frozen=True, slots=True)
class Tagged:
    """Outcome: the attempt gave tags.

    A write is repeated when its reply was lost: the time in the result makes it the same write.
    """

    started: Started
    result: TagResult

    @property
    def timings_ms(self) -> Mapping[str, int]:
        return self.result.timings_ms or {}


@dataclass(frozen=True, slots=True)
class Superseded:
    """The outcome of a `Tagged` whose write changed nothing.

    A bundle of a later ``version`` has tagged the post, or the post is gone (None).
    """

    started: Started
    version: str | None
    timings_ms: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Retry:
    """Outcome: the attempt failed; the next is due after ``delay_s``."""

    started: Started
    failure: Failure
    delay_s: float
    timings_ms: Mapping[str, int] = field(default_factory=dict)
    ended_at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class Dead:
    """Outcome: the attempt failed for good."""

    started: Started
    failure: Failure
    timings_ms: Mapping[str, int] = field(default_factory=dict)
    ended_at: float = field(default_factory=time.time)

    def result(self, bundle: Bundle) -> TagResult:
        """Return the result that is written for the post."""
        result = TagResult.failed(self.started.post_id, bundle, self.failure)
        attempts = self.started.attempt
        return result.measured(self.timings_ms, attempts=attempts, ended_at=self.ended_at)


@dataclass(frozen=True, slots=True)
class Released:
    """Outcome: a drain broke the attempt off; it does not count, and its message is requeued."""

    started: Started


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Outcome of a message that names no post."""

    payload: str
    failure: Failure


Outcome: TypeAlias = Tagged | Superseded | Retry | Dead | Released | Unreadable


@dataclass(frozen=True, slots=True)
class Job:
    """One document of the jobs collection; times are seconds since the epoch.

    The ID is the post's, or ``message:<digest>`` for a message that names none. The last error is
    ``{stage, type, message}`` of the latest failed attempt.
    """

    post_id: str
    state: JobState
    attempts: int = 0
    due_at: float = 0.0
    last_error: Mapping[str, str] | None = None
    payload: str = ""
    priority: int = 0
    force: bool = False
    first_at: float = 0.0
    updated_at: float = 0.0
    owner: str | None = None
    lease_until: float = 0.0

    @property
    def message(self) -> PostMessage:
        """Return the message that asks for this post again."""
        return PostMessage(self.post_id, priority=self.priority, force=self.force)

    @property
    def names_a_post(self) -> bool:
        """Return False for a message that could not be read."""
        return not (self.last_error and self.last_error.get("stage") == "message")

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Job:
        """Read a document; a key that is absent or of another type takes its default."""
        error = document.get("last_error")
        last_error = {str(k): str(v) for k, v in error.items()} if isinstance(error, dict) else None
        state, owner = document.get("state"), document.get("owner")
        return cls(
            post_id=str(document.get("_id")),
            state=state if state in JOB_STATES else "dead",
            attempts=int(number(document.get("attempts"))),
            due_at=number(document.get("due_at")),
            last_error=last_error,
            payload=str(document.get("payload") or ""),
            priority=int(number(document.get("priority"))),
            force=bool(document.get("force")),
            first_at=number(document.get("first_at")),
            updated_at=number(document.get("updated_at")),
            owner=str(owner) if owner else None,
            lease_until=number(document.get("lease_until")),
        )

    def as_document(self) -> dict[str, Any]:
        """Return the document of a new job."""
        content = asdict(self)
        return {"_id": content.pop("post_id"), **content}


def message_key(payload: str) -> str:
    """Return the ID of the dead letter of an unreadable message: the same for the same message."""
    return "message:" + hashlib.sha256(payload.encode("utf-8", "replace")).hexdigest()[:24]


def number(value: object) -> float:
    """Return a stored count or time; 0 for anything else, also for a date past the year 9999."""
    if isinstance(value, (int, float)) and abs(value) < _YEAR_10000_S:  # NaN is not
        return float(value)
    return 0.0


@dataclass(frozen=True, slots=True)
class ClaimContext:
    """The King that works on jobs, with its rules; a claim holds for ``lease_s`` without renewal.

    ``now`` is the time of the database, which the Kings of all hosts share. ``is_dead`` returns
    True when the King of a name is dead for certain, whatever its lease. ``admits`` returns False
    for a post that must not begin now; it may be asked again for one that it has admitted.
    """

    owner: str
    bundle: Bundle
    now: float
    retry: RetryPolicy
    lease_s: float = 60.0
    is_dead: Callable[[str], bool] = lambda _owner: False
    admits: Callable[[Post], bool] = lambda _post: True

    def waits(self, job: Job) -> bool:
        """Return True for a job whose next attempt is not due.

        One further away than any delay was written while the clock was ahead, and is due.
        """
        return job.state == "waiting" and 0 < job.due_at - self.now <= self.retry.max_s

    @property
    def lease(self) -> dict[str, Any]:
        """Return the fields of a job that name its holder and the end of its lease."""
        until = round(self.now + self.lease_s, 3)
        # The lease ends first, so that another King that is asked may take over. Only a job that
        # nobody asks for even then (its message is lost) is published again.
        due_at = round(self.now + 2 * self.lease_s, 3)
        return {"owner": self.owner, "lease_until": until, "due_at": due_at}


class PostStore(Protocol):
    """The store as the store thread uses it; see `king.store.store.Store` for the promises."""

    @property
    def url(self) -> str: ...
    @property
    def now(self) -> float: ...
    def connect(self) -> None: ...
    def begin(self, claims: Sequence[Claim], context: ClaimContext) -> list[Verdict]: ...
    def finish(
        self, outcomes: Sequence[Outcome], context: ClaimContext
    ) -> Sequence[Outcome | WriteRefused]: ...
    def renew(self, post_ids: Sequence[str], context: ClaimContext) -> None: ...
    def claim_due(self, context: ClaimContext, limit: int) -> list[Job]: ...
    def published(self, post_ids: Sequence[str], context: ClaimContext) -> None: ...
    def release_dead(self, context: ClaimContext) -> int: ...
    def open_jobs(self) -> int: ...
    def untagged_ids(self) -> Iterator[str]: ...
    def partial_ids(self, context: ClaimContext) -> Iterator[str]: ...
    def take_lease(self, name: str, context: ClaimContext, lease_s: float) -> bool: ...
    def close(self) -> None: ...


Decision: TypeAlias = Literal[
    "new", "resume", "take", "restart", "exhausted", "elsewhere", "waiting", "dead"
]


def decide(job: Job | None, claim: Claim, context: ClaimContext) -> Decision:
    """Decide a claim from the post's job alone; pure, so that every store agrees.

    Returns:
        ``new`` (there is no job), ``resume`` (this King's own claim, whose reply was lost),
        ``take`` (one more attempt), ``restart`` (a dead letter that was published again),
        ``exhausted``, ``elsewhere``, ``waiting`` or ``dead``.
    """
    if job is None:
        return "new"
    if job.state == "dead":
        # The broker repeats a message whose acknowledgement was lost; a fresh one asks again.
        return "dead" if claim.redelivered and not claim.message.force else "restart"
    if job.state == "running":
        if job.owner == context.owner:
            return "resume"
        if job.lease_until > context.now and not (job.owner and context.is_dead(job.owner)):
            return "elsewhere"
    elif context.waits(job) and not claim.message.force:
        return "waiting"
    return "exhausted" if context.retry.is_last(job.attempts) else "take"


def exhausted(job: Job) -> Failure:
    """Return the reason of a dead letter whose attempts are used up."""
    error = job.last_error or {}
    last = error.get("message") or "none of them ended: the process died each time"
    return Failure(
        stage=error.get("stage") or "load",
        type="Exhausted",
        message=f"{job.attempts} attempts used up; the last: {last}"[:500],
    )


def own_name() -> str:
    """Return ``host:namespace:pid:identity``, unique to this process and testable on its host."""
    pid = os.getpid()
    return f"{_host()}:{_namespace()}:{pid}:{process_identity(pid)}"


def is_dead(owner: str) -> bool:
    """Return True if the named King certainly is dead: it ran on this host and is gone.

    False when that cannot be known, for example on another host; its lease decides then.
    """
    parts = owner.split(":")
    if len(parts) != 4 or parts[:2] != [_host(), _namespace()] or not parts[2].isdigit():
        return False
    try:
        return process_identity(int(parts[2])) != parts[3]
    except OSError:
        return False


def _host() -> str:
    return socket.gethostname().replace(":", "-").replace(" ", "-")


def _namespace() -> str:
    # Containers may share a host's name, and process IDs mean the same only within one namespace.
    try:
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return "-"
