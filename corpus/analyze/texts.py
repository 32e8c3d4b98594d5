"""Texts that are nearly the same: shingles, MinHash bands, and the exact test of a candidate."""

from __future__ import annotations

import hashlib
import unicodedata
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasketch import MinHash

_SHINGLE = 3
_PERMUTATIONS = 128
_SEED = 1

MIN_WIDTH = 20
"""A shorter text, in columns of a terminal, is a greeting: that two share it means nothing."""

MAX_CHARS = 5000
"""What is compared of a longer text."""


def normal(text: str) -> str:
    """The text without what does not matter: width, case, runs of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def comparable(text: str) -> bool:
    """Whether a normal text says enough to be a copy of another; Han characters count double."""
    if len(text) >= MIN_WIDTH:
        return True
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text) >= MIN_WIDTH


def key_of(text: str) -> bytes:
    """16 bytes of a hash of a normal text."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def shingles(text: str) -> frozenset[str]:
    """Every run of three characters of a normal text."""
    return frozenset(text[i : i + _SHINGLE] for i in range(max(1, len(text) - _SHINGLE + 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Share of the shingles of both that they have in common."""
    common = len(one & other)
    return common / (len(one) + len(other) - common)


class Bands:
    """Keys of a text such that texts as alike as `threshold` share one, nearly always.

    Of 128 permutations, as many go into a band as still let 99 in 100 pairs at the threshold meet
    in at least one band. Pairs that meet by chance are for `jaccard` to tell apart.

    Attributes:
        rows: Permutations in a band.
        count: Bands.
    """

    def __init__(self, threshold: float) -> None:
        fitting = (
            rows
            for rows in range(_PERMUTATIONS, 0, -1)
            if 1 - (1 - threshold**rows) ** (_PERMUTATIONS // rows) >= 0.99
        )
        self.rows = next(fitting, 1)
        self.count = _PERMUTATIONS // self.rows
        self._blank: MinHash | None = None

    def keys(self, parts: frozenset[str]) -> list[int]:
        """A signed 64-bit key for each band."""
        from datasketch import MinHash

        if self._blank is None:
            self._blank = MinHash(_PERMUTATIONS, _SEED, hashfunc=zlib.crc32)
        found = self._blank.copy()
        found.update_batch([part.encode("utf-8", "replace") for part in parts])
        values = found.hashvalues
        return [
            int.from_bytes(
                hashlib.blake2b(
                    bytes([band]) + values[band * self.rows : (band + 1) * self.rows].tobytes(),
                    digest_size=8,
                ).digest(),
                "little",
                signed=True,
            )
            for band in range(self.count)
        ]
