"""The queue and the database behind `/v1/posts`.

Tagging needs neither: while they are down, only these requests fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from common.errors import TaggingError, one_line
from config.settings import Settings, StoreSettings
from king.broker.connect import publish_posts, queue_depth
from king.jobs import Job
from king.messages import PostMessage
from king.store.queries import StoredPost, open_queries

_EMBEDDED = "embedded://"
_DOWN = "the embedded service is not running; the first request for /v1/posts starts it"


@dataclass(frozen=True)
class Services:
    """Makers of settings whose ``embedded://`` URLs can be connected to.

    `resolve` starts embedded services that are down; `peek` leaves their URLs as they are.
    """

    resolve: Callable[[], Settings]
    peek: Callable[[], Settings]


class Backend:
    """The queue and the database, for the threads of a server; each request connects anew."""

    def __init__(self, services: Services, *, probe_timeout_s: float) -> None:
        self._services = services
        self._probe_timeout_s = probe_timeout_s
        self._settings: Settings | None = None

    def publish(self, message: PostMessage) -> str | None:
        """Put a post on the queue; return when the broker has confirmed it.

        The answer is a warning when the database can be asked and has no such post.
        """
        with self._resolved() as settings:
            publish_posts(settings.broker, [message])
            store = settings.store
        timeout_s = min(store.timeout_s, self._probe_timeout_s)
        try:
            with open_queries(store.model_copy(update={"timeout_s": timeout_s})) as queries:
                if not queries.unknown([message.post_id]):
                    return None
        except TaggingError:  # the queue is what was asked for
            return None
        return (
            f"{store.database}.{store.collection} has no such post: unless it is there when its "
            "turn comes, it becomes a dead letter"
        )

    def look_up(self, post_id: str) -> tuple[StoredPost | None, Job | None]:
        """Return a post with its result, and its job."""
        with self._resolved() as settings, open_queries(settings.store) as queries:
            return queries.post(post_id), queries.job(post_id)

    @contextmanager
    def _resolved(self) -> Iterator[Settings]:
        self._settings = self._settings or self._services.resolve()
        try:
            yield self._settings
        except TaggingError:
            self._settings = None  # an embedded service may come back on another port
            raise

    def trouble(self) -> dict[str, str | None]:
        """Return the error of ``broker`` and ``store``, None where it answers; start nothing."""
        settings, limit_s = self._services.peek(), self._probe_timeout_s
        broker, store = settings.broker, settings.store
        broker_s, store_s = min(broker.socket_timeout_s, limit_s), min(store.timeout_s, limit_s)
        quick_broker = broker.model_copy(update={"socket_timeout_s": broker_s})
        quick_store = store.model_copy(update={"timeout_s": store_s})
        return {
            "broker": _trouble(broker.url, lambda: queue_depth(quick_broker)),
            "store": _trouble(store.url, lambda: _ask(quick_store)),
        }


def _ask(settings: StoreSettings) -> None:
    with open_queries(settings) as queries:
        queries.job("")


def _trouble(url: str, ask: Callable[[], object]) -> str | None:
    if url.startswith(_EMBEDDED):
        return _DOWN
    try:
        ask()
    except TaggingError as error:
        return f"{type(error).__name__}: {one_line(error)}"
    return None


def state_of(stored: StoredPost | None, job: Job | None) -> dict[str, Any]:
    """Return ``{state, result, job}`` of a post as the API shows it; times are in ISO 8601.

    The state is ``tagged``, ``failed``, ``queued`` (a retry is due), ``in_flight``, ``dead``, or
    ``untagged`` (it waits for its first attempt or was never published).
    """
    result = dict(stored.result) if stored is not None and stored.result else None
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
