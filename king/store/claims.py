"""Judgement of claims and outcomes; pure, so that the store in memory and the real one agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from common.errors import PostNotFound
from common.post import Failure
from config.settings import StoreSettings
from king.jobs import (
    QUEUED_FOR_S,
    Claim,
    ClaimContext,
    Dead,
    HeldElsewhere,
    Job,
    Rejected,
    Released,
    Retry,
    Settled,
    Started,
    Tagged,
    Unreadable,
    Verdict,
    decide,
    exhausted,
    message_key,
)
from king.store.documents import read_post, tagged_by


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """A claim's verdict and what becomes of its job.

    Attributes:
        job: The job to write; None leaves it as it is.
        is_stale: True when the job must be removed, since its post is tagged already.
    """

    verdict: Verdict
    job: Job | None = None
    is_stale: bool = False


def judge(
    claim: Claim,
    document: Mapping[str, Any] | None,
    job: Job | None,
    context: ClaimContext,
    settings: StoreSettings,
) -> ClaimResult:
    """Judge a claim by the document and the job of its post, as they were read."""
    message, post_id = claim.message, claim.message.post_id
    decision = decide(job, claim, context)
    forced = message.force or (job is not None and job.force and job.state != "dead")
    path = settings.result_path
    if document is not None and not forced and tagged_by(document, path, context.bundle):
        stale = job is not None and decision != "elsewhere"
        return ClaimResult(Settled(post_id, "tagged"), is_stale=stale)
    if decision == "elsewhere" and job is not None:
        return ClaimResult(HeldElsewhere(post_id, job.lease_until))
    if document is None:
        error = PostNotFound(f"no post {post_id!r} in {settings.database}.{settings.collection}")
        return _rejected(claim, job, Failure.of("load", error), context)
    if decision in ("waiting", "dead"):
        return ClaimResult(Settled(post_id, "waiting" if decision == "waiting" else "dead"))
    if decision == "exhausted" and job is not None:
        return _rejected(claim, job, exhausted(job), context)
    ended = job.attempts if job is not None and decision in ("take", "resume") else 0
    started = Started(
        post=read_post(post_id, document, settings.fields),
        document_id=document["_id"],
        attempt=ended if decision == "resume" else ended + 1,
        priority=message.priority,
        force=message.force or (job.force if job is not None else False),
        payload=claim.payload,
        received_at=context.now,
    )
    if decision == "resume":
        return ClaimResult(started)
    running = replace(
        job if job is not None else Job(post_id, "running", first_at=context.now),
        state="running",
        attempts=started.attempt,
        payload=claim.payload,
        priority=message.priority,
        force=started.force,
        updated_at=context.now,
        **context.lease,
    )
    return ClaimResult(started, running)


def _rejected(
    claim: Claim, job: Job | None, failure: Failure, context: ClaimContext
) -> ClaimResult:
    message = claim.message
    attempts = job.attempts if job is not None else 0
    dead = Job(
        post_id=message.post_id,
        state="dead",
        attempts=attempts,
        last_error=failure.as_dict(),
        payload=claim.payload,
        priority=message.priority,
        force=message.force,
        first_at=job.first_at if job is not None else context.now,
        updated_at=context.now,
    )
    return ClaimResult(Rejected(message.post_id, failure, attempts), dead)


def changes_after(
    outcome: Tagged | Retry | Dead | Released, context: ClaimContext
) -> dict[str, Any] | None:
    """Return the fields of the job that change with an outcome; None when the job is removed."""
    free = {"owner": None, "lease_until": 0.0, "updated_at": context.now}
    match outcome:
        case Tagged():
            return None
        case Released(started):
            if started.attempt == 1:
                return None
            due_at = context.now + QUEUED_FOR_S
            return {**free, "state": "queued", "attempts": started.attempt - 1, "due_at": due_at}
        case Retry():
            error, due_at = outcome.failure.as_dict(), round(outcome.due_at, 3)
            return {**free, "state": "waiting", "last_error": error, "due_at": due_at}
        case Dead():
            error = outcome.failure.as_dict()
            return {**free, "state": "dead", "last_error": error, "due_at": 0.0}


def unreadable_letter(outcome: Unreadable, context: ClaimContext) -> Job:
    """Return the dead letter of a message that names no post."""
    return Job(
        post_id=message_key(outcome.payload),
        state="dead",
        last_error=outcome.failure.as_dict(),
        payload=outcome.payload,
        first_at=context.now,
        updated_at=context.now,
    )
