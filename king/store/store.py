"""The store: posts are read here, attempts recorded, tags written; an edge with two sides.

`Store` is what the King asks for; `MongoStore` keeps it in MongoDB. Every operation may be
repeated after a `StoreUnavailable` without harm: an attempt is claimed only from the state that
was read, and results are fenced by the bundle's version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from pymongo import DeleteOne, UpdateOne
from pymongo.errors import DuplicateKeyError

from common.errors import StoreRefused
from king.jobs import (
    QUEUED_FOR_S,
    Claim,
    ClaimContext,
    Dead,
    Job,
    Outcome,
    Released,
    Retry,
    Tagged,
    Unreadable,
    Verdict,
    WriteRefused,
    message_key,
    number,
)
from king.store.claims import Claims, as_read
from king.store.client import Operation
from king.store.documents import (
    failed_result,
    tagged_result,
)
from workers.protocol import Failure

OPEN_STATES = ("waiting", "queued", "running")


class Store(Protocol):
    """Posts and jobs, as the King sees them; only the store thread calls it."""

    @property
    def url(self) -> str:
        """Its address as it may be shown."""
        ...

    def connect(self) -> None:
        """Reach it. Raises `StoreUnavailable`, or `ConfigError` when it refuses the user."""
        ...

    def begin(self, claims: Sequence[Claim], context: ClaimContext) -> list[Verdict]:
        """Load posts and record their attempts; one verdict per claim, in order.

        The claims are for different posts.
        """
        ...

    def finish(
        self, outcomes: Sequence[Outcome], context: ClaimContext
    ) -> Sequence[Outcome | WriteRefused]:
        """Write what became of attempts; gives what was recorded, in order.

        An outcome whose write the database refused for good comes back as a `Dead`; or, where it
        refuses a dead letter too, as an `WriteRefused`, which may be finished again.
        """
        ...

    def renew(self, post_ids: Sequence[str], context: ClaimContext) -> None:
        """Extend the leases of running posts."""
        ...

    def claim_due(self, context: ClaimContext, limit: int) -> list[Job]:
        """Take the jobs that are due, for publishing; no other King gets the same."""
        ...

    def published(self, post_ids: Sequence[str], context: ClaimContext) -> None:
        """Jobs of `claim_due` whose messages the broker has confirmed."""
        ...

    def release_dead(self, context: ClaimContext) -> int:
        """Make the jobs of Kings that are known to be dead due at once; gives their number."""
        ...

    def open_jobs(self) -> int:
        """Number of jobs that are not dead letters."""
        ...

    def untagged_ids(self) -> Iterator[str]:
        """IDs of the posts that have neither a result nor a job."""
        ...

    def take_lease(self, name: str, context: ClaimContext, lease_s: float) -> bool:
        """Take or renew what only one King does at a time; False when another one holds it."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


class MongoStore(Claims):
    """The store in MongoDB; see `Store`."""

    # Finish ----------------------------------------------------------------------------------

    def finish(
        self, outcomes: Sequence[Outcome], context: ClaimContext
    ) -> list[Outcome | WriteRefused]:
        """See `Store.finish`.

        Raises:
            StoreUnavailable: Finish the same outcomes again.
        """
        writes = [(i, self._result(outcome, context)) for i, outcome in enumerate(outcomes)]
        results = [(i, write) for i, write in writes if write is not None]
        _, refused = self.bulk(self.posts, [write for _, write in results])
        after = list(outcomes)
        for position, (_, reason) in refused.items():
            i = results[position][0]
            outcome = after[i]
            if isinstance(outcome, Tagged):
                after[i] = _refused(outcome, f"the result was refused: {reason}")
        _, unwritable = self.bulk(self.jobs, [self._job_after(o, context) for o in after])
        recorded: list[Outcome | WriteRefused] = [*after]
        for i, (_, reason) in unwritable.items():
            recorded[i] = self._bury_plainly(after[i], reason, context)
        return recorded

    def _bury_plainly(
        self, outcome: Outcome, reason: str, context: ClaimContext
    ) -> Outcome | WriteRefused:
        """The job of a failed attempt was refused: perhaps its error was, so try without it."""
        if isinstance(outcome, (Retry, Dead)):
            dead = _refused(outcome, f"the job was refused: {reason}")
            _, unwritable = self.bulk(self.jobs, [self._job_after(dead, context)])
            if not unwritable:
                write = self._result(dead, context)
                self.bulk(self.posts, [write] if write is not None else [])
                return dead
        if isinstance(outcome, Unreadable):
            return WriteRefused(message_key(outcome.payload), reason)
        return WriteRefused(outcome.started.post_id, reason)

    def _result(self, outcome: Outcome, context: ClaimContext) -> UpdateOne | None:
        if isinstance(outcome, Tagged):
            return self.write_tagged(outcome.started.document_id, tagged_result(outcome))
        if isinstance(outcome, Dead):
            started = outcome.started
            content = failed_result(
                started.post_id,
                outcome.failure,
                started.attempt,
                context.bundle,
                outcome.timings_ms,
            )
            return self.write_failed(started.document_id, content)
        return None

    def _job_after(self, outcome: Outcome, context: ClaimContext) -> Operation:
        if isinstance(outcome, Unreadable):
            key = message_key(outcome.payload)
            dead = Job(
                post_id=key,
                state="dead",
                last_error=outcome.failure.as_dict(),
                payload=outcome.payload,
                updated_at=context.now,
            ).as_document()
            del dead["_id"], dead["first_at"]
            change = {"$set": dead, "$setOnInsert": {"first_at": context.now}}
            return UpdateOne({"_id": key}, change, upsert=True)
        mine = {"_id": outcome.started.post_id, "owner": context.owner}
        if isinstance(outcome, Tagged):
            return DeleteOne(mine)
        free = {"owner": None, "lease_until": 0.0, "updated_at": context.now}
        if isinstance(outcome, Released):
            before = outcome.started.attempt - 1
            if before == 0:
                return DeleteOne(mine)
            queued = {"state": "queued", "attempts": before, "due_at": context.now + QUEUED_FOR_S}
            return UpdateOne(mine, {"$set": {**free, **queued}})
        error = {"last_error": outcome.failure.as_dict()}
        if isinstance(outcome, Retry):
            waiting = {"state": "waiting", "due_at": round(outcome.due_at, 3)}
            return UpdateOne(mine, {"$set": {**free, **error, **waiting}})
        return UpdateOne(mine, {"$set": {**free, **error, "state": "dead", "due_at": 0.0}})

    # Leases and retries ----------------------------------------------------------------------

    def renew(self, post_ids: Sequence[str], context: ClaimContext) -> None:
        """See `Store.renew`.

        Raises:
            StoreUnavailable: Renew again.
        """
        mine = {"_id": {"$in": list(post_ids)}, "owner": context.owner, "state": "running"}
        change = {**context.lease, "updated_at": context.now}
        with self.edge():
            self.jobs.update_many(mine, {"$set": change})

    def claim_due(self, context: ClaimContext, limit: int) -> list[Job]:
        """See `Store.claim_due`.

        Raises:
            StoreUnavailable: What was claimed, if anything, is due again after the lease.
        """
        due = {"state": {"$in": list(OPEN_STATES)}, "due_at": {"$lte": context.now}}
        token = _publisher(context)
        with self.edge():
            cursor = self.jobs.find(due, {"_id": 1}).sort("due_at", 1).limit(limit)
            keys = [document["_id"] for document in cursor]
            if not keys:
                return []
            change = {
                "state": "queued",
                "owner": token,
                "lease_until": 0.0,
                "due_at": round(context.now + context.lease_s, 3),
                "updated_at": context.now,
            }
            self.jobs.update_many({"_id": {"$in": keys}, **due}, {"$set": change})
            won = self.jobs.find({"_id": {"$in": keys}, "state": "queued", "owner": token})
            return [Job.of(document) for document in won]

    def published(self, post_ids: Sequence[str], context: ClaimContext) -> None:
        """See `Store.published`.

        Raises:
            StoreUnavailable: Say it again.
        """
        queued = {
            "_id": {"$in": list(post_ids)},
            "state": "queued",
            "owner": _publisher(context),
        }
        change = {"owner": None, "due_at": context.now + QUEUED_FOR_S, "updated_at": context.now}
        with self.edge():
            self.jobs.update_many(queued, {"$set": change})

    def release_dead(self, context: ClaimContext) -> int:
        """See `Store.release_dead`.

        Raises:
            StoreUnavailable: Try again.
        """
        with self.edge():
            running = [Job.of(d) for d in self.jobs.find({"state": "running"})]
        orphans = [job for job in running if job.owner and context.is_dead(job.owner)]
        change = {"$set": {"state": "waiting", "due_at": context.now, "owner": None}}
        effective, _ = self.bulk(self.jobs, [UpdateOne(as_read(job), change) for job in orphans])
        return effective

    def open_jobs(self) -> int:
        """See `Store.open_jobs`.

        Raises:
            StoreUnavailable: The number is not known.
        """
        with self.edge():
            return int(self.jobs.count_documents({"state": {"$in": list(OPEN_STATES)}}))

    def take_lease(self, name: str, context: ClaimContext, lease_s: float) -> bool:
        """See `Store.take_lease`.

        Raises:
            StoreUnavailable: Try again.
            StoreRefused: There is no right to write leases.
        """
        mine = {"owner": context.owner, "lease_until": round(context.now + lease_s, 3)}
        with self.edge():
            lease = self.leases.find_one({"_id": name})
            if lease is None:
                try:
                    self.leases.insert_one({"_id": name, **mine})
                except DuplicateKeyError:
                    return False
                return True
            owner, until = lease.get("owner"), lease.get("lease_until")
            held = number(until) > context.now and not context.is_dead(str(owner))
            if held and owner != context.owner:
                return False
            # Won only from the state that was read: of two that find it free, one matches.
            seen = {"_id": name, "owner": owner, "lease_until": until}
            return self.leases.update_one(seen, {"$set": mine}).matched_count == 1


def _refused(outcome: Tagged | Retry | Dead, message: str) -> Dead:
    failure = Failure.of("store", StoreRefused(message))
    return Dead(outcome.started, failure, outcome.timings_ms)


def _publisher(context: ClaimContext) -> str:
    """Owner of jobs that a King is about to publish: never mistaken for one that it runs."""
    return f"{context.owner} publishes"
