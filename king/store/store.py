"""The daemon's store in MongoDB: posts are read here, attempts recorded, results written.

Every operation may be repeated after a `StoreUnavailable` without harm: an attempt is claimed only
from the state that was read, and a result never replaces that of a newer bundle.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog
from pymongo import DeleteOne, InsertOne, UpdateOne
from pymongo.errors import DuplicateKeyError

from common.errors import PostNotFound, StoreRefused, StoreUnavailable, one_line
from common.post import Failure, TagResult
from config.settings import StoreSettings
from king.jobs import (
    OPEN_STATES,
    QUEUED_FOR_S,
    Claim,
    ClaimContext,
    Dead,
    HeldElsewhere,
    Job,
    NoRoom,
    Outcome,
    Rejected,
    Released,
    Retry,
    Settled,
    Started,
    Superseded,
    Tagged,
    Unreadable,
    Verdict,
    WriteRefused,
    decide,
    exhausted,
    message_key,
    number,
)
from king.store.client import Operation, Refusal, StoreClient, all_of
from king.store.documents import (
    dig,
    match_ids,
    partial_attempts,
    projection,
    read_post,
    shadow_path,
    tagged_by,
)
from king.store.queries import PostQueries

# A claim that was lost to another King is looked at again after this: by then the other one has
# written its own. At half, it is only asked for twice; at double, a post waits for nothing.
_RETRY_SOON_S = 0.5

log = structlog.get_logger()


class Store:
    """Posts, jobs and results; only the store thread calls it.

    After a `StoreUnavailable`, any method may be called again with the same arguments.
    """

    def __init__(self, client: StoreClient) -> None:
        self.client = client
        self.queries = PostQueries(client)
        self._settings = client.settings

    @property
    def url(self) -> str:
        """Return the database's URL without its password."""
        return self.client.url

    @property
    def now(self) -> float:
        """Return the time of the database, which the Kings of all hosts share (Unix seconds)."""
        return self.client.now

    def connect(self) -> None:
        """Reach the database; ConfigError when it refuses the user or the password."""
        self.client.connect()

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def begin(self, claims: Sequence[Claim], context: ClaimContext) -> list[Verdict]:
        """Load posts and record their attempts; return one verdict per claim, in order.

        The claims are for different posts.
        """
        if not claims:
            return []
        post_ids = [claim.message.post_id for claim in claims]
        documents = self._read(post_ids)
        jobs = self.read_jobs(post_ids)
        judged = [
            judge(claim, documents.get(post_id), jobs.get(post_id), context, self._settings)
            for post_id, claim in zip(post_ids, claims, strict=True)
        ]
        results: list[UpdateOne] = []
        writes: list[tuple[str, Operation]] = []
        for post_id, each in zip(post_ids, judged, strict=True):
            document, job = documents.get(post_id), jobs.get(post_id)
            if isinstance(each.verdict, Rejected) and isinstance(document, Mapping):
                results.append(self.result_write(document["_id"], each.verdict.result(context)))
            if each.job is not None:
                writes.append((post_id, _job_write(job, each.job)))
            elif each.is_stale and job is not None:
                writes.append((post_id, DeleteOne(as_read(job))))
        self.client.bulk(self.client.posts, results)
        written = self.client.bulk(self.client.jobs, [write for _, write in writes])
        verdicts = [each.verdict for each in judged]
        # Every insert and update takes effect unless the job has changed since it was read: then
        # another King was quicker, and the jobs tell who holds what. (A delete may find nothing.)
        if written.effective < sum(not isinstance(write, DeleteOne) for _, write in writes):
            refused = {
                writes[position][0]: refusal
                for position, refusal in written.refused.items()
                if not refusal.is_duplicate and not isinstance(writes[position][1], DeleteOne)
            }
            verdicts = self._confirm(claims, verdicts, refused, context)
        return verdicts

    def read_documents(self, post_ids: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        """Return the documents of posts by ID, with the fields that a post is read from."""
        documents = self._read(post_ids)
        return {key: each for key, each in documents.items() if isinstance(each, Mapping)}

    def _read(self, post_ids: Sequence[str]) -> dict[str, Mapping[str, Any] | StoreRefused]:
        """Return documents by ID, and errors for those that cannot be read.

        One document that is no valid BSON fails the whole query, and must hold up no other.
        """
        fields = self._settings.fields
        try:
            with self.client.edge():
                query = self.client.named(post_ids)
                cursor = self.client.posts.find(
                    query, projection(fields, self._settings.result_path)
                )
                return {**match_ids(cursor, post_ids, fields.id)}
        except StoreRefused as error:
            if len(post_ids) <= 1:
                return dict.fromkeys(post_ids, error)
        middle = len(post_ids) // 2
        return self._read(post_ids[:middle]) | self._read(post_ids[middle:])

    def read_jobs(self, post_ids: Sequence[str]) -> dict[str, Job]:
        """Return the jobs of posts by ID."""
        with self.client.edge():
            jobs = map(Job.of, self.client.jobs.find({"_id": {"$in": list(post_ids)}}))
            return {job.post_id: job for job in jobs}

    def _confirm(
        self,
        claims: Sequence[Claim],
        verdicts: Sequence[Verdict],
        refused: Mapping[str, Refusal],
        context: ClaimContext,
    ) -> list[Verdict]:
        """Replace the verdicts on claims that were lost to another King, or refused."""
        jobs = self.read_jobs([v.post_id for v in verdicts if isinstance(v, Started)])
        confirmed: list[Verdict] = []
        for claim, verdict in zip(claims, verdicts, strict=True):
            post_id = verdict.post_id
            job = jobs.get(post_id)
            if post_id in refused:
                confirmed.append(self._refused_claim(claim, job, refused[post_id], context))
            elif isinstance(verdict, Started) and (
                job is None or job.state != "running" or job.owner != context.owner
            ):
                confirmed.append(HeldElsewhere(post_id, context.now + _RETRY_SOON_S))
            else:
                confirmed.append(verdict)
        return confirmed

    def _refused_claim(
        self, claim: Claim, job: Job | None, refusal: Refusal, context: ClaimContext
    ) -> Rejected | WriteRefused:
        """Write a dead letter, without the payload that may be what was refused, if that helps."""
        post_id = claim.message.post_id
        if refusal.is_permanent:
            failure = Failure.of("store", StoreRefused(f"the job was refused: {refusal.reason}"))
            rejected, letter = _rejected(replace(claim, payload=""), job, failure, context)
            if not self.client.bulk(self.client.jobs, [_job_write(job, letter)]).refused:
                return rejected
        return WriteRefused(post_id, refusal.reason)

    def finish(
        self, outcomes: Sequence[Outcome], context: ClaimContext
    ) -> list[Outcome | WriteRefused]:
        """Write the outcomes of attempts; return what was recorded, in order.

        Tags that changed nothing come back as `Superseded`; an outcome whose write the database
        refused for good as a `Dead`; and where it refuses that too, or for the moment, as a
        `WriteRefused`, which may be finished again.
        """
        recorded: list[Outcome | WriteRefused] = [*outcomes]
        writes = [(i, self._result_write(outcome, context)) for i, outcome in enumerate(outcomes)]
        results = [(i, write) for i, write in writes if write is not None]
        written = self.client.bulk(self.client.posts, [write for _, write in results])
        for position, refusal in written.refused.items():
            i = results[position][0]
            recorded[i] = _after_refusal(outcomes[i], refusal)
        if written.effective + len(written.refused) < len(results):
            recorded = self._superseded(recorded)
        jobs = [(i, each) for i, each in enumerate(recorded) if not isinstance(each, WriteRefused)]
        changes = [_job_after(outcome, context) for _, outcome in jobs]
        for position, refusal in self.client.bulk(self.client.jobs, changes).refused.items():
            i, outcome = jobs[position]
            recorded[i] = self._finish_without_error(outcome, refusal, context)
        self._write_shadows([each for each in recorded if isinstance(each, Tagged)])
        return recorded

    def _write_shadows(self, outcomes: Sequence[Tagged]) -> None:
        """Write the tags of a bundle on trial: the latest stay, since no one is served by them."""
        shadows = [
            (each.started.document_id, shadow)
            for each in outcomes
            if (shadow := each.result.shadow) is not None
        ]
        if not shadows:
            return
        path = shadow_path(self._settings)
        writes = [UpdateOne({"_id": i}, {"$set": {path: s.document()}}) for i, s in shadows]
        try:
            refused = self.client.bulk(self.client.posts, writes).refused.values()
            reasons = {refusal.reason for refusal in refused}
        except (StoreRefused, StoreUnavailable) as error:
            reasons = {one_line(error)}
        for reason in reasons:  # the real ones are written
            log.warning("store.shadow_not_written", reason=reason)

    def _superseded(
        self, recorded: Sequence[Outcome | WriteRefused]
    ) -> list[Outcome | WriteRefused]:
        """Find the tags whose write matched no document: the fence held, or the post is gone."""
        tagged = [each.started.post_id for each in recorded if isinstance(each, Tagged)]
        documents = self.read_documents(tagged) if tagged else {}
        path = f"{self._settings.result_path}.version"
        versions = {post_id: dig(document, path) for post_id, document in documents.items()}
        return [
            Superseded(each.started, versions.get(each.result.post_id), each.timings_ms)
            if isinstance(each, Tagged) and versions.get(each.result.post_id) != each.result.version
            else each
            for each in recorded
        ]

    def _finish_without_error(
        self, outcome: Outcome, refusal: Refusal, context: ClaimContext
    ) -> Outcome | WriteRefused:
        """Write a job that was refused for good again without its error, perhaps the cause."""
        if isinstance(outcome, (Retry, Dead)) and refusal.is_permanent:
            dead = _refused(outcome, f"the job was refused: {refusal.reason}")
            if not self.client.bulk(self.client.jobs, [_job_after(dead, context)]).refused:
                write = self.result_write(dead.started.document_id, dead.result(context.bundle))
                self.client.bulk(self.client.posts, [write])
                return dead
        return WriteRefused(_post_id(outcome), refusal.reason)

    def _result_write(self, outcome: Outcome, context: ClaimContext) -> UpdateOne | None:
        match outcome:
            case Tagged():
                return self.result_write(outcome.started.document_id, outcome.result)
            case Dead():
                result = outcome.result(context.bundle)
                return self.result_write(outcome.started.document_id, result)
            case _:
                return None

    def result_write(self, document_id: Any, result: TagResult) -> UpdateOne:
        """Return the write of a result: tags unless a newer bundle has written already.

        A failure is written only where the same bundle has not tagged the post either.
        """
        path = self._settings.result_path
        allowed: list[dict[str, Any]] = [
            {f"{path}.version": None},
            {f"{path}.version": {"$lt": result.version}},
        ]
        same: dict[str, Any] = {f"{path}.version": result.version}
        allowed.append(same if result.status == "tagged" else {**same, f"{path}.status": "failed"})
        condition = all_of({"_id": document_id}, {"$or": allowed})
        return UpdateOne(condition, {"$set": {path: result.document()}})

    def write_results(
        self, results: Mapping[str, TagResult], *, insert: bool = False
    ) -> dict[str, str]:
        """Write results by post ID, outside of any job; return the reason for each not written.

        With ``insert``, posts that have no document get one.
        """
        documents = self.read_documents(list(results))
        where = f"{self._settings.database}.{self._settings.collection}"
        writes: dict[str, UpdateOne] = {}
        reasons: dict[str, str] = {}
        for post_id, result in results.items():
            document = documents.get(post_id)
            if document is not None:
                writes[post_id] = self.result_write(document["_id"], result)
            elif insert:
                key = {self._settings.fields.id: post_id}
                change = {"$set": {self._settings.result_path: result.document()}}
                writes[post_id] = UpdateOne(key, change, upsert=True)
            else:
                reasons[post_id] = f"{where} holds no such post"
        refused = self.client.bulk(self.client.posts, list(writes.values())).refused
        ids = list(writes)
        return reasons | {ids[i]: refusal.reason for i, refusal in refused.items()}

    def renew(self, post_ids: Sequence[str], context: ClaimContext) -> None:
        """Extend the leases of running posts."""
        mine = {"_id": {"$in": list(post_ids)}, "owner": context.owner, "state": "running"}
        change = {**context.lease, "updated_at": context.now}
        with self.client.edge():
            self.client.jobs.update_many(mine, {"$set": change})

    def claim_due(self, context: ClaimContext, limit: int) -> list[Job]:
        """Take the jobs that are due, for publishing; no other King gets the same.

        When the answer is lost, what was taken is due again after the lease.
        """
        # One further away than any delay was written while the clock was ahead: see `waits`.
        absurd = round(context.now + context.retry.max_s, 3)
        due = {
            "$or": [
                {"state": {"$in": list(OPEN_STATES)}, "due_at": {"$lte": context.now}},
                {"state": "waiting", "due_at": {"$gt": absurd}},
            ]
        }
        jobs = self.client.jobs
        token = _publisher(context)
        with self.client.edge():
            keys = [d["_id"] for d in jobs.find(due, {"_id": 1}).sort("due_at", 1).limit(limit)]
            if not keys:
                return []
            change = {
                "state": "queued",
                "owner": token,
                "lease_until": 0.0,
                "due_at": round(context.now + context.lease_s, 3),
                "updated_at": context.now,
            }
            jobs.update_many({"_id": {"$in": keys}, **due}, {"$set": change})
            won = jobs.find({"_id": {"$in": keys}, "state": "queued", "owner": token})
            return [Job.of(document) for document in won]

    def published(self, post_ids: Sequence[str], context: ClaimContext) -> None:
        """Note that the broker has confirmed the messages of jobs from `claim_due`."""
        queued = {
            "_id": {"$in": list(post_ids)},
            "state": "queued",
            "owner": _publisher(context),
        }
        change = {"owner": None, "due_at": context.now + QUEUED_FOR_S, "updated_at": context.now}
        with self.client.edge():
            self.client.jobs.update_many(queued, {"$set": change})

    def release_dead(self, context: ClaimContext) -> int:
        """Make the jobs of Kings that are known to be dead due at once; return their number."""
        with self.client.edge():
            running = [Job.of(d) for d in self.client.jobs.find({"state": "running"})]
        orphans = [job for job in running if job.owner and context.is_dead(job.owner)]
        change = {"$set": {"state": "waiting", "due_at": context.now, "owner": None}}
        writes = [UpdateOne(as_read(job), change) for job in orphans]
        return self.client.bulk(self.client.jobs, writes).effective

    def open_jobs(self) -> int:
        """Return the number of jobs that are not dead letters; look at the clock, too."""
        self.client.read_clock()
        with self.client.edge():
            return int(self.client.jobs.count_documents({"state": {"$in": list(OPEN_STATES)}}))

    def untagged_ids(self) -> Iterator[str]:
        """Yield the IDs of the posts that have neither a result nor a job."""
        return self.queries.untagged_ids()

    def partial_ids(self, context: ClaimContext) -> Iterator[str]:
        """Yield the IDs of the posts whose tags lack something and that may be tried again."""
        return self.queries.partial_ids(context.bundle, context.retry, context.now)

    def take_lease(self, name: str, context: ClaimContext, lease_s: float) -> bool:
        """Take or renew work that only one King does at a time; False when another holds it.

        Raises StoreRefused when the user has no right to write leases.
        """
        mine = {"owner": context.owner, "lease_until": round(context.now + lease_s, 3)}
        leases = self.client.leases
        with self.client.edge():
            lease = leases.find_one({"_id": name})
            if lease is None:
                try:
                    leases.insert_one({"_id": name, **mine})
                except DuplicateKeyError:
                    return False
                return True
            owner, until = lease.get("owner"), lease.get("lease_until")
            valid = number(until) > context.now and not context.is_dead(str(owner))
            if valid and owner != context.owner:
                return False
            # Won only from the state that was read: of two Kings that find it free, one matches.
            seen = {"_id": name, "owner": owner, "lease_until": until}
            return leases.update_one(seen, {"$set": mine}).matched_count == 1


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """A claim's verdict, and the job to write; None leaves the job as it is.

    A stale job is removed, since its post is tagged already.
    """

    verdict: Verdict
    job: Job | None = None
    is_stale: bool = False


def judge(
    claim: Claim,
    document: Mapping[str, Any] | StoreRefused | None,
    job: Job | None,
    context: ClaimContext,
    settings: StoreSettings,
) -> ClaimResult:
    """Judge a claim by the document and the job of its post, as they were read."""
    message, post_id = claim.message, claim.message.post_id
    decision = decide(job, claim, context)
    forced = message.force or (job is not None and job.force and job.state != "dead")
    path = settings.result_path
    read = document if isinstance(document, Mapping) else None
    ended = job.attempts if job is not None and decision in ("take", "resume") else 0
    if read is not None and not forced and tagged_by(read, path, context.bundle):
        # Tags that lack something are tried again, one attempt at a time.
        before = partial_attempts(read, path, context.retry, context.now)
        if not before:
            stale = job is not None and decision != "elsewhere"
            return ClaimResult(Settled(post_id, "tagged"), is_stale=stale)
        ended = max(ended, before)
    if decision == "elsewhere" and job is not None:
        return ClaimResult(HeldElsewhere(post_id, job.lease_until))
    if read is None:
        missing = f"no post {post_id!r} in {settings.database}.{settings.collection}"
        error = document if isinstance(document, StoreRefused) else PostNotFound(missing)
        return ClaimResult(*_rejected(claim, job, Failure.of("load", error), context))
    if decision in ("waiting", "dead"):
        return ClaimResult(Settled(post_id, "waiting" if decision == "waiting" else "dead"))
    if decision == "exhausted" and job is not None:
        return ClaimResult(*_rejected(claim, job, exhausted(job), context))
    post = read_post(post_id, read, settings.fields)
    if not context.admits(post):
        return ClaimResult(NoRoom(post_id))
    started = Started(
        post=post,
        document_id=read["_id"],
        attempt=ended if decision == "resume" else ended + 1,
        priority=message.priority,
        force=message.force or (job.force if job is not None else False),
        payload=claim.payload,
        received_at=time.monotonic(),
        traceparent=claim.traceparent,
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
) -> tuple[Rejected, Job]:
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
    return Rejected(message.post_id, failure, attempts), dead


def changes_after(
    outcome: Tagged | Superseded | Retry | Dead | Released, context: ClaimContext
) -> dict[str, Any] | None:
    """Return the fields of the job that change with an outcome; None when the job is removed."""
    free = {"owner": None, "lease_until": 0.0, "updated_at": context.now}
    match outcome:
        case Tagged() | Superseded():
            return None
        case Released(started):
            if started.attempt == 1:
                return None
            due_at = context.now + QUEUED_FOR_S
            return {**free, "state": "queued", "attempts": started.attempt - 1, "due_at": due_at}
        case Retry():
            error, due_at = outcome.failure.as_dict(), round(context.now + outcome.delay_s, 3)
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


def as_read(job: Job) -> dict[str, Any]:
    """Return the filter for a job as it was read: a claim wins only from the state it has seen."""
    return {
        "_id": job.post_id,
        "state": job.state,
        "attempts": job.attempts,
        **({"owner": job.owner} if job.state == "running" else {}),
    }


def _job_write(job: Job | None, after: Job) -> Operation:
    """Return the write that turns a job as it was read into another."""
    content = after.as_document()
    if job is None:
        return InsertOne(content)
    del content["_id"]
    return UpdateOne(as_read(job), {"$set": content})


def _job_after(outcome: Outcome, context: ClaimContext) -> Operation:
    """Return the write of the job that follows from an outcome."""
    if isinstance(outcome, Unreadable):
        letter = unreadable_letter(outcome, context).as_document()
        key, first_at = letter.pop("_id"), letter.pop("first_at")
        change = {"$set": letter, "$setOnInsert": {"first_at": first_at}}
        return UpdateOne({"_id": key}, change, upsert=True)
    mine = {"_id": outcome.started.post_id, "owner": context.owner}
    changes = changes_after(outcome, context)
    return DeleteOne(mine) if changes is None else UpdateOne(mine, {"$set": changes})


def _after_refusal(outcome: Outcome, refusal: Refusal) -> Outcome | WriteRefused:
    """Return what becomes of an outcome whose result was refused."""
    if not refusal.is_permanent:
        return WriteRefused(_post_id(outcome), refusal.reason)
    if isinstance(outcome, Tagged):
        return _refused(outcome, f"the result was refused: {refusal.reason}")
    return outcome


def _post_id(outcome: Outcome) -> str:
    if isinstance(outcome, Unreadable):
        return message_key(outcome.payload)
    return outcome.started.post_id


def _refused(outcome: Tagged | Retry | Dead, message: str) -> Dead:
    failure = Failure.of("store", StoreRefused(message))
    return Dead(outcome.started, failure, outcome.timings_ms)


def _publisher(context: ClaimContext) -> str:
    """Return the owner of jobs that a King is about to publish: never one that it runs."""
    return f"{context.owner} publishes"
