"""Multi-label stratification of groups: iterative, then improved by moves.

Groups are never cut. What is wanted of each side is its share of every tag and of all posts.
Source of the first part: Sechidis, Tsoumakas and Vlahavas, On the Stratification of Multi-Label
Data, 2011; here whole groups are dealt instead of single examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

_PASSES = 30
_POSTS_WEIGHT = 1.0
"""How much the number of posts of a side weighs against one tag."""
FREQUENT = 50
"""Tags with so many posts can be dealt evenly, and are what people compare."""
_RARE_WEIGHT = 0.05
_ENOUGH = 0.0005
"""Share of groups: a pass that moves fewer is the last."""
_FEW = 200
"""Up to so many groups exchanges are tried too: with few, single moves get stuck."""

Ints = npt.NDArray[np.int64]
Ints32 = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GroupTags:
    """How often each tag occurs in each group, in compressed rows.

    Attributes:
        starts: int64 ``(groups + 1,)``; entries of group g are ``starts[g]`` to ``starts[g + 1]``.
        tags: int64 ``(entries,)``: tag of each entry.
        counts: int64 ``(entries,)``: posts of the group that carry it.
        sizes: int64 ``(groups,)``: posts of each group.
        classes: Number of tags.
    """

    starts: Ints
    tags: Ints
    counts: Ints
    sizes: Ints
    classes: int

    @classmethod
    def of(cls, sizes: Sequence[int], tags: Sequence[Ints32], classes: int) -> GroupTags:
        """Put the rows of groups one after another.

        Args:
            sizes: Posts of each group.
            tags: int32 ``(n, 2)`` for each group: tag, ascending, and posts that carry it.
            classes: Number of tags.
        """
        starts = np.cumsum([0, *(len(each) for each in tags)])
        joined = np.concatenate([np.empty((0, 2), np.int64), *tags])
        return cls(
            starts.astype(np.int64),
            joined[:, 0].astype(np.int64),
            joined[:, 1].astype(np.int64),
            np.asarray(sizes, np.int64),
            classes,
        )

    def row(self, group: int) -> tuple[Ints, Ints]:
        """Tags of a group and how many of its posts carry each."""
        part = slice(self.starts[group], self.starts[group + 1])
        return self.tags[part], self.counts[part]

    def totals(self) -> Ints:
        """Posts of each tag, int64 ``(classes,)``."""
        return np.bincount(self.tags, weights=self.counts, minlength=self.classes).astype(np.int64)


@dataclass
class Held:
    """What the sides hold already, of groups that are dealt and stay where they are.

    Attributes:
        tags: int64 ``(sides, classes)``: posts of each tag.
        posts: int64 ``(sides,)``.
    """

    tags: Ints
    posts: Ints

    @classmethod
    def nothing(cls, sides: int, classes: int) -> Held:
        """Empty sides."""
        return cls(np.zeros((sides, classes), np.int64), np.zeros(sides, np.int64))

    def add(self, rows: GroupTags, side: Ints) -> None:
        """Count groups whose sides, int64 ``(groups,)``, are settled."""
        self._count(rows, side, 1)

    def take(self, rows: GroupTags, side: Ints) -> None:
        """The reverse of `add`."""
        self._count(rows, side, -1)

    def _count(self, rows: GroupTags, side: Ints, sign: int) -> None:
        of_entries = np.repeat(side, np.diff(rows.starts))
        np.add.at(self.tags, (of_entries, rows.tags), sign * rows.counts)
        np.add.at(self.posts, side, sign * rows.sizes)


def stratify(
    rows: GroupTags,
    shares: Sequence[float],
    seed: int,
    held: Held | None = None,
    *,
    frequent: npt.NDArray[np.bool_] | None = None,
    begin: Ints | None = None,
) -> Ints:
    """The side of each group.

    Args:
        rows: What the groups hold.
        shares: Of the sides, positive; they sum to 1.
        seed: Of every draw.
        held: What the sides hold of other groups; the shares are of these and those together.
        frequent: bool ``(classes,)``: tags with so many posts in all that they must come out even;
            by default those with `FREQUENT` here.
        begin: int64 ``(groups,)``: sides to begin with; by default they are dealt.

    Returns:
        int64 ``(groups,)``.
    """
    random = np.random.default_rng(seed)
    held = held or Held.nothing(len(shares), rows.classes)
    frequent = rows.totals() >= FREQUENT if frequent is None else frequent
    board = _Board(rows, np.asarray(shares, np.float64), held, frequent)
    if begin is None:
        _deal(board, random)
    else:
        for group, side in enumerate(begin.tolist()):
            board.put(group, side)
    _improve(board, random)
    return board.side


class _Board:
    """Where the groups are, and how far the sides are from what is wanted."""

    def __init__(
        self, rows: GroupTags, shares: Floats, held: Held, frequent: npt.NDArray[np.bool_]
    ) -> None:
        self.rows, self.shares = rows, shares
        self.side: Ints = np.full(len(rows.sizes), -1, np.int64)
        # (sides, classes) and (sides,)
        totals = rows.totals() + held.tags.sum(axis=0)
        self.wanted_tags: Floats = shares[:, None] * totals[None, :]
        self.wanted_posts: Floats = shares * (rows.sizes.sum() + held.posts.sum())
        # (classes,): a rare tag gives way, so that a frequent one comes out even.
        rare = _RARE_WEIGHT if frequent.any() else 1.0
        self.weight: Floats = np.where(frequent, 1.0, rare)
        self.tags: Floats = held.tags.astype(np.float64)
        self.posts: Floats = held.posts.astype(np.float64)

    def put(self, group: int, side: int) -> None:
        """Put a group on a side, or move it there."""
        tags, counts = self.rows.row(group)
        before = self.side[group]
        if before >= 0:
            self.tags[before, tags] -= counts
            self.posts[before] -= self.rows.sizes[group]
        self.tags[side, tags] += counts
        self.posts[side] += self.rows.sizes[group]
        self.side[group] = side

    def gain(self, group: int) -> Floats:
        """What each side's error would lose by taking a group from where it is, ``(sides,)``."""
        tags, counts = self.rows.row(group)
        here = int(self.side[group])
        size = float(self.rows.sizes[group])
        taken = self._change(tags, -counts.astype(np.float64), -size)[here]
        added: Floats = self._change(tags, counts.astype(np.float64), size)
        gains: Floats = -(taken + added)
        gains[here] = 0.0
        return gains

    def _change(self, tags: Ints, counts: Floats, size: float) -> Floats:
        """Change of each side's error when these posts come (or, negative, go), ``(sides,)``.

        The error of a side is Σ weight · (is - wanted)² / wanted over tags, and of its posts.
        """
        wanted = np.maximum(self.wanted_tags[:, tags], 1e-9)  # (sides, entries)
        off = self.tags[:, tags] - wanted
        by_tag = (self.weight[tags] * counts * (2 * off + counts) / wanted).sum(axis=1)
        off_posts = self.posts - self.wanted_posts
        by_posts = size * (2 * off_posts + size) / np.maximum(self.wanted_posts, 1e-9)
        change: Floats = by_tag + _POSTS_WEIGHT * by_posts
        return change


def _deal(board: _Board, random: np.random.Generator) -> None:
    """Deal the groups of the rarest tag first, each to the side that lacks that tag most."""
    rows = board.rows
    groups_of = _by_tag(rows)
    shuffled = random.permutation(len(rows.sizes))
    rank = np.empty_like(shuffled)
    rank[shuffled] = np.arange(len(shuffled))
    left = rows.totals().astype(np.float64)
    open_tags = set(np.flatnonzero(left > 0).tolist())
    while open_tags:
        tag = min(open_tags, key=lambda each: (left[each], each))
        open_tags.discard(tag)
        members = groups_of[tag]
        waiting = members[board.side[members] < 0]
        # Large groups first: small ones then even out what they left.
        for group in waiting[np.lexsort((rank[waiting], -rows.sizes[waiting]))]:
            lack = board.wanted_tags[:, tag] - board.tags[:, tag]
            lack_posts = board.wanted_posts - board.posts
            best = max(
                range(len(lack)), key=lambda s: (round(float(lack[s]), 6), lack_posts[s], -s)
            )
            board.put(int(group), best)
            tags, counts = rows.row(int(group))
            left[tags] -= counts
    rest = np.flatnonzero(board.side < 0)  # groups without a tag
    for group in rest[np.lexsort((rank[rest], -rows.sizes[rest]))]:
        board.put(int(group), int(np.argmax(board.wanted_posts - board.posts)))


def _by_tag(rows: GroupTags) -> list[Ints]:
    """Groups of each tag."""
    groups = np.repeat(np.arange(len(rows.sizes)), np.diff(rows.starts))  # (entries,)
    order = np.argsort(rows.tags, kind="stable")
    ends = np.cumsum(np.bincount(rows.tags, minlength=rows.classes))
    return np.split(groups[order], ends[:-1])


def _improve(board: _Board, random: np.random.Generator) -> None:
    """Move single groups as long as the error gets smaller, a limited number of times."""
    movable = np.arange(len(board.rows.sizes))
    for _ in range(_PASSES):
        moved = 0
        for group in random.permutation(movable):
            gains = board.gain(int(group))
            best = int(np.argmax(gains))
            if gains[best] > 1e-9:
                board.put(int(group), best)
                moved += 1
        if len(movable) <= _FEW:
            moved += _swap(board, movable)
        if moved <= _ENOUGH * len(movable):
            break


def _swap(board: _Board, movable: Ints) -> int:
    """Exchange two groups of different sides where that makes the error smaller; how often."""
    swapped = 0
    for first, second in combinations(movable.tolist(), 2):
        here, there = int(board.side[first]), int(board.side[second])
        if here == there:
            continue
        gain = float(board.gain(first)[there])
        board.put(first, there)
        if gain + float(board.gain(second)[here]) > 1e-9:
            board.put(second, here)
            swapped += 1
        else:
            board.put(first, here)
    return swapped
