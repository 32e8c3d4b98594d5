"""Which side each post goes to, and how even that came out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from config.errors import ConfigError
from config.labels import LabelMap
from scripts.building.gather import Gathered, key_of, tag_pairs
from scripts.building.groups import Groups
from scripts.building.stratify import FREQUENT, GroupTags, stratify

SIDES = ("train", "valid", "test")

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """The sides of posts.

    Attributes:
        names: Of the sides, those with a share.
        side: int64 ``(posts,)``: index into `names`.
        group: int64 ``(posts,)``: number of each post's group.
        counts: int64 ``(sides, classes)``: posts of each tag.
        posts: int64 ``(sides,)``.
        moved: Posts that a link to another side has taken from where `keep` had them.
    """

    names: tuple[str, ...]
    side: Ints
    group: Ints
    counts: Ints
    posts: Ints
    moved: int = 0

    @property
    def largest_group(self) -> int:
        """Posts of the largest group."""
        return int(np.bincount(self.group).max()) if len(self.group) else 0

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


def split(found: Gathered, groups: Groups, labels: LabelMap, how: Dealing) -> Split:
    """Deal the posts; what one group holds goes to one side.

    Raises:
        ConfigError: There are too few posts for as many sides, or ``keep`` cannot be read.
    """
    shares = how.shares
    names = tuple(n for n, share in zip(SIDES, shares, strict=True) if share > 0)
    used = [share for share in shares if share > 0]
    group = groups.numbers()
    count = int(group.max()) + 1 if len(group) else 0
    if count < len(names):
        raise ConfigError(
            f"{len(found)} usable posts in {count} groups are too few for {', '.join(names)}"
        )
    pairs = tag_pairs(found)
    rows = GroupTags.of(group, *pairs, len(labels))
    fixed, held = _fixed(found, group, names, how.keep)
    chosen = stratify(rows, used, how.seed, fixed)
    side = chosen[group]
    flat = np.bincount(side[pairs[0]] * len(labels) + pairs[1], minlength=len(names) * len(labels))
    return Split(
        names,
        side,
        group,
        flat.reshape(len(names), len(labels)).astype(np.int64),
        np.bincount(side, minlength=len(names)),
        int((side[held >= 0] != held[held >= 0]).sum()),
    )


def _fixed(
    found: Gathered, group: Ints, names: tuple[str, ...], keep: Path | None
) -> tuple[Ints | None, Ints]:
    """Side of each group that has a kept post, and of each kept post; -1 elsewhere.

    Posts of one group that were on different sides all go to the latest of them: what was tested
    with must not be learned from.
    """
    held = np.full(len(found), -1, np.int64)
    if keep is None:
        return None, held
    place = {mark: i for i, mark in enumerate(found.ids)}
    for entry in _read_split(keep):
        number = place.get(key_of("id", entry["post_id"]))
        if number is not None and entry["side"] in names:
            held[number] = names.index(entry["side"])
    fixed = np.full(int(group.max()) + 1, -1, np.int64)
    np.maximum.at(fixed, group, held)
    return fixed, held


def _read_split(path: Path) -> list[dict[str, Any]]:
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(e["post_id"], str) and isinstance(e["side"], str) for e in entries):
            raise TypeError("post_id and side must be texts")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such split") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no split.jsonl: {error}") from error
    return entries
