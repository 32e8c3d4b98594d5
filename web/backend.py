"""The queue and the database behind `/v1/posts`; found and reached when they are first used.

Tagging needs neither: where they are away, only these requests fail.
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
from king.store.queries import Archive, StoredPost

_EMBEDDED = "embedded://"
_DOWN = "the embedded service is not running; the first request for /v1/posts starts it"


@dataclass(frozen=True)
class Services:
    """How the settings come by URLs that can be connected to.

    Attributes:
        resolve: Settings with real URLs; starts embedded services that are down.
        peek: The same, and starts nothing: what is down keeps its ``embedded://`` URL.
    """

    resolve: Callable[[], Settings]
    peek: Callable[[], Settings]


@dataclass
class _Shared:
    """A connection and how many hold it: the threads that read with it, and the backend."""

    archive: Archive
    users: int = 1


class Backend:
    """The queue and the database, for the threads of a server."""

    def __init__(self, services: Services, *, probe_timeout_s: float) -> None:
        """Nothing is reached yet."""
        self._services = services
        self._probe_timeout_s = probe_timeout_s
        self._lock = threading.Lock()
        self._settings: Settings | None = None
        self._archive: _Shared | None = None

    def publish(self, message: PostMessage) -> None:
        """Put a post on the queue; returns when the broker has it.

        Raises:
            TaggingError: It is not reached.
        """
        try:
            publish_posts(self._found().broker, [message])
        except TaggingError:
            self._forget()
            raise

    def look_up(self, post_id: str) -> tuple[StoredPost | None, Job | None]:
        """A post with its result, and its job.

        Raises:
            TaggingError: The database is not reached.
        """
        try:
            with self._open_archive(self._found()) as archive:
                return archive.post(post_id), archive.job(post_id)
        except TaggingError:
            self._forget()
            raise

    def trouble(self) -> dict[str, str | None]:
        """``broker`` and ``store``: None where it answers, else why not. Starts nothing."""
        settings = self._services.peek()
        return {"broker": self._broker_trouble(settings), "store": self._store_trouble(settings)}

    def close(self) -> None:
        """Close the connections; those that are being read with, at the end of that."""
        self._forget()

    # Parts ------------------------------------------------------------------------------------

    def _found(self) -> Settings:
        with self._lock:
            if self._settings is None:
                self._settings = self._services.resolve()
            return self._settings

    @contextmanager
    def _open_archive(self, settings: Settings) -> Iterator[Archive]:
        with self._lock:
            if self._archive is None:
                self._archive = _Shared(Archive(settings.store))
            shared = self._archive
            shared.users += 1
        try:
            yield shared.archive
        finally:
            self._leave(shared)

    def _forget(self) -> None:
        """Look again next time: an embedded service may come back elsewhere."""
        with self._lock:
            shared, self._archive, self._settings = self._archive, None, None
        if shared is not None:
            self._leave(shared)

    def _leave(self, shared: _Shared) -> None:
        """The last one closes: others may be in the middle of reading."""
        with self._lock:
            shared.users -= 1
            last = shared.users == 0
        if last:
            shared.archive.close()

    def _broker_trouble(self, settings: Settings) -> str | None:
        if settings.broker.url.startswith(_EMBEDDED):
            return _DOWN
        timeout_s = min(settings.broker.socket_timeout_s, self._probe_timeout_s)
        quick = settings.broker.model_copy(update={"socket_timeout_s": timeout_s})
        try:
            queue_depth(quick)
        except TaggingError as error:
            return _said(error)
        return None

    def _store_trouble(self, settings: Settings) -> str | None:
        if settings.store.url.startswith(_EMBEDDED):
            return _DOWN
        timeout_s = min(settings.store.timeout_s, self._probe_timeout_s)
        archive = Archive(settings.store.model_copy(update={"timeout_s": timeout_s}))
        try:
            archive.job("")
        except TaggingError as error:
            return _said(error)
        finally:
            archive.close()
        return None


def _said(error: TaggingError) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def state_of(stored: StoredPost | None, job: Job | None) -> dict[str, Any]:
    """Where a post stands.

    Returns:
        ``state``: ``tagged``, ``failed``, ``queued`` (a retry is due), ``in_flight``, ``dead``, or
        ``untagged`` (it waits for its first attempt, or was never published); ``result``: what
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
