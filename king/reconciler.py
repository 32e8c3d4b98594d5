"""The reconciler: finds posts that nobody will tag, since they have neither a result nor a job.

Their messages were lost before a King saw them, or were never sent. One King at a time looks for
them, by a lease in the database; a post that is published needlessly is settled or joins its
running job, so that a second message does no harm.
"""

from __future__ import annotations

import time
from itertools import islice

import structlog

from common.errors import MessageError, StoreRefused, StoreUnavailable
from king.jobs import ClaimContext
from king.messages import PostMessage, parse_message
from king.store.store import Store

LEASE = "reconciler"

log = structlog.get_logger()


class Reconciler:
    """Gives, once a period, a batch of the posts to publish; the store thread asks it."""

    def __init__(self, store: Store, period_s: float | None, batch_size: int) -> None:
        """Args: ``period_s`` None or 0 never looks."""
        self._store = store
        self._period_s = period_s or float("inf")
        self._batch_size = batch_size
        # Not at once: what a platform inserts and publishes in one go is not lost.
        self._due = time.monotonic() + self._period_s

    def lost(self, context: ClaimContext) -> list[PostMessage]:
        """The messages to publish now; mostly none.

        A database that does not answer, or gives no right to it, costs this period only.
        """
        now = time.monotonic()
        if now < self._due:
            return []
        self._due = now + self._period_s
        try:
            # Twice the period, so that its holder renews it in time.
            if not self._store.take_lease(LEASE, context, 2 * self._period_s):
                return []
            ids = islice(filter(_publishable, self._store.untagged_ids()), self._batch_size)
            messages = [PostMessage(post_id) for post_id in ids]
        except (StoreRefused, StoreUnavailable) as error:
            log.warning("king.reconcile_failed", error=str(error))
            return []
        if messages:
            log.info("king.reconciled", posts=len(messages))
        return messages


def _publishable(post_id: str) -> bool:
    """Whether a message can name it: a control character, say, would be refused at each turn."""
    try:
        return parse_message(PostMessage(post_id).encode()).post_id == post_id
    except (MessageError, UnicodeEncodeError):
        return False
