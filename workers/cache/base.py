"""The protocol of a cache store, and what its backends share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

_ENTRY = re.compile(r"(?:.*/)?[0-9a-f]{2}/[0-9a-f]{62}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Stats:
    """Size of a store; ``max_bytes`` is `cache.max_mb`."""

    entries: int
    bytes: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """One stored entry.

    Attributes:
        name: Path or key.
        size: In bytes.
        used_at: Greater is later: of its last use, or of its writing where that is not known.
    """

    name: str
    size: int
    used_at: float


class CacheStore(Protocol):
    """Bytes by key, for many threads and processes at once.

    Keys are 64 hex digits. An entry may be evicted at any time. Every method raises
    `CacheUnavailable` when the backend fails.
    """

    def get_many(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        """Return the values of these keys; missing ones are left out."""
        ...

    def put(self, key: str, value: bytes) -> None:
        """Store a value, whole or not at all."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete these; missing ones are ignored."""
        ...

    def stats(self) -> Stats:
        """Count entries and bytes; may take long."""
        ...

    def prune(self, max_bytes: int) -> Stats:
        """Delete the oldest entries down to a size; return what was deleted."""
        ...

    def close(self) -> None:
        """Close connections."""
        ...


def is_entry(path: str) -> bool:
    """Tell whether a path ends as those of entries do; other files are not ours to delete."""
    return _ENTRY.fullmatch(path) is not None


def oldest_beyond(entries: Iterable[StoredEntry], max_bytes: int) -> list[StoredEntry]:
    """Return the oldest entries, without which the others are no larger than ``max_bytes``."""
    by_age = sorted(entries, key=lambda entry: entry.used_at)
    size = sum(entry.size for entry in by_age)
    for count, entry in enumerate(by_age):
        if size <= max_bytes:
            return by_age[:count]
        size -= entry.size
    return by_age
