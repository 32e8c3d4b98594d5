"""Tags: how many, which go together, and which look like mistakes."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from typing import Any

_MAX_PAIRED = 64
"""Tags of one post that are counted in pairs; a post with more has them all, and tells nothing."""

_MAX_ALL = 0.9
_MIN_TAGS = 4
_TOP_PAIRS, _TOP_POSTS, _HEAT = 200, 50, 40
_ALWAYS = 3
_IMPLIED = 10
_SEPARATORS = re.compile(r"[\s_\-·・./]+")


class Labels:
    """Counts of the tags of posts; memory grows with the tags and their pairs, not the posts."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.per_post: Counter[int] = Counter()
        self.repeated = 0
        self._pairs: Counter[tuple[str, str]] = Counter()
        self._most: list[tuple[int, int, str]] = []

    def add(self, post_id: str, labels: Iterable[str]) -> None:
        names = list(labels)
        tags = sorted(set(names))
        self.repeated += len(tags) != len(names)
        self.counts.update(tags)
        self.per_post[len(tags)] += 1
        self._pairs.update(combinations(tags[:_MAX_PAIRED], 2))
        if len(tags) >= _MIN_TAGS:
            self._most.append((-len(tags), self.per_post.total(), post_id))
            if len(self._most) > 2 * _TOP_POSTS:
                self._most = sorted(self._most)[:_TOP_POSTS]

    def as_dict(self, rare: int, taxonomy: Iterable[str] | None) -> dict[str, Any]:
        """Return everything about the tags; those with fewer posts than `rare` are rare."""
        counts = ranked(self.counts)
        return {
            "distinct": len(counts),
            "uses": self.counts.total(),
            "per_post": {str(n): self.per_post[n] for n in sorted(self.per_post)},
            "counts": counts,
            "rare_below": rare,
            "rare": {name: count for name, count in counts.items() if count < rare},
            "map": None if taxonomy is None else self._against(list(taxonomy)),
            "variants": self._variants(taxonomy or ()),
            "always_together": self._together(),
            "implied": self._implied(),
            "pairs": self._top_pairs(),
            "heat": self._heat(list(counts)[:_HEAT]),
            "repeated_in_a_post": self.repeated,
            "nearly_all_tags": self._nearly_all(),
        }

    def _against(self, names: list[str]) -> dict[str, Any]:
        known = set(names)
        return {
            "tags": len(names),
            "never": [name for name in names if name not in self.counts],
            "unknown": {n: count for n, count in ranked(self.counts).items() if n not in known},
        }

    def _variants(self, taxonomy: Iterable[str]) -> list[dict[str, int]]:
        """Return names that differ only in case, spaces, separators or width."""
        alike: dict[str, set[str]] = {}
        for name in {*self.counts, *taxonomy}:
            alike.setdefault(bare(name), set()).add(name)
        groups = [ranked(self._of(names)) for names in alike.values() if len(names) > 1]
        return sorted(groups, key=list)

    def _of(self, names: Iterable[str]) -> Counter[str]:
        return Counter({name: self.counts[name] for name in names})

    def _together(self) -> list[dict[str, Any]]:
        """Return pairs of tags of which neither ever stands without the other."""
        return [
            {"tags": [a, b], "posts": count}
            for (a, b), count in self._by_count()
            if count >= _ALWAYS and self.counts[a] == self.counts[b] == count
        ][:_TOP_PAIRS]

    def _implied(self) -> list[dict[str, Any]]:
        """Return tags that never stand without a more frequent one."""
        implied = []
        for (a, b), count in self._by_count():
            if count < _IMPLIED or self.counts[a] == self.counts[b]:
                continue
            rarer, other = (a, b) if self.counts[a] < self.counts[b] else (b, a)
            if self.counts[rarer] == count:
                implied.append({"tag": rarer, "never_without": other, "posts": count})
        return implied[:_TOP_PAIRS]

    def _top_pairs(self) -> list[dict[str, Any]]:
        pairs = []
        for (a, b), count in self._by_count()[:_TOP_PAIRS]:
            jaccard = round(count / (self.counts[a] + self.counts[b] - count), 4)
            pairs.append({"tags": [a, b], "posts": count, "jaccard": jaccard})
        return pairs

    def _heat(self, names: list[str]) -> dict[str, Any]:
        """Return the posts with both of two frequent tags; the diagonal has each tag's own."""

        def posts(a: str, b: str) -> int:
            return self.counts[a] if a == b else self._pairs[min(a, b), max(a, b)]

        return {"tags": names, "posts": [[posts(a, b) for b in names] for a in names]}

    def _nearly_all(self) -> list[dict[str, Any]]:
        least = max(_MIN_TAGS, _MAX_ALL * len(self.counts))
        return [
            {"post_id": post_id, "tags": -count}
            for count, _, post_id in sorted(self._most)[:_TOP_POSTS]
            if -count >= least
        ]

    def _by_count(self) -> list[tuple[tuple[str, str], int]]:
        return sorted(self._pairs.items(), key=lambda item: (-item[1], item[0]))


def ranked(counts: Counter[str], most: int | None = None) -> dict[str, int]:
    """Return the largest counts first; equal ones by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most])


def bare(name: str) -> str:
    """Return a tag's name without what is easily written in two ways."""
    return _SEPARATORS.sub("", unicodedata.normalize("NFKC", name).casefold())
