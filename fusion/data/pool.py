"""The posts of several data files as one list: what k-fold training shares out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError
from fusion.data.data_file import Record
from fusion.data.posts import PostList


class PostPool(PostList):
    """Posts of several lists, which share their label map.

    Args:
        lists: In the order in which their posts are counted.
        rows: int64 ``(posts,)``: those that are in the pool; None takes all.
    """

    def __init__(self, lists: Sequence[PostList], rows: npt.ArrayLike | None = None) -> None:
        self.lists = tuple(lists)
        self.path, self.labels = lists[0].path, lists[0].labels
        self._starts = np.cumsum([0, *(len(some) for some in lists)])  # (lists + 1,)
        everything = np.arange(self._starts[-1]) if rows is None else rows
        self._rows = np.asarray(everything, np.int64)

    def __len__(self) -> int:
        """Number of posts."""
        return len(self._rows)

    @overload
    def __getitem__(self, row: int) -> Record: ...

    @overload
    def __getitem__(self, row: slice) -> PostList: ...

    def __getitem__(self, row: int | slice) -> Record | PostList:
        """One post, read from its file; a slice is a pool."""
        if isinstance(row, slice):
            return self.take(np.arange(len(self))[row])
        some, place = self.place(row)
        return some[place]

    def place(self, row: int) -> tuple[PostList, int]:
        """The list that a post is of, and its row there."""
        at = int(self._rows[row])
        number = int(np.searchsorted(self._starts, at, side="right")) - 1
        return self.lists[number], at - int(self._starts[number])

    def entry(self, row: int) -> Any:
        """A post as it stands in its file."""
        some, place = self.place(row)
        return some.entry(place)

    def target(self, row: int) -> npt.NDArray[np.float32]:
        """The true tags of a post, float32 ``(classes,)`` of 0 and 1."""
        some, place = self.place(row)
        return some.target(place)

    def targets(self) -> npt.NDArray[np.float32]:
        """The true tags of all posts, float32 ``(posts, classes)``: for small pools."""
        found = [self.target(row) for row in range(len(self))]
        return np.stack(found) if found else np.zeros((0, len(self.labels)), np.float32)

    def positives(self) -> npt.NDArray[np.int64]:
        """Posts of each class, int64 ``(classes,)``."""
        ends, labels = self.label_rows()
        pairs = np.unique(
            np.repeat(np.arange(len(self)), np.diff(ends)) * len(self.labels) + labels
        )
        return np.bincount(pairs % len(self.labels), minlength=len(self.labels))

    def take(self, rows: npt.ArrayLike) -> PostPool:
        """Some of the posts, in the order of ``rows``."""
        return PostPool(self.lists, self._rows[np.asarray(rows, np.int64)])

    def label_rows(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Labels by post: of post i they are ``labels[ends[i]:ends[i + 1]]``.

        Returns:
            ``ends`` ``(posts + 1,)`` and ``labels``, both int64.
        """
        found = []
        for row in range(len(self)):
            some, place = self.place(row)
            found.append(some.label_indices(place))
        ends = np.cumsum([0, *(len(labels) for labels in found)]).astype(np.int64)
        return ends, np.concatenate([np.empty(0, np.int64), *found]).astype(np.int64)

    def label_indices(self, row: int) -> npt.NDArray[np.int32]:
        """Indices of a post's labels, as they stand in its file."""
        some, place = self.place(row)
        return some.label_indices(place)

    def keys(self) -> npt.NDArray[np.int64]:
        """A hash of each post's ID, int64 ``(posts,)``."""
        return np.concatenate([some.keys() for some in self.lists])[self._rows]

    def refuse_repeats(self) -> None:
        """See that no post stands in two of the lists: it would be learned and held out at once.

        Raises:
            ConfigError: Names the first that does.
        """
        keys = self.keys()
        order = np.argsort(keys, kind="stable")
        for at in np.flatnonzero(np.diff(keys[order]) == 0).tolist():
            first, again = (self.place(int(order[at + i])) for i in (0, 1))
            post_id = first[0][first[1]].post_id
            if post_id == again[0][again[1]].post_id:
                raise ConfigError(
                    f"post {post_id!r} stands in {first[0].path} and in {again[0].path}; take it "
                    "out of one of them, or set ensemble.pool_valid to false"
                )

    def digest(self) -> str:
        """Equal for equal posts in equal order with equal labels."""
        found = hashlib.sha256(self.keys().tobytes())
        for part in self.label_rows():
            found.update(part.tobytes())
        return found.hexdigest()
