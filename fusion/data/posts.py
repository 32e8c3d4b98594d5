"""The posts of data files as numbers: a hundred thousand take about five megabytes.

No Python object is kept for a post: only where it stands in the file, a hash of its ID, and the
indices of its labels. The rest is read from the file again when it is asked for.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError
from common.post_set import post_hash
from common.progress import progress_bar
from config.labels import LabelMap
from fusion.data.data_file import Entry, Record, entries, record_of

Skip: TypeAlias = Callable[[str | None, str, str], None]
"""Takes the ID of a post that is left out, which kind of mistake it has, and the whole reason."""

# Smaller files are read before a bar would be of any use.
_SHOWN_FROM_MB = 64


class PostList(Sequence[Record]):
    """Posts of one or several data files with their labels; pickles, and is safe for threads."""

    def __init__(
        self,
        paths: Sequence[Path],
        labels: LabelMap,
        places: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
        indices: npt.NDArray[np.int32],
    ) -> None:
        """Take what `read` has found.

        Args:
            paths: The data files.
            labels: The label map.
            places: int64 ``(posts, 4)``: number of the file, first byte, bytes, hash of the ID.
            ends: int64 ``(posts + 1,)``: where the labels of a post begin and end in ``indices``.
            indices: int32 ``(labels of all posts,)``.
        """
        self.paths, self.labels = tuple(paths), labels
        self._places, self._ends, self._indices = places, ends, indices

    @classmethod
    def read(
        cls, path: Path, labels: LabelMap, *, skip: Skip | None = None, progress: bool = False
    ) -> PostList:
        """Read a data file; ``skip`` is told of each bad post, None refuses the first of them."""
        places, ends, indices = array("q"), array("q", [0]), array("i")
        size_mb = path.stat().st_size >> 20 if path.exists() else 0
        shown = progress and size_mb >= _SHOWN_FROM_MB
        with progress_bar(f"read {path.name} (MB)", size_mb, enabled=shown) as bar:
            done_mb = 0
            for entry in entries(path):
                if entry.start >> 20 > done_mb:
                    bar.advance((entry.start >> 20) - done_mb)
                    done_mb = entry.start >> 20
                labelled = _id_and_labels(entry, path, labels, skip)
                if labelled is not None:
                    post_id, tags = labelled
                    places.extend((0, entry.start, entry.size, post_hash(post_id)))
                    indices.extend(tags)
                    ends.append(len(indices))
        posts = cls(
            (path,),
            labels,
            np.array(places, np.int64).reshape(-1, 4),  # (posts, 4)
            np.array(ends, np.int64),
            np.array(indices, np.int32),
        )
        posts = posts._without_repeats(skip)
        if not len(posts):
            what = "holds no posts" if skip is None else "holds no posts that can be used"
            raise ConfigError(f"{path}: {what}")
        return posts

    @classmethod
    def joined(cls, lists: Sequence[PostList]) -> PostList:
        """Return the posts of lists that share a label map, one list after another.

        A post in two of them is refused: it would be learned and held out at once.
        """
        places = np.concatenate([some._places for some in lists])
        files = np.cumsum([0, *(len(some.paths) for some in lists)])[:-1]
        places[:, 0] += np.repeat(files, [len(some) for some in lists])
        counts = np.concatenate([np.diff(some._ends) for some in lists])
        ends = np.concatenate([[0], np.cumsum(counts)])
        indices = np.concatenate([some._indices for some in lists])
        paths = [path for some in lists for path in some.paths]
        posts = cls(paths, lists[0].labels, places, ends, indices)
        for first, again in posts._repeats():
            raise ConfigError(
                f"post {posts[first].post_id!r} is in {posts.file(first)} and in "
                f"{posts.file(again)}; take it out of one of them, or set ensemble.pool_valid to "
                "false"
            )
        return posts

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, row: int) -> Record: ...

    @overload
    def __getitem__(self, row: slice) -> PostList: ...

    def __getitem__(self, row: int | slice) -> Record | PostList:
        """Return one post, read from the file; a slice is a list of posts."""
        if isinstance(row, slice):
            return self.take(np.arange(len(self))[row])
        try:
            file = self.file(row)
            record = record_of(self.entry(row), str(file), file)
        except ConfigError as error:
            raise self._changed(row) from error
        if post_hash(record.post_id) != int(self._places[row, 3]):
            raise self._changed(row)
        return record

    def file(self, row: int) -> Path:
        return self.paths[int(self._places[row, 0])]

    def entry(self, row: int) -> Any:
        """Return a post as it stands in the file, with what other readers want of it."""
        start, size = (int(number) for number in self._places[row, 1:3])
        try:
            with self.file(row).open("rb") as file:
                file.seek(start)
                return json.loads(file.read(size))
        except (OSError, ValueError) as error:
            raise self._changed(row) from error

    def label_rows(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return int64 ``ends`` and ``labels``: of post i ``labels[ends[i]:ends[i + 1]]``."""
        return self._ends, self._indices.astype(np.int64)

    @property
    def hashes(self) -> npt.NDArray[np.int64]:
        """Return the hash of each post's ID, `common.post_set.post_hash`, ``(posts,)``."""
        return self._places[:, 3]

    def digest(self) -> str:
        """Return a digest that is equal for equal posts in equal order with equal labels."""
        hasher = hashlib.sha256(self._places[:, 3].tobytes())
        for part in self.label_rows():
            hasher.update(part.tobytes())
        return hasher.hexdigest()

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
        pairs = np.unique(rows * len(self.labels) + self._indices)  # a label may appear twice
        return np.bincount(pairs % len(self.labels), minlength=len(self.labels))

    def take(self, rows: npt.ArrayLike) -> PostList:
        """Take some of the posts, in the order of ``rows``."""
        chosen = np.asarray(rows, np.int64)
        counts = np.diff(self._ends)[chosen]
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        # For each label of a chosen post its place in the old array.
        first = np.repeat(self._ends[chosen] - ends[:-1], counts)
        indices = self._indices[first + np.arange(len(first))]
        return PostList(self.paths, self.labels, self._places[chosen], ends, indices)

    def _without_repeats(self, skip: Skip | None) -> PostList:
        drop: list[int] = []
        for _, again in self._repeats():
            post_id = self[again].post_id
            reason = f"{self.file(again)}: post {post_id!r} appears twice"
            if skip is None:
                raise ConfigError(reason)
            skip(post_id, "repeated", reason)
            drop.append(again)
        return self.take(np.delete(np.arange(len(self)), drop)) if drop else self

    def _repeats(self) -> Iterator[tuple[int, int]]:
        """Yield rows of two posts with the same ID, the earlier one first."""
        hashes = self._places[:, 3]
        order = np.argsort(hashes, kind="stable")
        for at in np.flatnonzero(np.diff(hashes[order]) == 0).tolist():
            first, again = int(order[at]), int(order[at + 1])
            if self[first].post_id == self[again].post_id:  # not only their hashes
                yield first, again

    def _changed(self, row: int) -> ConfigError:
        return ConfigError(
            f"{self.file(row)}: has changed since the run began; start with --resume"
        )


def stratified_folds(
    ends: npt.ArrayLike, labels: npt.ArrayLike, classes: int, folds: int, seed: int
) -> npt.NDArray[np.int64]:
    """Share posts out so that every part has its share of the posts and of each tag's posts.

    The rarest tag's posts are dealt first, each to the part that lacks it most; then those of the
    tag that is rarest among the rest, and so on. Source: Sechidis et al., On the stratification of
    multi-label data, 2011, algorithm 1.

    Args:
        ends: ``(posts + 1,)``: the labels of post i are ``labels[ends[i]:ends[i + 1]]``.
        labels: Indices of tags; one that appears twice counts once.
        classes: Number of tags.
        folds: Number of parts; at least 2, and at most as many as there are posts.
        seed: Of the order in which posts are dealt.

    Returns:
        The part of each post, from 0; ``(posts,)``.
    """
    bounds, flat = np.asarray(ends, np.int64), np.asarray(labels, np.int64)
    posts = len(bounds) - 1
    if not 2 <= folds <= posts:
        raise ValueError(f"{posts} posts cannot be split into {folds} folds")
    chance = np.random.default_rng(seed)
    tags = [np.unique(flat[bounds[i] : bounds[i + 1]]).tolist() for i in range(posts)]
    of_tag: list[list[int]] = [[] for _ in range(classes)]
    for post in chance.permutation(posts).tolist():
        for tag in tags[post]:
            of_tag[tag].append(post)
    remaining = np.array([len(some) for some in of_tag], dtype=np.int64)
    lacking = _Lacking(remaining, posts, folds)
    part = np.full(posts, -1, dtype=np.int64)
    queue = [(int(count), tag) for tag, count in enumerate(remaining) if count]
    heapq.heapify(queue)
    while queue:
        count, tag = heapq.heappop(queue)
        if count != remaining[tag]:  # posts were dealt with another tag since
            if remaining[tag]:
                heapq.heappush(queue, (int(remaining[tag]), tag))
            continue
        for post in of_tag[tag]:
            if part[post] < 0:
                part[post] = lacking.deal(tag, tags[post], float(chance.random()))
                remaining[tags[post]] -= 1
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
        lacking = self._posts if tag is None else self._tags[:, tag]
        best = np.flatnonzero(lacking >= lacking.max() - 1e-9)
        best = best[self._posts[best] >= self._posts[best].max() - 1e-9]
        chosen = int(best[int(chance * len(best))])
        self._posts[chosen] -= 1
        self._tags[chosen, tags] -= 1
        return chosen


def _id_and_labels(
    entry: Entry, path: Path, labels: LabelMap, skip: Skip | None
) -> tuple[str, list[int]] | None:
    """Return an entry's ID and labels; None leaves it out."""
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
