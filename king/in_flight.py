"""The posts that this King works on, with the deliveries that asked for them.

The broker thread adds, the store thread removes. A second message for a post that is already in
flight joins the first, and all messages of a post are acknowledged together once its outcome is
written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from king.broker.base import Delivery


@dataclass(slots=True)
class _Post:
    since: float = field(default_factory=time.monotonic)
    deliveries: list[Delivery] = field(default_factory=list)


class InFlight:
    """Posts in flight and their deliveries; safe between threads."""

    def __init__(self) -> None:
        self._posts: dict[str, _Post] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of posts in flight."""
        return len(self._posts)

    def add(self, post_id: str, delivery: Delivery) -> bool:
        """Add a delivery to its post; return False if the post was in flight already."""
        with self._lock:
            is_new = post_id not in self._posts
            self._posts.setdefault(post_id, _Post()).deliveries.append(delivery)
            return is_new

    def remove(self, post_id: str) -> Sequence[Delivery]:
        """End a post's flight and return all of its deliveries."""
        with self._lock:
            post = self._posts.pop(post_id, None)
        return post.deliveries if post is not None else ()

    def touch(self, post_id: str) -> None:
        """Restart the clock of a post that waits on purpose and must not look like a stall."""
        with self._lock:
            if post_id in self._posts:
                self._posts[post_id].since = time.monotonic()

    @property
    def oldest_s(self) -> float:
        """Return the seconds for which the oldest post has been in flight."""
        with self._lock:
            since = [post.since for post in self._posts.values()]
        return time.monotonic() - min(since) if since else 0.0
