"""Which posts belong together: union-find over posts that share an author, a medium, a text."""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class Groups:
    """Sets of posts that grow together; 4 bytes a post.

    Posts are the indices 0 to ``count`` - 1.
    """

    def __init__(self, count: int) -> None:
        self._parent = array("I", range(count))

    def __len__(self) -> int:
        """Number of posts."""
        return len(self._parent)

    def root(self, post: int) -> int:
        """The post that stands for the set; paths are halved on the way."""
        parent = self._parent
        while parent[post] != post:
            parent[post] = parent[parent[post]]
            post = parent[post]
        return post

    def join(self, posts: Iterable[int]) -> None:
        """Put posts into one set.

        The smallest index stands for it, so that the result does not depend on the order of calls.
        """
        roots = sorted({self.root(post) for post in posts})
        for other in roots[1:]:
            self._parent[other] = roots[0]
