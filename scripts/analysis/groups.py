"""Groups of duplicates: written one a line, counted, and searched for labels that disagree."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from scripts.analysis.duplicates import KINDS, Group
from scripts.analysis.tally import ranked
from scripts.corpus.records import AtomicLines

_EXAMPLES, _MEMBERS, _COMPARED = 30, 8, 1000


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

    def write(self, groups: Iterable[Group], out: AtomicLines) -> Iterator[None]:
        """Write and count; one step for each group."""
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
        counts["groups"] += 1
        counts["posts"] += len(group.members)
        counts["largest"] = max(counts["largest"], len(group.members))
        sets = {post_id: self._labels_of(post_id) for post_id in group.members[:_COMPARED]}
        given = {post_id: labels for post_id, labels in sets.items() if labels}
        shown = {post_id: sorted(sets[post_id]) for post_id in group.members[:_MEMBERS]}
        example = {"posts": len(group.members), "labels": shown}
        if len(self._examples[group.kind]) < _EXAMPLES:
            self._examples[group.kind].append(example)
        if len(set(given.values())) < 2:
            return
        counts["differ"] += 1
        some = frozenset[str]().union(*given.values())
        every = some.intersection(*given.values())
        self._disputed.update(some - every)
        if len(self._disputes[group.kind]) < _EXAMPLES:
            disputed = sorted(some - every)
            self._disputes[group.kind].append({**example, "disputed": disputed[:20]})


def group_line(group: Group) -> str:
    """A line of ``duplicates.jsonl``: ``{kind, members, media}``."""
    content: dict[str, Any] = {"kind": group.kind, "members": list(group.members)}
    if group.media:
        content["media"] = list(group.media)
    return json.dumps(content, ensure_ascii=False)
