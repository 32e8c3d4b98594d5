"""Which posts are taken: by tag, and by a sample that is the same for the same seed.

A post's place in the sample is a hash of its ID, so that it depends on nothing else: the posts
with the smallest hashes are taken. Memory holds counts, and as many hashes as are to be taken.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from corpus.records import CorpusPost

_ALL = (1 << 64) - 1
_ROOM = 1 << 16


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        rare: Tags that are left out.
        need_tag: Whether a post without any tag that is kept is left out.
        highest: Posts up to this hash are taken, and those of `extra`.
    """

    seed: int = 0
    rare: frozenset[str] = frozenset()
    need_tag: bool = False
    highest: int = _ALL
    extra: frozenset[int] = frozenset()

    def without_rare(self, entry: CorpusPost) -> CorpusPost | str:
        """The post with the tags that are kept, or why it is left out."""
        if not self.need_tag:
            return entry
        labels = tuple(name for name in entry.post.labels if name not in self.rare)
        if not labels:
            return "only tags of too few posts" if entry.post.labels else "no tags"
        return replace(entry, post=replace(entry.post, labels=labels))

    def sampled(self, post_id: str) -> bool:
        """Whether the post is in the sample."""
        place = hash_of(post_id, self.seed)
        return place <= self.highest or place in self.extra

    def dumps(self) -> str:
        """As JSON."""
        content = {
            "seed": self.seed,
            "rare": sorted(self.rare),
            "need_tag": self.need_tag,
            "highest": self.highest,
            "extra": sorted(self.extra),
        }
        return json.dumps(content, ensure_ascii=False)

    @classmethod
    def loads(cls, text: str) -> Choice:
        """The reverse of `dumps`.

        Raises:
            ValueError: It is no such text.
        """
        try:
            content: dict[str, Any] = json.loads(text)
            return cls(
                seed=int(content["seed"]),
                rare=frozenset(content["rare"]),
                need_tag=bool(content["need_tag"]),
                highest=int(content["highest"]),
                extra=frozenset(map(int, content["extra"])),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a choice: {error}") from error


def hash_of(post_id: str, seed: int) -> int:
    """The place of a post in every sample of this seed, 64 bits."""
    salt = seed.to_bytes(8, "big")
    raw = hashlib.blake2b(post_id.encode("utf-8"), digest_size=8, key=salt).digest()
    return int.from_bytes(raw, "big")


class Smallest:
    """The `count` smallest of any number of hashes."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept = np.empty(0, np.uint64)
        self._new: list[int] = []

    def add(self, value: int) -> None:
        """Look at one more."""
        self._new.append(value)
        if len(self._new) >= _ROOM:
            self._shrink()

    def sorted(self) -> list[int]:
        """The smallest ones, in order."""
        self._shrink()
        return [int(value) for value in np.sort(self._kept)]

    def _shrink(self) -> None:
        both = np.concatenate([self._kept, np.array(self._new, np.uint64)])
        self._new = []
        if len(both) > self._count:
            both = np.partition(both, self._count - 1)[: self._count].copy()
        self._kept = both


def rare_tags(posts: Iterable[CorpusPost], minimum: int) -> frozenset[str]:
    """Tags with fewer posts than the minimum."""
    counts = Counter(name for entry in posts for name in entry.post.labels)
    return frozenset(name for name, count in counts.items() if count < minimum)


def sample(posts: Iterator[CorpusPost], choice: Choice, count: int, minimum: int) -> Choice:
    """Pick a sample of `count` posts in which each tag keeps `minimum` posts.

    Where these alone are more than `count`, the sample is just these.

    Args:
        posts: Those that can be picked, rare tags already taken off.
        choice: What was chosen before.
        count: Size of the sample.
        minimum: Posts of each tag; 0 for none in particular.
    """
    smallest = Smallest(count)
    by_tag: dict[str, list[int]] = {}
    for entry in posts:
        place = hash_of(entry.post.post_id, choice.seed)
        smallest.add(place)
        for name in entry.post.labels if minimum else ():
            _keep_smallest(by_tag.setdefault(name, []), -place, minimum)
    needed = {-place for places in by_tag.values() for place in places}
    others = [place for place in smallest.sorted() if place not in needed]
    taken = others[: max(0, count - len(needed))]
    highest = taken[-1] if taken else -1
    return replace(choice, highest=highest, extra=frozenset(p for p in needed if p > highest))


def _keep_smallest(heap: list[int], negative: int, count: int) -> None:
    """A heap of negated hashes holds the `count` smallest hashes."""
    if len(heap) < count:
        heapq.heappush(heap, negative)
    else:
        heapq.heappushpop(heap, negative)
