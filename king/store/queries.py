"""Queries of the commands, HTTP and the monitor: posts without tags, dead letters, counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from typing import Any

import structlog

from common.post import Post
from common.retry import RetryPolicy
from config.settings import StoreSettings
from king.jobs import JOB_STATES, QUEUED_FOR_S, Bundle, Job
from king.messages import PostMessage
from king.store.client import StoreClient, all_of
from king.store.documents import (
    NoIdError,
    dig,
    id_text,
    match_ids,
    read_post,
    shadow_path,
    whole_fields,
)

# IDs of one query. At half, twice as many round trips; at double, filters of 100 kB and more.
_CHUNK = 500

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class StoredPost:
    """A post as the database has it, with its result sub-document; None before the first."""

    post: Post
    result: Mapping[str, Any] | None


class PostQueries:
    """Queries of posts and dead letters; every method may raise `StoreUnavailable`."""

    def __init__(self, client: StoreClient) -> None:
        self._client = client
        self._settings = client.settings

    def ping(self) -> None:
        """Check that the database answers."""
        with self._client.edge():
            self._client.database.client.admin.command("ping")

    def untagged_ids(self, limit: int | None = None, bundle: Bundle | None = None) -> Iterator[str]:
        """Yield the IDs of posts without a result, or not tagged by a bundle, as text.

        Posts that have a job are left out: they are tried again by themselves, or are dead letters.
        """
        path = self._settings.result_path
        condition: dict[str, Any] = {f"{path}.status": None}
        if bundle is not None:
            condition = {
                "$or": [
                    {f"{path}.status": {"$ne": "tagged"}},
                    {f"{path}.version": {"$ne": bundle[1]}},
                    {f"{path}.model": {"$ne": bundle[0]}},
                ]
            }
        yield from islice(self._without_jobs(self._ids(condition)), limit)

    def partial_ids(self, bundle: Bundle, retry: RetryPolicy, now: float) -> Iterator[str]:
        """Yield the IDs of posts whose partial result of this bundle may be improved now.

        `documents.partial_attempts` decides the same for one document.
        """
        path = self._settings.result_path
        due = [
            {f"{path}.attempts": attempts, f"{path}.tagged_at": {"$lte": _date(now - delay_s)}}
            for attempts in range(1, 2 * retry.attempts)
            if (delay_s := retry.partial_delay_s(attempts)) is not None
        ]
        partial = {f"{path}.partial": True}
        served = {f"{path}.model": bundle[0], f"{path}.version": bundle[1]}
        yield from self._without_jobs(self._ids(all_of(partial, served, {"$or": due})))

    def matching_ids(self, condition: Mapping[str, Any], limit: int | None = None) -> Iterator[str]:
        """Yield the IDs of the posts that match a MongoDB condition, as text."""
        yield from islice(self._ids(condition), limit)

    def matching(self, condition: Mapping[str, Any]) -> int:
        """Return the number of posts that match a MongoDB condition."""
        with self._client.edge():
            return int(self._client.posts.count_documents(condition))

    def among(self, post_ids: Iterable[str], condition: Mapping[str, Any]) -> Iterator[str]:
        """Yield those of the IDs whose posts exist and match a condition, in order."""
        path = self._settings.fields.id
        for chunk in _chunks(post_ids):
            with self._client.edge():
                named = all_of(self._client.named(chunk), condition)
                matching = match_ids(
                    self._client.posts.find(named, {"_id": 1, path: 1}), chunk, path
                )
            yield from (post_id for post_id in chunk if post_id in matching)

    def unknown(self, post_ids: Sequence[str]) -> list[str]:
        """Return those of the IDs that name no post."""
        known = set(self.among(post_ids, {}))
        return [post_id for post_id in post_ids if post_id not in known]

    def _ids(self, condition: Mapping[str, Any]) -> Iterator[str]:
        path = self._settings.fields.id
        told: set[type] = set()
        with self._client.edge():
            for document in self._client.posts.find(condition, {"_id": 1, path: 1}):
                value = dig(document, path)
                try:
                    yield id_text(value)
                except NoIdError as error:
                    if type(value) not in told:
                        told.add(type(value))
                        shown = repr(document["_id"])[:100]
                        log.warning("store.post_without_id", _id=shown, path=path, why=str(error))

    def _without_jobs(self, post_ids: Iterator[str]) -> Iterator[str]:
        while chunk := list(islice(post_ids, _CHUNK)):
            with self._client.edge():
                cursor = self._client.jobs.find({"_id": {"$in": chunk}}, {"_id": 1})
                taken = {document["_id"] for document in cursor}
            yield from (post_id for post_id in chunk if post_id not in taken)

    def post(self, post_id: str) -> StoredPost | None:
        """Return one post with its result, or None when there is no such post."""
        fields = self._settings.fields
        with self._client.edge():
            cursor = self._client.posts.find(self._client.named([post_id]))
            document = match_ids(cursor, [post_id], fields.id).get(post_id)
        if document is None:
            return None
        result = dig(document, self._settings.result_path)
        return StoredPost(
            post=read_post(post_id, document, fields),
            result=result if isinstance(result, dict) else None,
        )

    def on_trial(
        self, version: str | None, limit: int
    ) -> Iterator[tuple[StoredPost, Mapping[str, Any]]]:
        """Yield tagged posts with the result of a bundle on trial, the highest ``_id`` first.

        ``version`` is that of the bundle on trial; None takes any.
        """
        fields, served, trial = (
            self._settings.fields,
            self._settings.result_path,
            shadow_path(self._settings),
        )
        tried = {f"{trial}.version": version} if version else {f"{trial}.status": "tagged"}
        condition = all_of({f"{served}.status": "tagged"}, tried)
        paths = whole_fields(("_id", fields.id, fields.labels, served, trial))
        with self._client.edge():
            cursor = self._client.posts.find(condition, paths).sort("_id", -1).limit(limit)
            for document in cursor:
                post = read_post(id_text(dig(document, fields.id)), document, fields)
                yield StoredPost(post, dig(document, served)), dig(document, trial)

    def newest(self, limit: int) -> Iterator[Mapping[str, Any]]:
        """Yield the documents with the highest ``_id``, whole."""
        with self._client.edge():
            yield from self._client.posts.find().sort("_id", -1).limit(limit)

    def job(self, post_id: str) -> Job | None:
        """Return the job of one post, or of one unreadable message."""
        with self._client.edge():
            document = self._client.jobs.find_one({"_id": post_id})
        return Job.of(document) if document is not None else None

    def dead_among(self, post_ids: Iterable[str]) -> dict[str, Job]:
        """Return the jobs of those IDs that are dead letters."""
        dead: dict[str, Job] = {}
        for chunk in _chunks(post_ids):
            with self._client.edge():
                cursor = self._client.jobs.find({"_id": {"$in": chunk}, "state": "dead"})
                dead.update((job.post_id, job) for job in map(Job.of, cursor))
        return dead

    def dead_letters(
        self,
        *,
        stage: str | None = None,
        type: str | None = None,
        since_s: float | None = None,
        limit: int = 100,
    ) -> list[Job]:
        """Return the dead letters of a stage, an error class, or since a time; newest first."""
        condition: dict[str, Any] = {"state": "dead"}
        if stage is not None:
            condition["last_error.stage"] = stage
        if type is not None:
            condition["last_error.type"] = type
        if since_s is not None:
            condition["updated_at"] = {"$gte": since_s}
        with self._client.edge():
            cursor = self._client.jobs.find(condition).sort("updated_at", -1).limit(limit)
            return [Job.of(document) for document in cursor]

    def replay(self, post_ids: Iterable[str]) -> list[PostMessage]:
        """Give dead letters all their attempts again, and return the messages to publish.

        Other IDs, and letters of unreadable messages, are ignored.
        """
        self._client.read_clock()
        now = self._client.now
        replayed: list[PostMessage] = []
        for chunk in _chunks(post_ids):
            with self._client.edge():
                cursor = self._client.jobs.find({"_id": {"$in": chunk}, "state": "dead"})
                jobs = [job for job in map(Job.of, cursor) if job.names_a_post]
                change = {
                    "state": "queued",
                    "attempts": 0,
                    "due_at": now + QUEUED_FOR_S,
                    "owner": None,
                    "updated_at": now,
                }
                keys = [job.post_id for job in jobs]
                self._client.jobs.update_many(
                    {"_id": {"$in": keys}, "state": "dead"}, {"$set": change}
                )
            replayed += [job.message for job in jobs]
        return replayed

    def drop(self, post_ids: Iterable[str]) -> int:
        """Delete dead letters and return their number."""
        dropped = 0
        for chunk in _chunks(post_ids):
            with self._client.edge():
                result = self._client.jobs.delete_many({"_id": {"$in": chunk}, "state": "dead"})
            dropped += result.deleted_count
        return dropped

    def counts(self) -> dict[str, Any]:
        """Return ``{posts, tagged, partial, failed, untagged, jobs: {running, waiting, ...}}``.

        Partial results are among the tagged.
        """
        status = f"{self._settings.result_path}.status"
        with self._client.edge():
            posts = int(self._client.posts.count_documents({}))
            tagged = int(self._client.posts.count_documents({status: "tagged"}))
            partial = {f"{self._settings.result_path}.partial": True}
            in_part = int(self._client.posts.count_documents(partial))
            failed = int(self._client.posts.count_documents({status: "failed"}))
            jobs = {s: int(self._client.jobs.count_documents({"state": s})) for s in JOB_STATES}
        untagged = posts - tagged - failed
        return {
            "posts": posts,
            "tagged": tagged,
            "partial": in_part,
            "failed": failed,
            "untagged": untagged,
            "jobs": jobs,
        }


@contextmanager
def open_queries(settings: StoreSettings) -> Iterator[PostQueries]:
    """Yield the queries to one database, and close its connections at the end."""
    client = StoreClient(settings)
    try:
        yield PostQueries(client)
    finally:
        client.close()


def _date(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


def _chunks(items: Iterable[str]) -> Iterator[Sequence[str]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk
