"""The posts of a data file as numbers: a hundred thousand take about four megabytes.

No Python object is kept for a post: only where it stands in the file, a hash of its ID, and the
indices of its labels. The rest is read from the file again when it is asked for.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError
from common.progress import progress_bar
from config.labels import LabelMap
from fusion.data.data_file import Entry, Record, entries, record_of

Skip: TypeAlias = Callable[[str | None, str, str], None]
"""Takes the ID of a post that is left out, which kind of mistake it has, and the whole reason."""

# Smaller files are read before a bar would be of any use.
_SHOWN_FROM_MB = 64


class PostList(Sequence[Record]):
    """Posts of one data file with their labels; pickles, and may be read by many threads.

    Attributes:
        path: The data file.
        labels: The map that the labels' indices are of.
    """

    def __init__(
        self,
        path: Path,
        labels: LabelMap,
        places: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
        indices: npt.NDArray[np.int32],
    ) -> None:
        """Take what `read` has found.

        Args:
            path: The data file.
            labels: The label map.
            places: int64 ``(posts, 3)``: first byte, bytes, hash of the ID.
            ends: int64 ``(posts + 1,)``: where the labels of a post begin and end in ``indices``.
            indices: int32 ``(labels of all posts,)``.
        """
        self.path, self.labels = path, labels
        self._places, self._ends, self._indices = places, ends, indices

    @classmethod
    def read(
        cls, path: Path, labels: LabelMap, *, skip: Skip | None = None, progress: bool = False
    ) -> PostList:
        """Read a data file, ``.json`` or ``.jsonl``.

        Args:
            path: The file.
            labels: The label map.
            skip: Told of each post that is left out; None refuses the first of them.
            progress: Show a bar for a large file.

        Raises:
            ConfigError: It is missing, no JSON list or empty; and without ``skip``: an entry is
                not as it should be, a label is not in the map, or an ID stands twice.
        """
        places, ends, indices = array("q"), array("q", [0]), array("i")
        size_mb = path.stat().st_size >> 20 if path.exists() else 0
        shown = progress and size_mb >= _SHOWN_FROM_MB
        with progress_bar(f"read {path.name} (MB)", size_mb, enabled=shown) as bar:
            done_mb = 0
            for entry in entries(path):
                if entry.start >> 20 > done_mb:
                    bar.advance((entry.start >> 20) - done_mb)
                    done_mb = entry.start >> 20
                found = _wanted(entry, path, labels, skip)
                if found is not None:
                    post_id, tags = found
                    places.extend((entry.start, entry.size, _hash(post_id)))
                    indices.extend(tags)
                    ends.append(len(indices))
        posts = cls(
            path,
            labels,
            np.array(places, np.int64).reshape(-1, 3),  # (posts, 3)
            np.array(ends, np.int64),
            np.array(indices, np.int32),
        )
        posts = posts._without_repeats(skip)
        if not len(posts):
            what = "holds no posts" if skip is None else "holds no posts that can be used"
            raise ConfigError(f"{path}: {what}")
        return posts

    def __len__(self) -> int:
        """Number of posts."""
        return len(self._places)

    @overload
    def __getitem__(self, row: int) -> Record: ...

    @overload
    def __getitem__(self, row: slice) -> PostList: ...

    def __getitem__(self, row: int | slice) -> Record | PostList:
        """Return one post, read from the file; a slice is a list of posts.

        Raises:
            ConfigError: The file has changed since it was read first.
        """
        if isinstance(row, slice):
            return self.take(np.arange(len(self))[row])
        try:
            record = record_of(self.entry(row), str(self.path), self.path)
        except ConfigError as error:
            raise self._changed() from error
        if _hash(record.post_id) != int(self._places[row, 2]):
            raise self._changed()
        return record

    def entry(self, row: int) -> Any:
        """Return a post as it stands in the file, with what other readers want of it.

        Raises:
            ConfigError: The file has changed since it was read first.
        """
        start, size = (int(number) for number in self._places[row, :2])
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return json.loads(file.read(size))
        except (OSError, ValueError) as error:
            raise self._changed() from error

    def label_indices(self, row: int) -> npt.NDArray[np.int32]:
        """Return indices of a post's labels, as they stand in the file."""
        return self._indices[self._ends[row] : self._ends[row + 1]]

    def keys(self) -> npt.NDArray[np.int64]:
        """Return a hash of each post's ID, int64 ``(posts,)``."""
        return self._places[:, 2]

    def target(self, row: int) -> npt.NDArray[np.float32]:
        """Return the true tags of a post, float32 ``(classes,)`` of 0 and 1."""
        target = np.zeros(len(self.labels), np.float32)
        target[self._indices[self._ends[row] : self._ends[row + 1]]] = 1
        return target

    def targets(self) -> npt.NDArray[np.float32]:
        """Return the true tags of all posts, float32 ``(posts, classes)``: for small lists."""
        targets = np.zeros((len(self), len(self.labels)), np.float32)
        rows = np.repeat(np.arange(len(self)), np.diff(self._ends))
        targets[rows, self._indices] = 1
        return targets

    def positives(self) -> npt.NDArray[np.int64]:
        """Return the number of posts of each class, int64 ``(classes,)``."""
        rows = np.repeat(np.arange(len(self)), np.diff(self._ends))
        pairs = np.unique(rows * len(self.labels) + self._indices)  # a label may stand twice
        return np.bincount(pairs % len(self.labels), minlength=len(self.labels))

    def take(self, rows: npt.ArrayLike) -> PostList:
        """Some of the posts, in the order of ``rows``."""
        chosen = np.asarray(rows, np.int64)
        counts = np.diff(self._ends)[chosen]
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        # For each label of a chosen post its place in the old array.
        first = np.repeat(self._ends[chosen] - ends[:-1], counts)
        indices = self._indices[first + np.arange(len(first))]
        return PostList(self.path, self.labels, self._places[chosen], ends, indices)

    def _without_repeats(self, skip: Skip | None) -> PostList:
        hashes = self._places[:, 2]
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        drop: list[int] = []
        for first, again in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
            post_id = self[again].post_id
            if post_id != self[first].post_id:  # two IDs of one hash
                continue
            reason = f"{self.path}: post {post_id!r} stands twice"
            if skip is None:
                raise ConfigError(reason)
            skip(post_id, "repeated", reason)
            drop.append(again)
        return self.take(np.delete(np.arange(len(self)), drop)) if drop else self

    def _changed(self) -> ConfigError:
        return ConfigError(f"{self.path}: has changed since the run began; start with --resume")


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
        """Return one post, read from its file; a slice is a pool."""
        if isinstance(row, slice):
            return self.take(np.arange(len(self))[row])
        some, place = self.place(row)
        return some[place]

    def place(self, row: int) -> tuple[PostList, int]:
        """Return the list that a post is of, and its row there."""
        at = int(self._rows[row])
        number = int(np.searchsorted(self._starts, at, side="right")) - 1
        return self.lists[number], at - int(self._starts[number])

    def entry(self, row: int) -> Any:
        """Return a post as it stands in its file."""
        some, place = self.place(row)
        return some.entry(place)

    def target(self, row: int) -> npt.NDArray[np.float32]:
        """Return the true tags of a post, float32 ``(classes,)`` of 0 and 1."""
        some, place = self.place(row)
        return some.target(place)

    def targets(self) -> npt.NDArray[np.float32]:
        """Return the true tags of all posts, float32 ``(posts, classes)``: for small pools."""
        found = [self.target(row) for row in range(len(self))]
        return np.stack(found) if found else np.zeros((0, len(self.labels)), np.float32)

    def positives(self) -> npt.NDArray[np.int64]:
        """Return the number of posts of each class, int64 ``(classes,)``."""
        ends, labels = self.label_rows()
        pairs = np.unique(
            np.repeat(np.arange(len(self)), np.diff(ends)) * len(self.labels) + labels
        )
        return np.bincount(pairs % len(self.labels), minlength=len(self.labels))

    def take(self, rows: npt.ArrayLike) -> PostPool:
        """Some of the posts, in the order of ``rows``."""
        return PostPool(self.lists, self._rows[np.asarray(rows, np.int64)])

    def label_rows(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return labels by post: of post i they are ``labels[ends[i]:ends[i + 1]]``.

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
        """Return indices of a post's labels, as they stand in its file."""
        some, place = self.place(row)
        return some.label_indices(place)

    def keys(self) -> npt.NDArray[np.int64]:
        """Return a hash of each post's ID, int64 ``(posts,)``."""
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


def stratified_folds(
    ends: npt.ArrayLike, labels: npt.ArrayLike, classes: int, folds: int, seed: int
) -> npt.NDArray[np.int64]:
    """Share posts out so that every part has its share of the posts and of each tag's posts.

    The rarest tag's posts are dealt first, each to the part that lacks it most; then those of the
    tag that is rarest among the rest, and so on.

    Args:
        ends: ``(posts + 1,)``: the labels of post i are ``labels[ends[i]:ends[i + 1]]``.
        labels: Indices of tags; one that stands twice counts once.
        classes: Number of tags.
        folds: Number of parts; at least 2, and at most as many as there are posts.
        seed: Of the order in which posts are dealt.

    Returns:
        The part of each post, from 0; ``(posts,)``.

    Raises:
        ValueError: There are fewer posts than parts, or fewer than two parts.

    Source: Sechidis et al., On the stratification of multi-label data, 2011, algorithm 1.
    """
    bounds, flat = np.asarray(ends, np.int64), np.asarray(labels, np.int64)
    posts = len(bounds) - 1
    if not 2 <= folds <= posts:
        raise ValueError(f"{posts} posts cannot be shared out to {folds} folds")
    chance = np.random.default_rng(seed)
    tags = [np.unique(flat[bounds[i] : bounds[i + 1]]).tolist() for i in range(posts)]
    of_tag: list[list[int]] = [[] for _ in range(classes)]
    for post in chance.permutation(posts).tolist():
        for tag in tags[post]:
            of_tag[tag].append(post)
    left = np.array([len(some) for some in of_tag], dtype=np.int64)
    lacking = _Lacking(left, posts, folds)
    part = np.full(posts, -1, dtype=np.int64)
    queue = [(int(count), tag) for tag, count in enumerate(left) if count]
    heapq.heapify(queue)
    while queue:
        count, tag = heapq.heappop(queue)
        if count != left[tag]:  # posts were dealt with another tag since
            if left[tag]:
                heapq.heappush(queue, (int(left[tag]), tag))
            continue
        for post in of_tag[tag]:
            if part[post] < 0:
                part[post] = lacking.deal(tag, tags[post], float(chance.random()))
                left[tags[post]] -= 1
    for post in np.flatnonzero(part < 0).tolist():  # without tags
        part[post] = lacking.deal(None, [], float(chance.random()))
    return part


class _Lacking:
    """The posts and tags that each part still lacks."""

    def __init__(self, counts: npt.NDArray[np.int64], posts: int, folds: int) -> None:
        self._posts = np.full(folds, posts / folds)  # (folds,)
        self._tags = np.repeat(counts[None, :] / folds, folds, axis=0)  # (folds, classes)

    def deal(self, tag: int | None, tags: list[int], chance: float) -> int:
        """Return the part of a post: the one that lacks the tag most, and then posts most."""
        wanted = self._posts if tag is None else self._tags[:, tag]
        best = np.flatnonzero(wanted >= wanted.max() - 1e-9)
        best = best[self._posts[best] >= self._posts[best].max() - 1e-9]
        chosen = int(best[int(chance * len(best))])
        self._posts[chosen] -= 1
        self._tags[chosen, tags] -= 1
        return chosen


def _wanted(
    entry: Entry, path: Path, labels: LabelMap, skip: Skip | None
) -> tuple[str, list[int]] | None:
    """ID and labels of an entry; None leaves it out."""
    post_id: str | None = None
    try:
        record = record_of(entry.value, entry.where, path)
        post_id = record.post_id
        return post_id, labels.encode(record.labels, where=f"{path}: post {post_id}")
    except ConfigError as error:
        if skip is None:
            raise
        skip(post_id, "entry" if post_id is None else "label", str(error))
        return None


def _hash(post_id: str) -> int:
    raw = post_id.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little", signed=True)
