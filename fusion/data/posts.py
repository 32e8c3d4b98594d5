"""The posts of a data file as numbers: a hundred thousand take about four megabytes.

No Python object is kept for a post: only where it stands in the file, a hash of its ID, and the
indices of its labels. The rest is read from the file again when it is asked for.
"""

from __future__ import annotations

import hashlib
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
        """One post, read from the file; a slice is a list of posts.

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
        """A post as it stands in the file, with what other readers want of it.

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
        """Indices of a post's labels, as they stand in the file."""
        return self._indices[self._ends[row] : self._ends[row + 1]]

    def keys(self) -> npt.NDArray[np.int64]:
        """A hash of each post's ID, int64 ``(posts,)``."""
        return self._places[:, 2]

    def target(self, row: int) -> npt.NDArray[np.float32]:
        """The true tags of a post, float32 ``(classes,)`` of 0 and 1."""
        target = np.zeros(len(self.labels), np.float32)
        target[self._indices[self._ends[row] : self._ends[row + 1]]] = 1
        return target

    def targets(self) -> npt.NDArray[np.float32]:
        """The true tags of all posts, float32 ``(posts, classes)``: for small lists."""
        targets = np.zeros((len(self), len(self.labels)), np.float32)
        rows = np.repeat(np.arange(len(self)), np.diff(self._ends))
        targets[rows, self._indices] = 1
        return targets

    def positives(self) -> npt.NDArray[np.int64]:
        """Posts of each class, int64 ``(classes,)``."""
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


def _wanted(
    entry: Entry, path: Path, labels: LabelMap, skip: Skip | None
) -> tuple[str, list[int]] | None:
    """ID and labels of an entry; None leaves it out."""
    post_id: str | None = None
    try:
        record = record_of(entry.value, f"{path}: entry {entry.number}", path)
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
