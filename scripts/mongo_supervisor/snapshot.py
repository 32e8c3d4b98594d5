"""Measurements of the database and the queue; each may be missing, with its reason."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, TypeVar

from bson.errors import BSONError

from common.errors import StoreUnavailable, TaggingError
from common.times import moment_of
from config.settings import MonitorSettings, Settings
from deploy import embedded
from king.broker.connect import queue_depth
from king.jobs import JOB_STATES, OPEN_STATES
from king.store.client import StoreClient
from king.store.documents import dig, whole_fields
from scripts.commands.common import DOWN

T = TypeVar("T")

_PINGS = 3  # one slow answer is no trend; more would make each look longer


@dataclass(frozen=True)
class Backlog:
    """Numbers of posts without a result: all, those old enough to count, those of unknown age.

    Incomplete when there are more than `monitor.scan`; no oldest when no age is known.
    """

    untagged: int
    old: int
    ageless: int
    oldest_s: float | None
    complete: bool


@dataclass(frozen=True)
class Results:
    """Results within the recent window, and the seconds since the last tag of all."""

    tagged: int
    failed: int
    last_tag_s: float | None


@dataclass(frozen=True)
class Jobs:
    """Numbers of jobs, by state, and of those that are due."""

    states: Mapping[str, int]
    due: int
    overdue: int


@dataclass(frozen=True)
class Replicas:
    """A replica set: member -> state, empty without the right to ask; member -> lag."""

    name: str
    states: Mapping[str, str] = field(default_factory=dict)
    lag_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """One look; a missing measurement is None, and `errors` has its reason by field name.

    `replicas` are None also where the database is not a replica set.
    """

    latency_s: float | None
    queue_depth: int | None
    errors: Mapping[str, str]
    replicas: Replicas | None = None
    backlog: Backlog | None = None
    results: Results | None = None
    jobs: Jobs | None = None


def look(asked: Settings) -> Snapshot:
    """Take a snapshot; start no service, and never raise for one that does not answer."""
    settings = embedded.peek(asked)
    limits = settings.monitor
    errors: dict[str, str] = {}

    def ask(name: str, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except TaggingError as error:
            errors[name] = str(error)
        except BSONError as error:  # a post may hold a date that Python cannot represent
            errors[name] = f"unreadable document: {error}"
        return None

    depth = ask("queue_depth", lambda: _queue_depth(settings))
    timeout_s = min(settings.store.timeout_s, limits.timeout_s)
    client = StoreClient(settings.store.model_copy(update={"timeout_s": timeout_s}))
    database = Database(client, limits)
    with contextlib.closing(client):
        latency_s = ask("latency_s", database.latency_s)
        if latency_s is None:
            return Snapshot(None, depth, errors)
        return Snapshot(
            latency_s,
            depth,
            errors,
            replicas=ask("replicas", database.replicas),
            backlog=ask("backlog", database.backlog),
            results=ask("results", database.results),
            jobs=ask("jobs", database.open_and_dead),
        )


def _queue_depth(settings: Settings) -> int:
    broker = settings.broker
    if broker.url.startswith(embedded.SCHEME):
        raise TaggingError(DOWN)
    timeout_s = min(broker.socket_timeout_s, settings.monitor.timeout_s)
    return queue_depth(broker.model_copy(update={"socket_timeout_s": timeout_s}))


class Database:
    """Questions to the database; each raises `StoreUnavailable`."""

    def __init__(self, client: StoreClient, limits: MonitorSettings) -> None:
        self._client = client
        self._settings = settings = client.settings
        self._limits = limits
        self._time_limit_ms = round(settings.timeout_s * 1000)
        self._now = time.time()

    def latency_s(self) -> float:
        """Return the median of a few pings on an open connection."""
        if self._settings.url.startswith(embedded.SCHEME):
            raise StoreUnavailable(DOWN)
        with self._client.edge():
            self._ping_s()  # connects
            return statistics.median(self._ping_s() for _ in range(_PINGS))

    def _ping_s(self) -> float:
        began = time.perf_counter()
        self._client.database.command("ping")
        return time.perf_counter() - began

    def replicas(self) -> Replicas | None:
        """Return state and lag of each member; only the set's name without the right to ask."""
        with self._client.edge():
            name = self._admin("hello").get("setName")
        if not isinstance(name, str):
            return None
        try:
            with self._client.edge():
                status = self._admin("replSetGetStatus")
        except StoreUnavailable:
            return Replicas(name)
        return replicas_of(name, status)

    def _admin(self, command: str) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = self._client.database.client.admin.command(command)
        return answer

    def backlog(self) -> Backlog:
        """Read the posts without a result, since their ages stand in fields of any type."""
        path = self._settings.fields.created or "_id"
        fields = whole_fields(["_id", path])
        condition = {f"{self._settings.result_path}.status": None}
        limit = self._limits.scan
        count = old = ageless = 0
        oldest_s: float | None = None
        with self._client.edge():
            cursor = self._client.posts.find(condition, fields).limit(limit + 1)
            for document in cursor.max_time_ms(self._time_limit_ms):
                count += 1
                made_at = moment_of(dig(document, path))
                if made_at is None:
                    ageless += 1
                    old += self._limits.backlog_age_s == 0
                    continue
                age_s = self._now - made_at
                oldest_s = age_s if oldest_s is None else max(oldest_s, age_s)
                old += age_s >= self._limits.backlog_age_s
        return Backlog(min(count, limit), min(old, limit), ageless, oldest_s, count <= limit)

    def results(self) -> Results:
        """Count the results of the recent window, and find the last tag."""
        path = self._settings.result_path
        since = datetime.fromtimestamp(self._now - self._limits.window_s, timezone.utc)
        recent = {f"{path}.tagged_at": {"$gte": since}}
        with self._client.edge():
            tagged, failed = (
                self._count(self._client.posts, {**recent, f"{path}.status": status})
                for status in ("tagged", "failed")
            )
            cursor = self._client.posts.find({f"{path}.status": "tagged"}, whole_fields([path]))
            newest = cursor.sort(f"{path}.tagged_at", -1).limit(1)
            dates = [dig(d, f"{path}.tagged_at") for d in newest.max_time_ms(self._time_limit_ms)]
        last_at = moment_of(dates[0]) if dates else None
        last_tag_s = max(0.0, self._now - last_at) if last_at is not None else None
        return Results(tagged, failed, last_tag_s)

    def open_and_dead(self) -> Jobs:
        """Count the jobs by state, and those that a King should have looked at by now."""
        opened = {"state": {"$in": list(OPEN_STATES)}}
        overdue_at = self._now - self._limits.overdue_s
        with self._client.edge():
            jobs = self._client.jobs
            return Jobs(
                states={state: self._count(jobs, {"state": state}) for state in JOB_STATES},
                due=self._count(jobs, {**opened, "due_at": {"$lte": self._now}}),
                overdue=self._count(jobs, {**opened, "due_at": {"$lte": overdue_at}}),
            )

    def _count(self, collection: Any, condition: Mapping[str, Any]) -> int:
        return int(collection.count_documents(condition, maxTimeMS=self._time_limit_ms))


def replicas_of(name: str, status: Mapping[str, Any]) -> Replicas:
    """Read an answer to ``replSetGetStatus``; ignore members without the expected keys."""
    members = [m for m in status.get("members") or () if isinstance(m, Mapping)]
    states = {str(m.get("name")): str(m.get("stateStr") or "UNKNOWN") for m in members}
    written = {
        str(m.get("name")): m["optimeDate"].timestamp()
        for m in members
        if isinstance(m.get("optimeDate"), datetime)
    }
    primary = next((written.get(n) for n, state in states.items() if state == "PRIMARY"), None)
    lags = {
        member: max(0.0, primary - at)
        for member, at in written.items()
        if primary is not None and states[member] == "SECONDARY"
    }
    return Replicas(name, states, lags)
