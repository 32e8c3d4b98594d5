"""A store in memory, with the verdicts of `king.store.store.Store`, and no server."""

import threading
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from common.errors import StoreUnavailable
from common.post import Failure
from config.settings import StoreSettings
from king import jobs
from king.store.documents import id_text, match_ids, partial_attempts, tagged_by
from king.store.store import changes_after, judge, unreadable_letter


class FakeStore:
    """Posts and jobs in dictionaries.

    Attributes:
        posts: ``_id`` -> document.
        jobs: Post ID -> job.
        down: Set to make every call raise `StoreUnavailable`.
        refuse: IDs of posts whose results cannot be written.
    """

    url = "fake://"

    def __init__(self, posts: Sequence[Mapping[str, Any]] = ()) -> None:
        self.posts: dict[Any, dict[str, Any]] = {_key(post["_id"]): dict(post) for post in posts}
        self.jobs: dict[str, jobs.Job] = {}
        self.down = threading.Event()
        self.refuse: set[str] = set()
        self.closed = False
        self.leases: dict[str, tuple[str, float]] = {}

    def connect(self) -> None:
        self._require()

    def close(self) -> None:
        self.closed = True

    def begin(self, claims: Sequence[jobs.Claim], context: jobs.ClaimContext) -> list[jobs.Verdict]:
        self._require()
        return [self._begin(claim, context) for claim in claims]

    def _begin(self, claim: jobs.Claim, context: jobs.ClaimContext) -> jobs.Verdict:
        post_id = claim.message.post_id
        document = match_ids(self.posts.values(), [post_id], "_id").get(post_id)
        judged = judge(claim, document, self.jobs.get(post_id), context, StoreSettings())
        if judged.job is not None:
            self.jobs[post_id] = judged.job
        elif judged.is_stale:
            del self.jobs[post_id]
        if isinstance(judged.verdict, jobs.Rejected) and document is not None:
            self._write(document, judged.verdict.result(context).document())
        return judged.verdict

    def finish(
        self, outcomes: Sequence[jobs.Outcome], context: jobs.ClaimContext
    ) -> list[jobs.Outcome]:
        self._require()
        return [self._finish(outcome, context) for outcome in outcomes]

    def _finish(self, outcome: jobs.Outcome, context: jobs.ClaimContext) -> jobs.Outcome:
        if isinstance(outcome, jobs.Unreadable):
            letter = unreadable_letter(outcome, context)
            self.jobs[letter.post_id] = letter
            return outcome
        started = outcome.started
        if isinstance(outcome, jobs.Tagged) and started.post_id in self.refuse:
            refused = Failure("store", "StoreRefused", "the result was refused")
            outcome = jobs.Dead(started, refused, outcome.timings_ms)
        document = self.posts[_key(started.document_id)]
        if isinstance(outcome, jobs.Tagged):
            if not self._write(document, outcome.result.document()):
                version = document["insight"]["version"]
                outcome = jobs.Superseded(started, version, outcome.timings_ms)
            elif (shadow := outcome.result.shadow) is not None:
                document["insight_shadow"] = shadow.document()
        elif isinstance(outcome, jobs.Dead):
            self._write(document, outcome.result(context.bundle).document())
        job = self.jobs.get(started.post_id)
        if job is not None and job.owner == context.owner:
            changes = changes_after(outcome, context)
            if changes is None:
                del self.jobs[started.post_id]
            else:
                self.jobs[started.post_id] = replace(job, **changes)
        return outcome

    def _write(self, document: Mapping[str, Any], content: dict[str, Any]) -> bool:
        known = document.get("insight")
        before = known.get("version") if isinstance(known, dict) else None
        status = known.get("status") if isinstance(known, dict) else None
        older = before is None or before < content["version"]
        same = before == content["version"]
        if older or (same and (content["status"] == "tagged" or status == "failed")):
            self.posts[_key(document["_id"])]["insight"] = content
            return True
        return False

    def renew(self, post_ids: Sequence[str], context: jobs.ClaimContext) -> None:
        self._require()
        for post_id in post_ids:
            job = self.jobs.get(post_id)
            if job is not None and job.owner == context.owner and job.state == "running":
                self.jobs[post_id] = replace(job, **context.lease)

    def claim_due(self, context: jobs.ClaimContext, limit: int) -> list[jobs.Job]:
        self._require()
        due = [
            job
            for job in self.jobs.values()
            if (job.due_at <= context.now and job.state != "dead")
            or (job.state == "waiting" and not context.waits(job))
        ]
        claimed = []
        for job in sorted(due, key=lambda job: job.due_at)[:limit]:
            later = context.now + context.lease_s
            self.jobs[job.post_id] = replace(
                job, state="queued", owner=f"{context.owner} publishes", lease_until=0, due_at=later
            )
            claimed.append(self.jobs[job.post_id])
        return claimed

    def published(self, post_ids: Sequence[str], context: jobs.ClaimContext) -> None:
        self._require()
        for post_id in post_ids:
            job = self.jobs.get(post_id)
            if job is not None and job.state == "queued":
                self.jobs[post_id] = replace(
                    job, owner=None, due_at=context.now + jobs.QUEUED_FOR_S
                )

    @property
    def now(self) -> float:
        return time.time()

    def release_dead(self, context: jobs.ClaimContext) -> int:
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
        without = (id_text(p["_id"]) for p in self.posts.values() if not p.get("insight"))
        return (post_id for post_id in without if post_id not in self.jobs)

    def partial_ids(self, context: jobs.ClaimContext) -> Iterator[str]:
        self._require()
        path, retry, now = StoreSettings().result_path, context.retry, context.now
        due = (
            key
            for key, post in self.posts.items()
            if tagged_by(post, path, context.bundle) and partial_attempts(post, path, retry, now)
        )
        return (post_id for post_id in map(id_text, due) if post_id not in self.jobs)

    def take_lease(self, name: str, context: jobs.ClaimContext, lease_s: float) -> bool:
        self._require()
        owner, until = self.leases.get(name, (context.owner, 0.0))
        if owner != context.owner and until > context.now and not context.is_dead(owner):
            return False
        self.leases[name] = (context.owner, context.now + lease_s)
        return True

    def job(self, post_id: str) -> jobs.Job | None:
        """Return one job, as `king.store.queries.PostQueries` does."""
        return self.jobs.get(post_id)

    def _require(self) -> None:
        if self.down.is_set():
            raise StoreUnavailable("fake://: switched off")


def _key(document_id: Any) -> Any:
    return document_id if isinstance(document_id, Hashable) else id_text(document_id)
