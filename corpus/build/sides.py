"""The split: groups of posts are dealt to training, validation and test.

Groups are never cut. The target of each side is its share of every tag and of all posts. The groups
are dealt one after the other, the largest first, each to the side that it brings nearest to its
target; then they are moved, one by one, as long as that helps.
"""

from __future__ import annotations

import sqlite3
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError
from config.labels import LabelMap
from corpus.build.index import SIDES, Index, batches

_PASSES = 30
FREQUENT = 50
"""Tags with at least this many posts can be dealt evenly, and are what people compare."""
_RARE_WEIGHT = 0.05
"""Of a rare tag: it gives way, so that a frequent one comes out even."""
_ENOUGH = 0.0005
"""Share of groups: a pass that moves fewer is the last."""
_FEW, _EXCHANGES = 200, 3
"""Up to this many groups exchanges are tried too, in the first passes: single moves get stuck.
More passes take seconds and make the sides no more even."""
_LEAST = 1e-9
"""A move that makes less of a difference is rounding."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Group(NamedTuple):
    """Posts that stay together; `counts` of them carry each of the `tags`, both ``(tags,)``."""

    number: int
    size: int
    tags: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]


class Sides:
    """The sides of groups, and the distance of each side from its target.

    The error of a side is sum(weight * (is - target)^2 / target) over tags, and of its posts.

    Args:
        shares: Of the sides; they sum to 1. One with 0 gets no group.
        tags: int64 ``(sides + 1, classes)``: posts of each tag that are on a side already, and, in
            the last row, those of the groups to deal.
        posts: int64 ``(sides + 1,)``: the same of all posts.
        groups: How many there are.

    Attributes:
        side: Of each group; -1 before it is dealt.
        tags: int64 ``(sides, classes)``: posts of each tag on each side.
        posts: int64 ``(sides,)``.
    """

    def __init__(self, shares: Sequence[float], tags: Ints, posts: Ints, groups: int) -> None:
        self.tags, self.posts = tags[:-1].copy(), posts[:-1].copy()
        self.side = array("b", [-1]) * groups
        share: Floats = np.asarray(shares, np.float64)
        self._closed = share <= 0
        open_ = np.append(~self._closed, True)  # (sides + 1,)
        self._target_tags = np.maximum(share[:, None] * tags[open_].sum(axis=0), _LEAST)
        self._target_posts = np.maximum(share * posts[open_].sum(), _LEAST)
        frequent = tags.sum(axis=0) >= FREQUENT
        rare = _RARE_WEIGHT if frequent.any() else 1.0
        self._weight: Floats = np.where(frequent, 1.0, rare)  # (classes,)

    def settle(self, group: Group) -> bool:
        """Put a group where the error is smallest; return False when it is there already."""
        old = self.side[group.number]
        if old >= 0:
            self._count(group, old, -1)
        rise = self._rise(group, 1)
        best = int(rise.argmin())
        if old >= 0 and rise[best] > rise[old] - _LEAST:
            best = old
        self._count(group, best, 1)
        self.side[group.number] = best
        return best != old

    def exchange(self, one: Group, other: Group) -> bool:
        """Exchange the sides of two groups where that makes the error smaller; tell if it did."""
        old, new = self.side[one.number], self.side[other.number]
        if old == new:
            return False
        moves = ((one, old, -1), (one, new, 1), (other, new, -1), (other, old, 1))
        rise = 0.0
        for group, side, sign in moves:
            rise += float(self._rise(group, sign)[side])
            self._count(group, side, sign)
        if rise < -_LEAST:
            self.side[one.number], self.side[other.number] = new, old
            return True
        for group, side, sign in moves:
            self._count(group, side, -sign)
        return False

    def _count(self, group: Group, side: int, sign: int) -> None:
        self.tags[side, group.tags] += sign * group.counts
        self.posts[side] += sign * group.size

    def _rise(self, group: Group, sign: int) -> Floats:
        """Return how much each side's error grows when a group comes, or, with -1, goes."""
        target = self._target_tags[:, group.tags]  # (sides, tags of the group)
        counts, size = sign * group.counts, sign * group.size
        off = 2 * (self.tags[:, group.tags] - target) + counts
        by_tag = (self._weight[group.tags] * counts * off / target).sum(axis=1)
        off_posts = 2 * (self.posts - self._target_posts) + size
        rise: Floats = by_tag + size * off_posts / self._target_posts
        rise[self._closed] = np.inf
        return rise


def deal(groups: Callable[[], Iterable[Group]], sides: Sides) -> None:
    """Deal groups, which can be read again and again in the same order, the largest first."""
    count = len(sides.side)
    for number in range(_PASSES):
        moved = sum(sides.settle(group) for group in groups())
        if count <= _FEW and number < _EXCHANGES:
            moved += sum(sides.exchange(*pair) for pair in combinations(groups(), 2))
        if moved <= _ENOUGH * count:
            break


@dataclass(frozen=True)
class Split:
    """Counts of a split; the side of each post is in the index.

    Attributes:
        names: Of the sides that have posts.
        counts: int64 ``(sides, classes)``: posts of each tag.
        posts: int64 ``(sides,)``.
        moved: Posts that a link to another side has taken from the side that was given.
    """

    names: tuple[str, ...]
    counts: Ints
    posts: Ints
    groups: int
    largest_group: int
    moved: int = 0

    def worst(self) -> tuple[float, int]:
        """Return the largest relative deviation of a frequent tag's share, and the tag, or -1."""
        totals = self.counts.sum(axis=0)  # (classes,)
        if not (totals >= FREQUENT).any():
            return 0.0, -1
        with np.errstate(divide="ignore", invalid="ignore"):
            own = self.counts / self.posts[:, None]  # (sides, classes)
            deviations = np.nan_to_num(np.abs(own / (totals / self.posts.sum()) - 1.0))
        largest = np.where(totals >= FREQUENT, deviations.max(axis=0), -1.0)
        return float(largest.max()), int(largest.argmax())


def split(
    index: Index, labels: LabelMap, shares: tuple[float, float, float], seed: int = 0
) -> Split:
    """Deal the posts of a linked index; what one group holds goes to one side.

    Args:
        index: The posts; those with a given side take their group there.
        labels: The label map.
        shares: Of training, validation and test, of the posts that are dealt; a side with 0 only
            has the posts that are given to it.
        seed: Of every draw.
    """
    base = index.base
    groups = _Groups(base, len(labels))
    batches(base, "INSERT INTO parts VALUES (?, ?, ?, ?, ?)", groups.made(seed))
    base.execute("CREATE INDEX turns ON parts (size DESC, lot)")
    used = [s for s in range(len(SIDES)) if shares[s] > 0 or groups.posts[s]]
    names = tuple(SIDES[side] for side in used)
    if groups.count < len(names):
        raise ConfigError(
            f"{len(index)} usable posts in {groups.count} groups are too few for {', '.join(names)}"
        )
    sides = Sides(shares, groups.tags, groups.posts, groups.count)
    if any(shares):
        deal(groups.read, sides)
    dealt = ((side, number) for number, side in enumerate(sides.side) if side >= 0)
    base.executemany("UPDATE parts SET side = ? WHERE number = ?", dealt)
    query = (
        "SELECT COUNT(*) FROM posts JOIN parts ON parts.number = part "
        "WHERE held >= 0 AND held != side"
    )
    (moved,) = base.execute(query).fetchone()
    counts, posts = sides.tags[used], sides.posts[used]
    return Split(names, counts, posts, groups.count, groups.largest, moved)


class _Groups:
    """The table of groups; `tags` and `posts` are those that `Sides` takes."""

    def __init__(self, base: sqlite3.Connection, classes: int) -> None:
        self._base = base
        self.count = self.largest = 0
        self.tags: Ints = np.zeros((len(SIDES) + 1, classes), np.int64)
        self.posts: Ints = np.zeros(len(SIDES) + 1, np.int64)

    def made(self, seed: int) -> Iterator[tuple[object, ...]]:
        """Yield the rows of the table: number, size, tags, lot and given side.

        Posts of one group that were on different sides all go to the latest of them: what was
        tested with must not be trained on.
        """
        random = np.random.default_rng(seed)
        rows = self._base.execute("SELECT part, tags, held FROM posts ORDER BY part, number")
        for number, members in groupby(rows, key=lambda row: row[0]):
            tags, size, side = Counter[int](), 0, -1
            for _, blob, held in members:
                tags.update(np.frombuffer(blob, np.int32).tolist())
                size, side = size + 1, max(side, held)
            self.count, self.largest = self.count + 1, max(self.largest, size)
            pairs = np.array(sorted(tags.items()), np.int32).reshape(-1, 2)
            self.tags[side, pairs[:, 0]] += pairs[:, 1]  # -1 is the last row
            self.posts[side] += size
            lot = int(random.integers(2**62))
            yield number, size, pairs.tobytes(), lot, side if side >= 0 else None

    def read(self) -> Iterator[Group]:
        """Yield the groups to deal: small ones even out what large ones left; equal ones by lot."""
        query = "SELECT number, size, tags FROM parts WHERE side IS NULL ORDER BY size DESC, lot"
        for number, size, blob in self._base.execute(query):
            pairs = np.frombuffer(blob, np.int32).reshape(-1, 2)
            yield Group(number, size, pairs[:, 0], pairs[:, 1])
