"""Beginning: claims are judged, posts loaded, attempts recorded before the work starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pymongo import DeleteOne, InsertOne, UpdateOne

from common.errors import PostNotFound
from king.jobs import (
    Claim,
    ClaimContext,
    Decision,
    HeldElsewhere,
    Job,
    Rejected,
    Settled,
    Started,
    Verdict,
    WriteRefused,
    decide,
    exhausted,
)
from king.store.client import DUPLICATE_KEY, Document, Operation
from king.store.documents import (
    failed_result,
    id_candidates,
    match_ids,
    projection,
    read_post,
    tagged_by,
)
from king.store.queries import Archive
from workers.protocol import Failure

_RETRY_SOON_S = 0.5


class Claims(Archive):
    """The part of `king.store.MongoStore` that begins posts."""

    def begin(self, claims: Sequence[Claim], context: ClaimContext) -> list[Verdict]:
        """See `Store.begin`.

        Raises:
            StoreUnavailable: Begin the same claims again.
        """
        if not claims:
            return []
        post_ids = [claim.message.post_id for claim in claims]
        documents = self._documents(post_ids)
        jobs = self._jobs(post_ids)
        verdicts: list[Verdict] = []
        operations: list[Operation] = []
        asked: list[str] = []
        results: list[UpdateOne] = []
        for claim in claims:
            post_id = claim.message.post_id
            verdict, operation = self._judge(
                claim, documents.get(post_id), jobs.get(post_id), context
            )
            verdicts.append(verdict)
            if operation is not None:
                operations.append(operation)
                asked.append(post_id)
            if isinstance(verdict, Rejected) and post_id in documents:
                content = failed_result(
                    post_id, verdict.failure, verdict.attempts, context.bundle, {}
                )
                results.append(self.write_failed(documents[post_id]["_id"], content))
        self.bulk(self.posts, results)
        effective, refused = self.bulk(self.jobs, operations)
        if effective < sum(isinstance(op, (InsertOne, UpdateOne)) for op in operations):
            reasons = {
                asked[position]: reason
                for position, (code, reason) in refused.items()
                if code != DUPLICATE_KEY and not isinstance(operations[position], DeleteOne)
            }
            verdicts = self._confirm(verdicts, reasons, context)
        return verdicts

    def _documents(self, post_ids: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        fields = self.settings.fields
        wanted = [value for post_id in post_ids for value in id_candidates(post_id)]
        with self.edge():
            cursor = self.posts.find(
                {fields.id: {"$in": wanted}}, projection(fields, self.settings.result_path)
            )
            return match_ids(cursor, post_ids, fields.id)

    def _jobs(self, post_ids: Sequence[str]) -> dict[str, Job]:
        with self.edge():
            found = [Job.of(d) for d in self.jobs.find({"_id": {"$in": list(post_ids)}})]
        return {job.post_id: job for job in found}

    def _judge(
        self,
        claim: Claim,
        document: Mapping[str, Any] | None,
        job: Job | None,
        context: ClaimContext,
    ) -> tuple[Verdict, Operation | None]:
        message = claim.message
        decision = decide(job, claim, context)
        if (
            decision == "elsewhere"
            and job is not None
            and not self._tagged(document, claim, job, context)
        ):
            return HeldElsewhere(message.post_id, job.lease_until), None
        if document is None:
            where = f"{self.settings.database}.{self.settings.collection}"
            error = PostNotFound(f"no post {message.post_id!r} in {where}")
            attempts = job.attempts if job is not None else 0
            buried = Rejected(message.post_id, Failure.of("load", error), attempts)
            return buried, self._bury(claim, job, buried, context)
        if self._tagged(document, claim, job, context):
            stale = DeleteOne(as_read(job)) if job is not None and decision != "elsewhere" else None
            return Settled(message.post_id, "tagged"), stale
        if decision in ("waiting", "dead"):
            return Settled(message.post_id, "waiting" if decision == "waiting" else "dead"), None
        if decision == "exhausted" and job is not None:
            buried = Rejected(message.post_id, exhausted(job), job.attempts)
            return buried, self._bury(claim, job, buried, context)
        return self._start(claim, document, job, decision, context)

    def _tagged(
        self,
        document: Mapping[str, Any] | None,
        claim: Claim,
        job: Job | None,
        context: ClaimContext,
    ) -> bool:
        forced = claim.message.force or (job is not None and job.force and job.state != "dead")
        if document is None or forced:
            return False
        return tagged_by(document, self.settings.result_path, context.bundle)

    def _start(
        self,
        claim: Claim,
        document: Mapping[str, Any],
        job: Job | None,
        decision: Decision,
        context: ClaimContext,
    ) -> tuple[Started, Operation | None]:
        message = claim.message
        before = job.attempts if job is not None and decision in ("take", "resume") else 0
        attempt = before if decision == "resume" else before + 1
        started = Started(
            post=read_post(message.post_id, document, self.settings.fields),
            document_id=document["_id"],
            attempt=attempt,
            priority=message.priority,
            force=message.force or (job.force if job is not None else False),
            payload=claim.payload,
            received_at=context.now,
        )
        if decision == "resume":
            return started, None
        change = {
            "state": "running",
            "payload": claim.payload,
            "priority": message.priority,
            "force": started.force,
            "updated_at": context.now,
            **context.lease,
        }
        if job is None:
            first = {"_id": message.post_id, "attempts": 1, "last_error": None}
            return started, InsertOne({**first, "first_at": context.now, **change})
        if decision == "restart":
            return started, UpdateOne(as_read(job), {"$set": {**change, "attempts": 1}})
        return started, UpdateOne(as_read(job), {"$set": change, "$inc": {"attempts": 1}})

    def _bury(
        self, claim: Claim, job: Job | None, buried: Rejected, context: ClaimContext
    ) -> Operation:
        dead = Job(
            post_id=claim.message.post_id,
            state="dead",
            attempts=buried.attempts,
            last_error=buried.failure.as_dict(),
            payload=claim.payload,
            priority=claim.message.priority,
            force=claim.message.force,
            first_at=job.first_at if job is not None else context.now,
            updated_at=context.now,
        ).as_document()
        if job is None:
            return InsertOne(dead)
        del dead["_id"]
        return UpdateOne(as_read(job), {"$set": dead})

    def _confirm(
        self, verdicts: Sequence[Verdict], refused: Mapping[str, str], context: ClaimContext
    ) -> list[Verdict]:
        """Some claims were lost to another King, or refused: read who holds what."""
        started = [v.post_id for v in verdicts if isinstance(v, Started)]
        jobs = self._jobs(started)
        confirmed: list[Verdict] = []
        for verdict in verdicts:
            if verdict.post_id in refused:
                confirmed.append(WriteRefused(verdict.post_id, refused[verdict.post_id]))
                continue
            if isinstance(verdict, Started):
                job = jobs.get(verdict.post_id)
                if job is None or job.state != "running" or job.owner != context.owner:
                    confirmed.append(HeldElsewhere(verdict.post_id, context.now + _RETRY_SOON_S))
                    continue
            confirmed.append(verdict)
        return confirmed

    # Results ---------------------------------------------------------------------------------

    def write_tagged(self, document_id: Any, content: Document) -> UpdateOne:
        """Unless a newer bundle has written already."""
        path = self.settings.result_path
        allowed: list[dict[str, Any]] = [
            {f"{path}.version": None},
            {f"{path}.version": {"$lte": content["version"]}},
        ]
        return self._fenced(document_id, allowed, content)

    def write_failed(self, document_id: Any, content: Document) -> UpdateOne:
        """Unless the same or a newer bundle has tagged the post already."""
        path = self.settings.result_path
        allowed: list[dict[str, Any]] = [
            {f"{path}.version": None},
            {f"{path}.version": {"$lt": content["version"]}},
            {f"{path}.version": content["version"], f"{path}.status": "failed"},
        ]
        return self._fenced(document_id, allowed, content)

    def _fenced(
        self, document_id: Any, allowed: list[dict[str, Any]], content: Document
    ) -> UpdateOne:
        # Both conditions stand inside $and: see king.mongo on $or beside other keys.
        condition = {"$and": [{"_id": document_id}, {"$or": allowed}]}
        return UpdateOne(condition, {"$set": {self.settings.result_path: content}})


def as_read(job: Job) -> dict[str, Any]:
    """Filter: the job as it was read; a claim wins only from the state that it has seen."""
    return {
        "_id": job.post_id,
        "state": job.state,
        "attempts": job.attempts,
        **({"owner": job.owner} if job.state == "running" else {}),
    }
