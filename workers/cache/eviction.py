"""Size limit without an index: keys are spread evenly, so each group of them has its share.

A process counts only what it has put itself. After a sixteenth of a group's share it lists that
group and deletes the oldest entries past the limit. So a put costs a few directory entries on
average, no state is shared, and a process that is killed leaves nothing that is wrong. Many
processes together may pass the limit by a sixteenth each.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_ENTRY = re.compile(r"(?:.*/)?[0-9a-f]{2}/[0-9a-f]{62}", re.DOTALL)
SHARDS = tuple(f"{i:02x}" for i in range(256))
_GROUP_BYTES = 16 << 20
_STEP = 1 / 16
_LOW_MARK = 7 / 8


@dataclass(frozen=True, slots=True)
class Held:
    """One stored entry.

    Attributes:
        used_at: Seconds; when it was used last, or written where that is not known.
    """

    name: str
    size: int
    used_at: float


def is_entry(path: str) -> bool:
    """Whether a path ends as those of entries do; anything else that lies there is not ours."""
    return _ENTRY.fullmatch(path) is not None


class Evictor:
    """Keeps the shards of a store below their limit."""

    def __init__(
        self,
        max_bytes: int,
        listed: Callable[[str], Iterable[Held]],
        delete: Callable[[Sequence[str]], None],
    ) -> None:
        """Args: listed: the entries of one shard; delete: by the names that it gave."""
        self._listed, self._delete = listed, delete
        groups = 1
        while groups < len(SHARDS) and max_bytes // (2 * groups) >= _GROUP_BYTES:
            groups *= 2
        self._per_group = len(SHARDS) // groups
        self._limit = max_bytes // groups
        self._lock = threading.Lock()
        # At a random place of the step, so that many short processes look as often as a long one.
        self._since = [random.random() * self._limit * _STEP for _ in range(groups)]  # noqa: S311 - no secret

    def put(self, shard: str, size: int) -> None:
        """So many bytes were put; looks at the shard's group now and then."""
        group = int(shard, 16) // self._per_group
        with self._lock:
            self._since[group] += size
            if self._since[group] < self._limit * _STEP:
                return
            self._since[group] = 0.0
        self._sweep(group)

    def _sweep(self, group: int) -> None:
        first = group * self._per_group
        held = [h for s in SHARDS[first : first + self._per_group] for h in self._listed(s)]
        if sum(h.size for h in held) > self._limit * (1 - _STEP):
            evict(held, int(self._limit * _LOW_MARK), self._delete)


def evict(
    held: Sequence[Held], max_bytes: int, delete: Callable[[Sequence[str]], None]
) -> tuple[int, int]:
    """Delete the oldest entries until so many bytes are left; gives entries and bytes deleted."""
    left = sum(h.size for h in held)
    doomed: list[str] = []
    before = left
    for each in sorted(held, key=lambda h: h.used_at):
        if left <= max_bytes:
            break
        doomed.append(each.name)
        left -= each.size
    if doomed:
        delete(doomed)
    return len(doomed), before - left
