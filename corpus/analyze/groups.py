"""Groups of duplicates: written one a line, counted, and searched for labels that disagree."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from corpus.analyze.duplicates import KINDS, Group
from corpus.analyze.tally import ranked
from corpus.records import AtomicLines

_EXAMPLES, _MEMBERS = 30, 8


class GroupTally:
    """Counts groups.

    Args:
        labels_of: Distinct tags of a post.
    """

    def __init__(self, labels_of: Callable[[str], frozenset[str]]) -> None:
        self._labels_of = labels_of
        self._kinds = {kind: Counter[str]() for kind in KINDS}
        self._examples: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        self._disputes: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        self._disputed: Counter[str] = Counter()
        self._size = 0  # of the group so far
        self._shown: list[dict[str, Any]] = []  # of the group: its size may grow

    def write(self, groups: Iterable[Group], out: AtomicLines) -> Iterator[None]:
        """Write and count; one step for each group, or part of one."""
        for group in groups:
            out.write(group_line(group))
            self._add(group)
            yield

    def as_dict(self) -> dict[str, Any]:
        """For each kind: groups, posts, the largest, how many disagree, and examples."""
        return {
            "kinds": {
                kind: {
                    "groups": counts["groups"],
                    "posts": counts["posts"],
                    "largest": counts["largest"],
                    "labels_differ": counts["differ"],
                    "examples": self._examples[kind],
                    "disputes": self._disputes[kind],
                }
                for kind, counts in self._kinds.items()
            },
            "disputed_tags": ranked(self._disputed, 50),
        }

    def _add(self, group: Group) -> None:
        counts = self._kinds[group.kind]
        new = len(group.members) - group.continued
        self._size = new + self._size * group.continued
        counts["posts"] += new
        counts["largest"] = max(counts["largest"], self._size)
        if group.continued:  # its tags are not compared
            for example in self._shown:
                example["posts"] = self._size
            return
        self._shown = []
        counts["groups"] += 1
        sets = {post_id: self._labels_of(post_id) for post_id in group.members}
        given = {post_id: labels for post_id, labels in sets.items() if labels}
        shown = {post_id: sorted(sets[post_id]) for post_id in group.members[:_MEMBERS]}
        example = {"posts": len(group.members), "labels": shown}
        if len(self._examples[group.kind]) < _EXAMPLES:
            self._examples[group.kind].append(example)
            self._shown.append(example)
        if len(set(given.values())) < 2:
            return
        counts["differ"] += 1
        some = frozenset[str]().union(*given.values())
        every = some.intersection(*given.values())
        self._disputed.update(some - every)
        if len(self._disputes[group.kind]) < _EXAMPLES:
            disputed = sorted(some - every)
            dispute = {**example, "disputed": disputed[:20]}
            self._disputes[group.kind].append(dispute)
            self._shown.append(dispute)


def group_line(group: Group) -> str:
    """A line of ``duplicates.jsonl``: ``{kind, members, media, continued}``."""
    content: dict[str, Any] = {"kind": group.kind, "members": list(group.members)}
    if group.media:
        content["media"] = list(group.media)
    if group.continued:
        content["continued"] = True
    return json.dumps(content, ensure_ascii=False)
