"""What the commands ask of the database: posts without tags, dead letters, counts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

from bson import ObjectId

from king.jobs import JOB_STATES, QUEUED_FOR_S, Bundle, Job
from king.messages import PostMessage
from king.store.client import MongoEdge
from king.store.documents import dig, id_candidates, match_ids, read_post
from workers.protocol import Post

_CHUNK = 500


@dataclass(frozen=True, slots=True)
class StoredPost:
    """A post as the database has it.

    Attributes:
        result: The result sub-document; None before the first.
    """

    post: Post
    result: Mapping[str, Any] | None


class Archive(MongoEdge):
    """Reading the posts and keeping the dead letters; every method raises `StoreUnavailable`."""

    def untagged_ids(self, limit: int | None = None, bundle: Bundle | None = None) -> Iterator[str]:
        """IDs of posts to publish, as text.

        Args:
            limit: At most so many.
            bundle: None gives the posts that have no result at all; a bundle gives those that
                it has not tagged. Posts that have a job are left out either way: they will be
                tried again by themselves, or are dead letters.
        """
        path = self.settings.result_path
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

    def matching_ids(self, condition: Mapping[str, Any], limit: int | None = None) -> Iterator[str]:
        """IDs of the posts that match a MongoDB condition, as text, while they are read."""
        yield from islice(self._ids(condition), limit)

    def matching(self, condition: Mapping[str, Any]) -> int:
        """How many posts match a MongoDB condition."""
        with self.edge():
            return int(self.posts.count_documents(condition))

    def among(self, post_ids: Iterable[str], condition: Mapping[str, Any]) -> Iterator[str]:
        """Those of the IDs whose posts are there and match a condition, in order."""
        path = self.settings.fields.id
        for chunk in _chunks(post_ids):
            wanted = [value for post_id in chunk for value in id_candidates(post_id)]
            found = set(self._ids({"$and": [{path: {"$in": wanted}}, condition]}))
            yield from (post_id for post_id in chunk if post_id in found)

    def _ids(self, condition: Mapping[str, Any]) -> Iterator[str]:
        path = self.settings.fields.id
        with self.edge():
            for document in self.posts.find(condition, {"_id": 1, path: 1}):
                value = dig(document, path)
                if isinstance(value, (str, int, ObjectId)) and not isinstance(value, bool):
                    yield str(value)

    def _without_jobs(self, post_ids: Iterator[str]) -> Iterator[str]:
        while chunk := list(islice(post_ids, _CHUNK)):
            with self.edge():
                cursor = self.jobs.find({"_id": {"$in": chunk}}, {"_id": 1})
                taken = {document["_id"] for document in cursor}
            yield from (post_id for post_id in chunk if post_id not in taken)

    def post(self, post_id: str) -> StoredPost | None:
        """One post with its result, or None when there is no such post."""
        fields = self.settings.fields
        with self.edge():
            cursor = self.posts.find({fields.id: {"$in": id_candidates(post_id)}})
            document = match_ids(cursor, [post_id], fields.id).get(post_id)
        if document is None:
            return None
        result = dig(document, self.settings.result_path)
        return StoredPost(
            post=read_post(post_id, document, fields),
            result=result if isinstance(result, dict) else None,
        )

    def job(self, post_id: str) -> Job | None:
        """The job of one post, or of one unreadable message."""
        with self.edge():
            document = self.jobs.find_one({"_id": post_id})
        return Job.of(document) if document is not None else None

    def dead_among(self, post_ids: Iterable[str]) -> dict[str, Job]:
        """Those of the IDs that are dead letters, with their jobs."""
        found: dict[str, Job] = {}
        for chunk in _chunks(post_ids):
            with self.edge():
                cursor = self.jobs.find({"_id": {"$in": chunk}, "state": "dead"})
                found.update((job.post_id, job) for job in map(Job.of, cursor))
        return found

    def dead_letters(
        self,
        *,
        stage: str | None = None,
        type: str | None = None,
        since: datetime | float | None = None,
        limit: int = 100,
    ) -> list[Job]:
        """Dead letters, the newest first.

        Args:
            stage: Only those that failed in this stage.
            type: Only those of this error class.
            since: Only those set aside since then; a number is seconds since the epoch.
            limit: At most so many.
        """
        condition: dict[str, Any] = {"state": "dead"}
        if stage is not None:
            condition["last_error.stage"] = stage
        if type is not None:
            condition["last_error.type"] = type
        if since is not None:
            seconds = since.timestamp() if isinstance(since, datetime) else float(since)
            condition["updated_at"] = {"$gte": seconds}
        with self.edge():
            found = self.jobs.find(condition).sort("updated_at", -1).limit(limit)
            return [Job.of(document) for document in found]

    def replay(self, post_ids: Iterable[str]) -> list[PostMessage]:
        """Give dead letters all their attempts again.

        Letters of unreadable messages stay: there is nothing to publish.

        Args:
            post_ids: Which; those that are no dead letters are left out.

        Returns:
            The messages to publish. When they are not, the daemon publishes them later.
        """
        now = time.time()
        replayed: list[PostMessage] = []
        for chunk in _chunks(post_ids):
            with self.edge():
                cursor = self.jobs.find({"_id": {"$in": chunk}, "state": "dead"})
                jobs = [job for job in map(Job.of, cursor) if job.names_a_post]
                change = {
                    "state": "queued",
                    "attempts": 0,
                    "due_at": now + QUEUED_FOR_S,
                    "owner": None,
                    "updated_at": now,
                }
                keys = [job.post_id for job in jobs]
                self.jobs.update_many({"_id": {"$in": keys}, "state": "dead"}, {"$set": change})
            replayed += [job.message for job in jobs]
        return replayed

    def drop(self, post_ids: Iterable[str]) -> int:
        """Delete dead letters; gives how many."""
        dropped = 0
        for chunk in _chunks(post_ids):
            with self.edge():
                result = self.jobs.delete_many({"_id": {"$in": chunk}, "state": "dead"})
            dropped += result.deleted_count
        return dropped

    def counts(self) -> dict[str, Any]:
        """``{posts, tagged, failed, untagged, jobs: {running, waiting, queued, dead}}``."""
        status = f"{self.settings.result_path}.status"
        with self.edge():
            posts = int(self.posts.count_documents({}))
            tagged = int(self.posts.count_documents({status: "tagged"}))
            failed = int(self.posts.count_documents({status: "failed"}))
            jobs = {s: int(self.jobs.count_documents({"state": s})) for s in JOB_STATES}
        untagged = posts - tagged - failed
        return {
            "posts": posts,
            "tagged": tagged,
            "failed": failed,
            "untagged": untagged,
            "jobs": jobs,
        }


def _chunks(items: Iterable[str]) -> Iterator[Sequence[str]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk
