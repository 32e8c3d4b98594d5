"""Which side each post goes to, and how even that came out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError
from config.labels import LabelMap
from corpus.build.index import Index, batches
from corpus.build.stratify import FREQUENT, GroupTags, Held, stratify

SIDES = ("train", "valid", "test")
_AT_ONCE = 2048
"""Groups that are dealt together, the largest first: bounds the memory. Those that follow even out
what is uneven so far."""

_PASSES = 2
"""How often those dealt together are looked at again, where the groups are more than that."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """The sides of posts; which post is where stands in the index.

    Attributes:
        names: Of the sides, those with a share.
        counts: int64 ``(sides, classes)``: posts of each tag.
        posts: int64 ``(sides,)``.
        groups: Number of groups.
        largest_group: Posts of the largest.
        moved: Posts that a link to another side has taken from where `keep` had them.
    """

    names: tuple[str, ...]
    counts: Ints
    posts: Ints
    groups: int
    largest_group: int
    moved: int = 0

    def deviations(self) -> npt.NDArray[np.float64]:
        """Relative difference of each tag's share from its share of all, ``(sides, classes)``."""
        with np.errstate(divide="ignore", invalid="ignore"):
            overall = self.counts.sum(axis=0) / self.posts.sum()
            own = self.counts / self.posts[:, None]
            found: npt.NDArray[np.float64] = np.nan_to_num(np.abs(own / overall - 1.0))
        return found

    def worst(self) -> tuple[float, int]:
        """The largest such difference of tags with enough posts, and the tag; 0 and -1 if none."""
        frequent = self.counts.sum(axis=0) >= FREQUENT
        if not frequent.any():
            return 0.0, -1
        largest = np.where(frequent, self.deviations().max(axis=0), -1.0)
        return float(largest.max()), int(largest.argmax())


@dataclass(frozen=True)
class Dealing:
    """How posts are dealt.

    Attributes:
        shares: Of training, validation and test; a side with 0 is left out.
        seed: Of every draw.
        keep: A ``split.jsonl`` whose posts stay on their side.
    """

    shares: tuple[float, float, float]
    seed: int = 0
    keep: Path | None = None


def split(index: Index, labels: LabelMap, how: Dealing) -> Split:
    """Deal the posts of a linked index; what one group holds goes to one side.

    Raises:
        ConfigError: There are too few posts for as many sides, or ``keep`` cannot be read.
    """
    names = tuple(n for n, share in zip(SIDES, how.shares, strict=True) if share > 0)
    used = [share for share in how.shares if share > 0]
    if how.keep is not None:
        _hold(index, names, how.keep)
    groups = _Groups(index, len(labels))
    groups.fill(how.seed)
    if groups.count < len(names):
        raise ConfigError(
            f"{len(index)} usable posts in {groups.count} groups are too few for {', '.join(names)}"
        )
    held = Held.nothing(len(names), len(labels))
    for part in groups.read(fixed=True):
        held.add(part.rows, groups.settle(part.numbers, part.side))
    frequent = groups.totals >= FREQUENT
    parts = 0
    for part in groups.read(fixed=False):
        side = stratify(part.rows, used, how.seed, held, frequent=frequent)
        held.add(part.rows, groups.settle(part.numbers, side))
        parts += 1
    # Those that came first did not know what would follow.
    for _ in range(_PASSES if parts > 1 else 0):
        for part in groups.read(fixed=False):
            held.take(part.rows, part.side)
            side = stratify(part.rows, used, how.seed, held, frequent=frequent, begin=part.side)
            held.add(part.rows, groups.settle(part.numbers, side))
    return Split(names, held.tags, held.posts, groups.count, groups.largest, groups.moved())


@dataclass(frozen=True)
class _Part:
    """Some groups.

    Attributes:
        numbers: Of the groups.
        side: int64 ``(groups,)``: where they are, or are fixed to; -1 of those not dealt yet.
        rows: Their tags.
    """

    numbers: list[int]
    side: Ints
    rows: GroupTags


class _Groups:
    """The table of groups: made of the posts, read and settled a bounded number at a time."""

    def __init__(self, index: Index, classes: int) -> None:
        self._base, self._classes = index.base, classes
        self.count = self.largest = 0
        self.totals: Ints = np.zeros(classes, np.int64)

    def fill(self, seed: int) -> None:
        """Count the tags of each group, and say in what order the groups are dealt.

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
            for _, blob, held in members:
                listed = np.frombuffer(blob, np.int32).tolist()
                tags.update(listed)
                size, fixed = size + 1, max(fixed, held)
            self.count, self.largest = self.count + 1, max(self.largest, size)
            pairs = np.array(sorted(tags.items()), np.int32).reshape(-1, 2)
            np.add.at(self.totals, pairs[:, 0], pairs[:, 1])
            yield number, size, pairs.tobytes(), fixed, int(random.integers(2**62))

    def read(self, *, fixed: bool) -> Iterator[_Part]:
        """The groups that are fixed, or the others, a bounded number at a time."""
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
        """Write the sides of groups; returns them."""
        rows = zip(side.tolist(), numbers, strict=True)
        self._base.executemany("UPDATE parts SET side = ? WHERE number = ?", rows)
        return side

    def moved(self) -> int:
        """Posts that are not on the side which held them."""
        query = (
            "SELECT COUNT(*) FROM posts JOIN parts ON parts.number = part "
            "WHERE held >= 0 AND held != side"
        )
        return int(self._base.execute(query).fetchone()[0])


def _hold(index: Index, names: tuple[str, ...], keep: Path) -> None:
    """Note the sides of an earlier split."""

    def rows() -> Iterator[tuple[int, int]]:
        for post_id, side in _read_split(keep):
            number = index.number_of(post_id)
            if number is not None and side in names:
                yield names.index(side), number

    batches(index.base, "UPDATE posts SET held = ? WHERE number = ?", rows())


def _read_split(path: Path) -> Iterable[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                entry = json.loads(line)
                post_id, side = entry["post_id"], entry["side"]
                if not (isinstance(post_id, str) and isinstance(side, str)):
                    raise TypeError("post_id and side must be texts")
                yield post_id, side
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such split") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no split.jsonl: {error}") from error
