"""The queue and the database behind `/v1/posts`, connected to at their first use.

Tagging needs neither: while they are down, only these requests fail.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from common.errors import TaggingError
from config.settings import Settings
from king.broker.connect import publish_posts, queue_depth
from king.jobs import Job
from king.messages import PostMessage
from king.store.client import StoreClient
from king.store.queries import PostQueries, StoredPost, open_queries

_EMBEDDED = "embedded://"
_DOWN = "the embedded service is not running; the first request for /v1/posts starts it"


@dataclass(frozen=True)
class Services:
    """Makers of URLs that can be connected to, out of ``embedded://``.

    Attributes:
        resolve: Returns settings with real URLs; starts embedded services that are down.
        peek: Returns the same but starts nothing: a service that is down keeps ``embedded://``.
    """

    resolve: Callable[[], Settings]
    peek: Callable[[], Settings]


@dataclass
class _Shared:
    """A connection and its number of users: the threads that read with it, and the backend."""

    client: StoreClient
    users: int = 1


class Backend:
    """The queue and the database, for the threads of a server."""

    def __init__(self, services: Services, *, probe_timeout_s: float) -> None:
        self._services = services
        self._probe_timeout_s = probe_timeout_s
        self._lock = threading.Lock()
        self._settings: Settings | None = None
        self._shared: _Shared | None = None

    def publish(self, message: PostMessage) -> None:
        """Put a post on the queue; return when the broker has confirmed it.

        Raises:
            TaggingError: The broker does not answer.
        """
        try:
            publish_posts(self._resolved().broker, [message])
        except TaggingError:
            self._forget()
            raise

    def look_up(self, post_id: str) -> tuple[StoredPost | None, Job | None]:
        """Return a post with its result, and its job.

        Raises:
            TaggingError: The database does not answer.
        """
        try:
            with self._open_queries(self._resolved()) as queries:
                return queries.post(post_id), queries.job(post_id)
        except TaggingError:
            self._forget()
            raise

    def trouble(self) -> dict[str, str | None]:
        """Return the error of ``broker`` and ``store``, None where it answers; start nothing."""
        settings = self._services.peek()
        return {"broker": self._broker_trouble(settings), "store": self._store_trouble(settings)}

    def close(self) -> None:
        """Close the connections; one in use closes when its last user is done."""
        self._forget()

    def _resolved(self) -> Settings:
        with self._lock:
            if self._settings is None:
                self._settings = self._services.resolve()
            return self._settings

    @contextmanager
    def _open_queries(self, settings: Settings) -> Iterator[PostQueries]:
        with self._lock:
            if self._shared is None:
                self._shared = _Shared(StoreClient(settings.store))
            shared = self._shared
            shared.users += 1
        try:
            yield PostQueries(shared.client)
        finally:
            self._leave(shared)

    def _forget(self) -> None:
        """Resolve again next time: an embedded service may come back on another port."""
        with self._lock:
            shared, self._shared, self._settings = self._shared, None, None
        if shared is not None:
            self._leave(shared)

    def _leave(self, shared: _Shared) -> None:
        """Close after the last user: others may be in the middle of reading."""
        with self._lock:
            shared.users -= 1
            last = shared.users == 0
        if last:
            shared.client.close()

    def _broker_trouble(self, settings: Settings) -> str | None:
        if settings.broker.url.startswith(_EMBEDDED):
            return _DOWN
        timeout_s = min(settings.broker.socket_timeout_s, self._probe_timeout_s)
        quick = settings.broker.model_copy(update={"socket_timeout_s": timeout_s})
        try:
            queue_depth(quick)
        except TaggingError as error:
            return _described(error)
        return None

    def _store_trouble(self, settings: Settings) -> str | None:
        if settings.store.url.startswith(_EMBEDDED):
            return _DOWN
        timeout_s = min(settings.store.timeout_s, self._probe_timeout_s)
        quick = settings.store.model_copy(update={"timeout_s": timeout_s})
        try:
            with open_queries(quick) as queries:
                queries.job("")
        except TaggingError as error:
            return _described(error)
        return None


def _described(error: TaggingError) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def state_of(stored: StoredPost | None, job: Job | None) -> dict[str, Any]:
    """Return the state of a post as the API shows it.

    Returns:
        ``state``: ``tagged``, ``failed``, ``queued`` (a retry is due), ``in_flight``, ``dead``, or
        ``untagged`` (it waits for its first attempt or was never published); ``result``: what
        is stored, or None; ``job``: ``{state, attempts, due_at, error}``, or None. Times are
        in ISO 8601.
    """
    result = dict(stored.result) if stored is not None and stored.result else None
    if result is not None and hasattr(result.get("tagged_at"), "isoformat"):
        result["tagged_at"] = result["tagged_at"].isoformat()
    states = {"running": "in_flight", "waiting": "queued", "queued": "queued", "dead": "dead"}
    if job is not None:
        state = states[job.state]
    else:
        status = result.get("status") if result else None
        state = status if status in ("tagged", "failed") else "untagged"
    about = None
    if job is not None:
        error = dict(job.last_error) if job.last_error else None
        due_at = None
        if job.state in ("waiting", "queued"):
            due_at = datetime.fromtimestamp(job.due_at, timezone.utc).isoformat()
        about = {"state": job.state, "attempts": job.attempts, "due_at": due_at, "error": error}
    return {"state": state, "result": result, "job": about}
