"""The protocol of a cache store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Stats:
    """How much a store holds; ``max_bytes`` is its limit."""

    entries: int
    bytes: int
    max_bytes: int


class CacheStore(Protocol):
    """Bytes by key, for many threads and processes at once.

    Keys are 64 hex digits. What is put may be evicted at any time. Every method raises
    `CacheUnavailable` when the backend does not do it.
    """

    def get_many(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        """What is there of these; what is missing is left out."""
        ...

    def put(self, key: str, value: bytes) -> None:
        """Keep a value, whole or not at all; evicts now and then."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Forget these; one that is not there is no mistake."""
        ...

    def stats(self) -> Stats:
        """Count entries and bytes; may take long."""
        ...

    def prune(self, max_bytes: int) -> Stats:
        """Evict down to so many bytes; gives what went, as entries and bytes."""
        ...

    def close(self) -> None:
        """Close connections."""
        ...
