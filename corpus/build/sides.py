"""The split: groups of posts are dealt to training, validation and test.

Groups are never cut. The target of each side is its share of every tag and of all posts: iterative
stratification, then improved by moves.
Source of the first part: Sechidis, Tsoumakas and Vlahavas, On the Stratification of Multi-Label
Data, 2011; here whole groups are dealt instead of single examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError
from config.labels import LabelMap
from corpus.build.index import SIDES, Index, batches

_MOVE_PASSES = 30
_POSTS_WEIGHT = 1.0
"""Weight of a side's number of posts against one tag."""
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
    """Counts of each tag in each group, in compressed rows.

    Attributes:
        starts: int64 ``(groups + 1,)``; entries of group g are ``starts[g]`` to ``starts[g + 1]``.
        tags: int64 ``(entries,)``: tag of each entry.
        counts: int64 ``(entries,)``: posts of the group that carry it.
        sizes: int64 ``(groups,)``: posts of each group.
    """

    starts: Ints
    tags: Ints
    counts: Ints
    sizes: Ints
    classes: int

    @classmethod
    def of(cls, sizes: Sequence[int], tags: Sequence[Ints32], classes: int) -> GroupTags:
        """Join groups; `tags` are int32 ``(n, 2)`` for each: tag, ascending, and its posts."""
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
        """Return the tags of a group, and how many of its posts carry each."""
        part = slice(self.starts[group], self.starts[group + 1])
        return self.tags[part], self.counts[part]

    def totals(self) -> Ints:
        """Count the posts of each tag, int64 ``(classes,)``."""
        return np.bincount(self.tags, weights=self.counts, minlength=self.classes).astype(np.int64)


@dataclass
class SideCounts:
    """Posts of settled groups: of each tag int64 ``(sides, classes)``, and all ``(sides,)``."""

    tags: Ints
    posts: Ints

    @classmethod
    def nothing(cls, sides: int, classes: int) -> SideCounts:
        return cls(np.zeros((sides, classes), np.int64), np.zeros(sides, np.int64))

    def add(self, rows: GroupTags, side: Ints, sign: int = 1) -> None:
        """Count groups whose sides, int64 ``(groups,)``, are settled; -1 takes them away again."""
        of_entries = np.repeat(side, np.diff(rows.starts))
        np.add.at(self.tags, (of_entries, rows.tags), sign * rows.counts)
        np.add.at(self.posts, side, sign * rows.sizes)


def stratify(
    rows: GroupTags,
    shares: Sequence[float],
    seed: int,
    settled: SideCounts | None = None,
    *,
    frequent: npt.NDArray[np.bool_] | None = None,
    begin: Ints | None = None,
) -> Ints:
    """Assign each group to a side, int64 ``(groups,)``.

    Args:
        rows: What the groups hold.
        shares: Of the sides, positive; they sum to 1.
        seed: Of every draw.
        settled: Posts of other groups on each side; the shares are of all posts together.
        frequent: bool ``(classes,)``: tags with so many posts in all that they must come out even;
            by default those with `FREQUENT` here.
        begin: int64 ``(groups,)``: sides to begin with; by default they are dealt.
    """
    random = np.random.default_rng(seed)
    settled = settled or SideCounts.nothing(len(shares), rows.classes)
    frequent = rows.totals() >= FREQUENT if frequent is None else frequent
    board = _Board(rows, np.asarray(shares, np.float64), settled, frequent)
    if begin is None:
        _deal(board, random)
    else:
        for group, side in enumerate(begin.tolist()):
            board.put(group, side)
    _improve(board, random)
    return board.side


class _Board:
    """The sides of the groups, and the distance of each side from its target."""

    def __init__(
        self, rows: GroupTags, shares: Floats, settled: SideCounts, frequent: npt.NDArray[np.bool_]
    ) -> None:
        self.rows, self.shares = rows, shares
        self.side: Ints = np.full(len(rows.sizes), -1, np.int64)
        # (sides, classes) and (sides,)
        totals = rows.totals() + settled.tags.sum(axis=0)
        self.target_tags: Floats = shares[:, None] * totals[None, :]
        self.target_posts: Floats = shares * (rows.sizes.sum() + settled.posts.sum())
        # (classes,): a rare tag gives way, so that a frequent one comes out even.
        rare = _RARE_WEIGHT if frequent.any() else 1.0
        self.weight: Floats = np.where(frequent, 1.0, rare)
        self.tags: Floats = settled.tags.astype(np.float64)
        self.posts: Floats = settled.posts.astype(np.float64)

    def put(self, group: int, side: int) -> None:
        """Put a group on a side, or move it there."""
        tags, counts = self.rows.row(group)
        old_side = self.side[group]
        if old_side >= 0:
            self.tags[old_side, tags] -= counts
            self.posts[old_side] -= self.rows.sizes[group]
        self.tags[side, tags] += counts
        self.posts[side] += self.rows.sizes[group]
        self.side[group] = side

    def gain(self, group: int) -> Floats:
        """Return how much the error falls when a group moves to each side, ``(sides,)``."""
        tags, counts = self.rows.row(group)
        here = int(self.side[group])
        size = float(self.rows.sizes[group])
        taken = self._change(tags, -counts.astype(np.float64), -size)[here]
        added: Floats = self._change(tags, counts.astype(np.float64), size)
        gains: Floats = -(taken + added)
        gains[here] = 0.0
        return gains

    def _change(self, tags: Ints, counts: Floats, size: float) -> Floats:
        """Return the change of each side's error when posts come (negative: go), ``(sides,)``.

        The error of a side is sum(weight * (is - target)^2 / target) over tags, and of its posts.
        """
        target = np.maximum(self.target_tags[:, tags], 1e-9)  # (sides, entries)
        off = self.tags[:, tags] - target
        by_tag = (self.weight[tags] * counts * (2 * off + counts) / target).sum(axis=1)
        off_posts = self.posts - self.target_posts
        by_posts = size * (2 * off_posts + size) / np.maximum(self.target_posts, 1e-9)
        change: Floats = by_tag + _POSTS_WEIGHT * by_posts
        return change


def _deal(board: _Board, random: np.random.Generator) -> None:
    """Deal the groups of the rarest tag first, each to the side that lacks that tag most."""
    rows = board.rows
    groups_of = _by_tag(rows)
    shuffled = random.permutation(len(rows.sizes))
    rank = np.empty_like(shuffled)
    rank[shuffled] = np.arange(len(shuffled))
    remaining = rows.totals().astype(np.float64)
    open_tags = set(np.flatnonzero(remaining > 0).tolist())
    while open_tags:
        tag = min(open_tags, key=lambda each: (remaining[each], each))
        open_tags.discard(tag)
        members = groups_of[tag]
        waiting = members[board.side[members] < 0]
        # Large groups first: small ones then even out what they left.
        for group in waiting[np.lexsort((rank[waiting], -rows.sizes[waiting]))]:
            lack = board.target_tags[:, tag] - board.tags[:, tag]
            lack_posts = board.target_posts - board.posts
            best = max(
                range(len(lack)), key=lambda s: (round(float(lack[s]), 6), lack_posts[s], -s)
            )
            board.put(int(group), best)
            tags, counts = rows.row(int(group))
            remaining[tags] -= counts
    rest = np.flatnonzero(board.side < 0)  # groups without a tag
    for group in rest[np.lexsort((rank[rest], -rows.sizes[rest]))]:
        board.put(int(group), int(np.argmax(board.target_posts - board.posts)))


def _by_tag(rows: GroupTags) -> list[Ints]:
    """List the groups of each tag."""
    groups = np.repeat(np.arange(len(rows.sizes)), np.diff(rows.starts))  # (entries,)
    order = np.argsort(rows.tags, kind="stable")
    ends = np.cumsum(np.bincount(rows.tags, minlength=rows.classes))
    return np.split(groups[order], ends[:-1])


def _improve(board: _Board, random: np.random.Generator) -> None:
    """Move single groups as long as the error gets smaller, a limited number of times."""
    count = len(board.rows.sizes)
    for _ in range(_MOVE_PASSES):
        moved = 0
        for group in random.permutation(count):
            gains = board.gain(int(group))
            best = int(np.argmax(gains))
            if gains[best] > 1e-9:
                board.put(int(group), best)
                moved += 1
        if count <= _FEW:
            moved += _swap(board)
        if moved <= _ENOUGH * count:
            break


def _swap(board: _Board) -> int:
    """Exchange pairs of groups where that makes the error smaller; return how many."""
    swapped = 0
    for first, second in combinations(range(len(board.side)), 2):
        first_side, second_side = int(board.side[first]), int(board.side[second])
        if first_side == second_side:
            continue
        gain = float(board.gain(first)[second_side])
        board.put(first, second_side)
        if gain + float(board.gain(second)[first_side]) > 1e-9:
            board.put(second, first_side)
            swapped += 1
        else:
            board.put(first, first_side)
    return swapped


_AT_ONCE = 2048
"""Groups that are dealt together, the largest first: bounds the memory. Those that follow even out
what is uneven so far."""

_DEAL_PASSES = 2
"""Further passes over those dealt together, where the groups are more than that."""


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
    open_sides = [side for side, share in enumerate(shares) if share > 0]
    used = [shares[side] for side in open_sides]
    groups = _Groups(index, len(labels))
    groups.fill(seed)
    settled = SideCounts.nothing(len(SIDES), len(labels))
    for part in groups.read(fixed=True):
        settled.add(part.rows, groups.settle(part.numbers, part.side))
    used_sides = [s for s in range(len(SIDES)) if shares[s] > 0 or settled.posts[s]]
    names = tuple(SIDES[side] for side in used_sides)
    if groups.count < len(names):
        raise ConfigError(
            f"{len(index)} usable posts in {groups.count} groups are too few for {', '.join(names)}"
        )
    frequent = groups.totals >= FREQUENT
    number = np.array(open_sides, np.int64)  # of each side that is dealt to
    place = {side: at for at, side in enumerate(open_sides)}

    def deal(part: _Part, begin: Ints | None) -> None:
        before = SideCounts(settled.tags[open_sides], settled.posts[open_sides])
        side = stratify(part.rows, used, seed, before, frequent=frequent, begin=begin)
        settled.add(part.rows, groups.settle(part.numbers, number[side]))

    parts = 0
    for part in groups.read(fixed=False):
        deal(part, None)
        parts += 1
    # Those that came first did not know what would follow.
    for _ in range(_DEAL_PASSES if parts > 1 else 0):
        for part in groups.read(fixed=False):
            settled.add(part.rows, part.side, -1)
            deal(part, np.array([place[side] for side in part.side.tolist()], np.int64))
    counts, posts = settled.tags[used_sides], settled.posts[used_sides]
    return Split(names, counts, posts, groups.count, groups.largest, groups.moved())


@dataclass(frozen=True)
class _Part:
    """Some groups; `side` int64 ``(groups,)`` is where they are or must be, -1 if not dealt yet."""

    numbers: list[int]
    side: Ints
    rows: GroupTags


class _Groups:
    """The table of groups: built from the posts, read and settled in bounded parts."""

    def __init__(self, index: Index, classes: int) -> None:
        self._base, self._classes = index.base, classes
        self.count = self.largest = 0
        self.totals: Ints = np.zeros(classes, np.int64)

    def fill(self, seed: int) -> None:
        """Count the tags of each group, and set the order in which the groups are dealt.

        Posts of one group that were on different sides all go to the latest of them: what was
        tested with must not be learned from.
        """
        insert = "INSERT INTO parts VALUES (?, ?, ?, ?, ?, NULL)"
        batches(self._base, insert, self._made(np.random.default_rng(seed)))
        # Large ones first: small ones even out what those left. Equal ones by lot.
        self._base.execute(
            "CREATE TABLE turns AS SELECT number AS part FROM parts ORDER BY size DESC, lot"
        )

    def _made(self, random: np.random.Generator) -> Iterator[tuple[object, ...]]:
        rows = self._base.execute("SELECT part, tags, held FROM posts ORDER BY part, number")
        for number, members in groupby(rows, key=lambda row: row[0]):
            tags, size, fixed = Counter[int](), 0, -1
            for _, blob, earlier in members:
                listed = np.frombuffer(blob, np.int32).tolist()
                tags.update(listed)
                size, fixed = size + 1, max(fixed, earlier)
            self.count, self.largest = self.count + 1, max(self.largest, size)
            pairs = np.array(sorted(tags.items()), np.int32).reshape(-1, 2)
            np.add.at(self.totals, pairs[:, 0], pairs[:, 1])
            yield number, size, pairs.tobytes(), fixed, int(random.integers(2**62))

    def read(self, *, fixed: bool) -> Iterator[_Part]:
        """Yield the groups that are fixed, or the others, in bounded parts."""
        query = (
            "SELECT turns.rowid, number, COALESCE(side, fixed), size, tags FROM turns "
            "JOIN parts ON number = part "
            "WHERE turns.rowid > ? AND (fixed >= 0) = ? ORDER BY turns.rowid LIMIT ?"
        )
        last = 0
        while rows := self._base.execute(query, (last, fixed, _AT_ONCE)).fetchall():
            last = rows[-1][0]
            rows.sort(key=lambda row: row[1])
            tags = [np.frombuffer(row[4], np.int32).reshape(-1, 2) for row in rows]
            yield _Part(
                [row[1] for row in rows],
                np.array([row[2] for row in rows], np.int64),
                GroupTags.of([row[3] for row in rows], tags, self._classes),
            )

    def settle(self, numbers: list[int], side: Ints) -> Ints:
        """Write the sides of groups, and return them."""
        rows = zip(side.tolist(), numbers, strict=True)
        self._base.executemany("UPDATE parts SET side = ? WHERE number = ?", rows)
        return side

    def moved(self) -> int:
        """Count the posts that are not on the side that was given."""
        query = (
            "SELECT COUNT(*) FROM posts JOIN parts ON parts.number = part "
            "WHERE held >= 0 AND held != side"
        )
        return int(self._base.execute(query).fetchone()[0])
