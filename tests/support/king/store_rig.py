"""Support for tests of the store and of the King: one store, and a look behind it."""

import time
from collections.abc import Mapping
from typing import Any

from common.post import Failure, Tag, TagResult
from common.retry import RetryPolicy
from config.settings import StoreSettings
from king.jobs import Claim, ClaimContext, Job, PostStore, Started, Tagged, Verdict
from king.messages import PostMessage
from king.store.client import StoreClient
from king.store.store import Store
from tests.support.fakes.store import FakeStore

NOW = 1_800_000_000.0
BUNDLE = ("demo", "20260101T000000Z-aa")


class StoreRig:
    """One empty store, of either kind."""

    def __init__(self, store: FakeStore | Store) -> None:
        self.real = store
        self.queries = store if isinstance(store, FakeStore) else store.queries
        self.store: PostStore = store

    def insert(self, *posts: Mapping[str, Any]) -> None:
        if isinstance(self.real, FakeStore):
            self.real.posts.update({post["_id"]: dict(post) for post in posts})
        else:
            self.real.client.posts.insert_many([dict(post) for post in posts])

    def result(self, document_id: Any, path: str = "insight") -> Any:
        """A post's result sub-document."""
        if isinstance(self.real, FakeStore):
            return self.real.posts[document_id].get(path)
        return (self.real.client.posts.find_one({"_id": document_id}) or {}).get(path)

    def results(self) -> dict[Any, Any]:
        if isinstance(self.real, FakeStore):
            return {key: post.get("insight") for key, post in self.real.posts.items()}
        return {post["_id"]: post.get("insight") for post in self.real.client.posts.find()}

    def job(self, post_id: str) -> Job | None:
        return self.queries.job(post_id)

    def the_job(self, post_id: str) -> Job:
        job = self.job(post_id)
        assert job is not None, post_id
        return job

    def set_job(self, job: Job) -> None:
        if isinstance(self.real, FakeStore):
            self.real.jobs[job.post_id] = job
        else:
            self.real.client.jobs.insert_one(job.as_document())


def mongo_settings(url: str, name: str, **changes: Any) -> StoreSettings:
    return StoreSettings(url=url, timeout_s=3, database=name, **changes)


def mongo_store(url: str, name: str, **changes: Any) -> Store:
    store = Store(StoreClient(mongo_settings(url, name, **changes)))
    store.connect()
    return store


def context(now: float = NOW, **changes: Any) -> ClaimContext:
    """Those of the King ``k1``."""
    values: dict[str, Any] = {"owner": "k1", "bundle": BUNDLE, "retry": RetryPolicy(3, 1, 10)}
    return ClaimContext(now=now, **{**values, **changes})


def claim(post_id: str, **changes: Any) -> Claim:
    redelivered = changes.pop("redelivered", False)
    return Claim(PostMessage(post_id, **changes), post_id, redelivered)


def begin_one(
    store: PostStore, post_id: str, conditions: ClaimContext | None = None, **changes: Any
) -> Verdict:
    [verdict] = store.begin([claim(post_id, **changes)], conditions or context())
    return verdict


def started(
    store: PostStore, post_id: str, conditions: ClaimContext | None = None, **changes: Any
) -> Started:
    verdict = begin_one(store, post_id, conditions, **changes)
    assert isinstance(verdict, Started), verdict
    return verdict


def tagged(
    begun: Started,
    version: str = BUNDLE[1],
    *names: str,
    partial: bool = False,
    ended_at: float | None = None,
) -> Tagged:
    result = TagResult(
        post_id=begun.post_id,
        model=BUNDLE[0],
        version=version,
        tags=tuple(Tag(i, name, 0.75) for i, name in enumerate(names or ("雨",))),
        modalities={"video": "missing", "image": "failed", "text": "ok"},
        failures={"image": Failure("fetch", "FetchRefused", "HTTP 404", retryable=partial)},
        partial=partial,
    )
    times = {"fetch": 3, "total": 9}
    now = time.time() if ended_at is None else ended_at
    return Tagged(begun, result.measured(times, attempts=begun.attempt, ended_at=now))


BROKEN = Failure("extract", "WorkerDied", "worker extract-0 died", retryable=True)
