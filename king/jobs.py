"""The values between the King and its store: claims, verdicts, outcomes and jobs.

A job is the record of a post that is being worked on, in the `jobs` collection:

    (none) ─claim─► running ─tagged─► (none)
                     │  ▲ └─permanent, or exhausted─► dead ─replay─► queued
       retryable ────┘  └─claim── queued ◄─due── waiting

``due_at`` is the time at which somebody must look at the job when nothing happened to it before:
a waiting job is published again, a queued one was lost by the broker, a running one has lost its
King. Times are seconds since the epoch as numbers: the embedded database turns dates at the top
level of an update into text, and then no longer finds them by range.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from king.messages import PostMessage
from workers.protocol import Failure, Modality, Post, Status, Tags

JobState: TypeAlias = Literal["running", "waiting", "queued", "dead"]
JOB_STATES: tuple[JobState, ...] = ("running", "waiting", "queued", "dead")

QUEUED_FOR_S = 900.0
"""A published retry that nobody began for so long is published again (its message was lost)."""

Bundle: TypeAlias = tuple[str, str]
"""Name and version of what is deployed."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A delivered message that asks whether its post may start.

    Attributes:
        payload: The message's body as text.
        redelivered: The broker says that it delivered this message before.
    """

    message: PostMessage
    payload: str
    redelivered: bool = False


# Verdicts on a claim -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The post is loaded and its attempt is recorded.

    Attributes:
        document_id: ``_id`` of the very document that the post was read from.
        attempt: 1 for the first.
        received_at: When its message arrived, seconds since the epoch.
    """

    post: Post
    document_id: Any
    attempt: int
    priority: int = 0
    force: bool = False
    payload: str = ""
    received_at: float = 0.0

    @property
    def post_id(self) -> str:
        """ID of the post, as its message wrote it."""
        return self.post.post_id


@dataclass(frozen=True, slots=True)
class Settled:
    """Nothing to do for this message: it is acknowledged.

    Attributes:
        reason: ``tagged`` by this bundle already, ``waiting`` for its next attempt, or ``dead``.
    """

    post_id: str
    reason: Literal["tagged", "waiting", "dead"]


@dataclass(frozen=True, slots=True)
class HeldElsewhere:
    """Another King runs the post; look again at ``until`` (seconds since the epoch)."""

    post_id: str
    until: float


@dataclass(frozen=True, slots=True)
class Rejected:
    """The claim was refused and is a dead letter now."""

    post_id: str
    failure: Failure
    attempts: int


@dataclass(frozen=True, slots=True)
class WriteRefused:
    """The database refused to write this job: the post waits, and no other waits with it."""

    post_id: str
    reason: str


Verdict: TypeAlias = Started | Settled | HeldElsewhere | Rejected | WriteRefused


# Outcomes of an attempt ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tagged:
    """The attempt gave tags.

    Attributes:
        ended_at: Seconds since the epoch. Kept here, so that a write that is repeated because
            its reply was lost is the same write to the byte, and changes nothing.
    """

    started: Started
    tags: Tags
    statuses: Mapping[Modality, Status]
    failures: Mapping[Modality, Failure] = field(default_factory=dict)
    timings_ms: Mapping[str, int] = field(default_factory=dict)
    ended_at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class Retry:
    """The attempt failed; the next is due at ``due_at`` (seconds since the epoch)."""

    started: Started
    failure: Failure
    due_at: float
    timings_ms: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dead:
    """The attempt failed for good."""

    started: Started
    failure: Failure
    timings_ms: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Released:
    """The attempt was broken off by a drain: it does not count, its message is requeued."""

    started: Started


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message that names no post."""

    payload: str
    failure: Failure


Outcome: TypeAlias = Tagged | Retry | Dead | Released | Unreadable


@dataclass(frozen=True, slots=True)
class Job:
    """One document of the jobs collection.

    Attributes:
        post_id: ID of the post; ``message:<digest>`` for a message that names none.
        last_error: ``{stage, type, message}`` of the latest failed attempt.
        due_at: Seconds since the epoch, as are the other times.
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
        """The message that asks for this post again."""
        return PostMessage(self.post_id, priority=self.priority, force=self.force)

    @property
    def names_a_post(self) -> bool:
        """False for a message that could not be read."""
        return not (self.last_error and self.last_error.get("stage") == "message")

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Job:
        """Read a document; what is absent or of another type takes its default."""
        error = document.get("last_error")
        last_error = {str(k): str(v) for k, v in error.items()} if isinstance(error, dict) else None
        state = document.get("state")
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
            owner=document.get("owner") or None,
            lease_until=number(document.get("lease_until")),
        )

    def as_document(self) -> dict[str, Any]:
        """What is written for a new job."""
        return {
            "_id": self.post_id,
            "state": self.state,
            "attempts": self.attempts,
            "due_at": self.due_at,
            "last_error": dict(self.last_error) if self.last_error else None,
            "payload": self.payload,
            "priority": self.priority,
            "force": self.force,
            "first_at": self.first_at,
            "updated_at": self.updated_at,
            "owner": self.owner,
            "lease_until": self.lease_until,
        }


def message_key(payload: str) -> str:
    """ID of the dead letter of a message that names no post: the same message, the same letter."""
    return "message:" + hashlib.sha256(payload.encode("utf-8", "replace")).hexdigest()[:24]


def number(value: object) -> float:
    """A stored number, or 0 for anything else."""
    return float(value) if isinstance(value, (int, float)) else 0.0


@dataclass(frozen=True, slots=True)
class ClaimContext:
    """Under which a King works on jobs.

    Attributes:
        owner: This King's name, unique per process.
        bundle: What it tags with.
        now: Seconds since the epoch.
        lease_s: For how long a claim holds without being renewed.
        attempts: Tries at one post before it is a dead letter.
        is_dead: Whether the King of this name is known to be dead, whatever its lease says.
    """

    owner: str
    bundle: Bundle
    now: float
    lease_s: float = 60.0
    attempts: int = 5
    is_dead: Callable[[str], bool] = lambda _owner: False

    @property
    def lease(self) -> dict[str, Any]:
        """The fields that say who holds a job, and until when."""
        until = round(self.now + self.lease_s, 3)
        # Others see the lease's end first and may take over; only a job that even then nobody
        # holds (its message is lost) is published again.
        due_at = round(self.now + 2 * self.lease_s, 3)
        return {"owner": self.owner, "lease_until": until, "due_at": due_at}


Decision: TypeAlias = Literal[
    "new", "resume", "take", "restart", "exhausted", "elsewhere", "waiting", "dead"
]


def decide(job: Job | None, claim: Claim, context: ClaimContext) -> Decision:
    """What a claim may do, seen from the post's job alone; pure, so that every store agrees.

    Returns:
        ``new`` (no job stands in the way), ``resume`` (this King's own claim, whose reply was
        lost), ``take`` (one more attempt), ``restart`` (a dead letter that was published again),
        ``exhausted``, ``elsewhere``, ``waiting`` or ``dead``.
    """
    if job is None:
        return "new"
    if job.state == "dead":
        # The broker repeats a message whose acknowledgement was lost; a fresh one is a wish.
        return "dead" if claim.redelivered and not claim.message.force else "restart"
    if job.state == "running":
        if job.owner == context.owner:
            return "resume"
        if job.lease_until > context.now and not (job.owner and context.is_dead(job.owner)):
            return "elsewhere"
    elif job.state == "waiting" and job.due_at > context.now and not claim.message.force:
        return "waiting"
    return "exhausted" if job.attempts >= context.attempts else "take"


def exhausted(job: Job) -> Failure:
    """The reason of a dead letter whose attempts are used up."""
    error = job.last_error or {}
    last = error.get("message") or "none of them ended: the process died each time"
    return Failure(
        stage=error.get("stage") or "load",
        type="Exhausted",
        message=f"{job.attempts} attempts used up; the last: {last}"[:500],
    )
