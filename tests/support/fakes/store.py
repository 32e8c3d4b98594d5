"""A store in memory, with the verdicts of `king.store.store.Store`, and no server."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from common.errors import StoreUnavailable
from common.post import Failure
from config.settings import FieldMap
from king.jobs import (
    QUEUED_FOR_S,
    Claim,
    ClaimContext,
    Dead,
    HeldElsewhere,
    Job,
    Outcome,
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
from king.store.documents import (
    match_ids,
    read_post,
    tagged_by,
)


class FakeStore:
    """Posts and jobs in dictionaries.

    Attributes:
        posts: ``_id`` ─► document.
        jobs: Post ID ─► job.
        down: Set to make every call raise `StoreUnavailable`.
        refuse: IDs of posts whose results cannot be written.
    """

    url = "fake://"

    def __init__(self, posts: Sequence[Mapping[str, Any]] = ()) -> None:
        self.posts: dict[Any, dict[str, Any]] = {post["_id"]: dict(post) for post in posts}
        self.jobs: dict[str, Job] = {}
        self.down = threading.Event()
        self.refuse: set[str] = set()
        self.closed = False
        self.leases: dict[str, tuple[str, float]] = {}
        self._publishing: dict[str, str] = {}

    def connect(self) -> None:
        """Nothing to reach."""
        self._require()

    def close(self) -> None:
        """Nothing to close."""
        self.closed = True

    def begin(self, claims: Sequence[Claim], context: ClaimContext) -> list[Verdict]:
        self._require()
        return [self._begin(claim, context) for claim in claims]

    def _begin(self, claim: Claim, context: ClaimContext) -> Verdict:
        message, post_id = claim.message, claim.message.post_id
        job = self.jobs.get(post_id)
        decision = decide(job, claim, context)
        document = match_ids(self.posts.values(), [post_id], "_id").get(post_id)
        forced = message.force or (job is not None and job.force and job.state != "dead")
        tagged = document is not None and tagged_by(document, "insight", context.bundle)
        if tagged and not forced:
            if decision != "elsewhere":
                self.jobs.pop(post_id, None)
            return Settled(post_id, "tagged")
        if decision == "elsewhere" and job is not None:
            return HeldElsewhere(post_id, job.lease_until)
        if document is None:
            failure = Failure("load", "PostNotFound", f"no post {post_id!r}")
            return self._bury(claim, job, failure, context)
        if decision in ("waiting", "dead"):
            return Settled(post_id, "waiting" if decision == "waiting" else "dead")
        if decision == "exhausted" and job is not None:
            verdict = self._bury(claim, job, exhausted(job), context)
            self._write(document, verdict.result(context).document())
            return verdict
        before = job.attempts if job is not None and decision in ("take", "resume") else 0
        attempt = before if decision == "resume" else before + 1
        force = message.force or (job is not None and job.force)
        self.jobs[post_id] = replace(
            job or Job(post_id, "running", first_at=context.now),
            state="running",
            attempts=attempt,
            payload=claim.payload,
            priority=message.priority,
            force=force,
            updated_at=context.now,
            **context.lease,
        )
        post = read_post(post_id, document, FieldMap())
        args = (message.priority, force, claim.payload, context.now)
        return Started(post, document["_id"], attempt, *args)

    def _bury(
        self, claim: Claim, job: Job | None, failure: Failure, context: ClaimContext
    ) -> Rejected:
        post_id = claim.message.post_id
        attempts = job.attempts if job is not None else 0
        self.jobs[post_id] = Job(
            post_id,
            "dead",
            attempts,
            last_error=failure.as_dict(),
            payload=claim.payload,
            priority=claim.message.priority,
            force=claim.message.force,
            updated_at=context.now,
        )
        return Rejected(post_id, failure, attempts)

    def finish(self, outcomes: Sequence[Outcome], context: ClaimContext) -> list[Outcome]:
        self._require()
        return [self._finish(outcome, context) for outcome in outcomes]

    def _finish(self, outcome: Outcome, context: ClaimContext) -> Outcome:
        if isinstance(outcome, Unreadable):
            key, error = message_key(outcome.payload), outcome.failure.as_dict()
            self.jobs[key] = Job(
                key, "dead", last_error=error, payload=outcome.payload, updated_at=context.now
            )
            return outcome
        started = outcome.started
        if isinstance(outcome, Tagged) and started.post_id in self.refuse:
            refused = Failure("store", "StoreRefused", "the result was refused")
            outcome = Dead(started, refused, outcome.timings_ms)
        document = self.posts[started.document_id]
        if isinstance(outcome, Tagged):
            self._write(document, outcome.result().document())
        elif isinstance(outcome, Dead):
            self._write(document, outcome.result(context.bundle).document())
        job = self.jobs.get(started.post_id)
        if job is None or job.owner != context.owner:
            return outcome
        job = replace(job, owner=None, lease_until=0.0, updated_at=context.now)
        if isinstance(outcome, Tagged) or (isinstance(outcome, Released) and job.attempts == 1):
            del self.jobs[started.post_id]
        elif isinstance(outcome, Released):
            attempts, due_at = started.attempt - 1, context.now + QUEUED_FOR_S
            self.jobs[started.post_id] = replace(
                job, state="queued", attempts=attempts, due_at=due_at
            )
        else:
            error = outcome.failure.as_dict()
            waits = isinstance(outcome, Retry)
            self.jobs[started.post_id] = replace(
                job,
                state="waiting" if waits else "dead",
                due_at=round(outcome.due_at, 3) if isinstance(outcome, Retry) else 0.0,
                last_error=error,
            )
        return outcome

    def _write(self, document: dict[str, Any] | Mapping[str, Any], content: dict[str, Any]) -> None:
        known = document.get("insight")
        before = known.get("version") if isinstance(known, dict) else None
        status = known.get("status") if isinstance(known, dict) else None
        older = before is None or before < content["version"]
        same = before == content["version"]
        if older or (same and (content["status"] == "tagged" or status == "failed")):
            self.posts[document["_id"]]["insight"] = content

    def renew(self, post_ids: Sequence[str], context: ClaimContext) -> None:
        self._require()
        for post_id in post_ids:
            job = self.jobs.get(post_id)
            if job is not None and job.owner == context.owner and job.state == "running":
                self.jobs[post_id] = replace(job, **context.lease)

    def claim_due(self, context: ClaimContext, limit: int) -> list[Job]:
        self._require()
        due = [j for j in self.jobs.values() if j.state != "dead" and j.due_at <= context.now]
        claimed = []
        for job in sorted(due, key=lambda job: job.due_at)[:limit]:
            later = context.now + context.lease_s
            self.jobs[job.post_id] = replace(
                job, state="queued", owner=f"{context.owner} publishes", lease_until=0, due_at=later
            )
            claimed.append(self.jobs[job.post_id])
        return claimed

    def published(self, post_ids: Sequence[str], context: ClaimContext) -> None:
        self._require()
        for post_id in post_ids:
            job = self.jobs.get(post_id)
            if job is not None and job.state == "queued":
                self.jobs[post_id] = replace(job, owner=None, due_at=context.now + QUEUED_FOR_S)

    def release_dead(self, context: ClaimContext) -> int:
        self._require()
        released = [
            job
            for job in self.jobs.values()
            if job.state == "running" and job.owner and context.is_dead(job.owner)
        ]
        for job in released:
            self.jobs[job.post_id] = replace(job, state="waiting", due_at=context.now, owner=None)
        return len(released)

    def open_jobs(self) -> int:
        self._require()
        return sum(job.state != "dead" for job in self.jobs.values())

    def untagged_ids(self) -> Iterator[str]:
        self._require()
        without = (key for key, post in self.posts.items() if not post.get("insight"))
        return (str(key) for key in without if str(key) not in self.jobs)

    def take_lease(self, name: str, context: ClaimContext, lease_s: float) -> bool:
        self._require()
        owner, until = self.leases.get(name, (context.owner, 0.0))
        if owner != context.owner and until > context.now and not context.is_dead(owner):
            return False
        self.leases[name] = (context.owner, context.now + lease_s)
        return True

    def job(self, post_id: str) -> Job | None:
        """Return one job, as `king.store.queries.PostQueries` does."""
        return self.jobs.get(post_id)

    def _require(self) -> None:
        if self.down.is_set():
            raise StoreUnavailable("fake://: switched off")
