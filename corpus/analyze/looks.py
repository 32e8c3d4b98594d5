"""Perceptual hashes of pictures: which look alike though their bytes differ.

A look is 200 bytes: a 64-bit hash of the picture's structure, by which candidates are found, and
its colours on a grid of 8×8, which candidates must share. The hash alone sees no colour: a red
ball and a blue one of the same brightness are the same to it.

Source: the structure hash is the pHash of C. Zauner, Implementation and Benchmarking of Perceptual
Image Hash Functions (2010), without the DC term and with a margin about the median.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

HASH_BYTES = 8

_PLAIN = 3.0
"""A picture whose brightness varies less (standard deviation, of 255) has no structure to hash."""

_CLEAR = 4.0
"""A coefficient counts as above the median only by this much: in a picture of few shapes most are
about 0, and the noise of JPEG would toss their bits."""

_MEAN_COLOUR, _WORST_COLOUR = 6.0, 32
"""Largest distance between the grids of pictures that look alike: on average, in the worst cell."""

_BLOCK = 1 << 21


def look_of(pixels: npt.NDArray[np.uint8]) -> bytes | None:
    """Return the look of RGB pixels ``(height, width, 3)``; None for one of a single tone."""
    import cv2

    from extractors.media.pictures import squash

    small = squash(pixels, 32, 32)
    # cv2 takes the weights of ITU-R BT.601, as Pillow does.
    grey = np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), np.float32)  # (32, 32)
    if float(grey.std()) < _PLAIN:
        return None
    low = np.asarray(cv2.dct(grey), np.float32)[:8, :8].reshape(-1)[1:]  # (63,): without DC
    bits = np.concatenate([[False], low > np.median(low) + _CLEAR])  # (64,)
    return np.packbits(bits).tobytes() + squash(pixels, 8, 8).tobytes()


def hash_of(look: bytes) -> int:
    return int.from_bytes(look[:HASH_BYTES], "big")


def same_colours(one: bytes, other: bytes) -> bool:
    """Tell whether the grids of two looks are about the same."""
    a = np.frombuffer(one, np.uint8, offset=HASH_BYTES).astype(np.int16)
    b = np.frombuffer(other, np.uint8, offset=HASH_BYTES).astype(np.int16)
    apart = np.abs(a - b)
    return bool(apart.mean() <= _MEAN_COLOUR and apart.max() <= _WORST_COLOUR)


def near_pairs(hashes: npt.NDArray[np.uint64], distance: int) -> Iterator[tuple[int, int]]:
    """Yield pairs of hashes that differ in at most `distance` bits; a pair may repeat.

    Cut into ``distance + 1`` chunks, two such hashes agree in one chunk at least: only those that
    share a chunk are compared. Source: Norouzi et al., Fast Search in Hamming Space with
    Multi-Index Hashing (CVPR 2012), its simplest case.
    """
    parts = distance + 1
    for part in range(parts):
        low, high = 64 * part // parts, 64 * (part + 1) // parts
        mask = np.uint64((1 << (high - low)) - 1)
        chunk = (hashes >> np.uint64(low)) & mask
        order = np.argsort(chunk, kind="stable")
        edges = np.flatnonzero(np.diff(chunk[order])) + 1
        starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(order)]])
        for i in np.flatnonzero(ends - starts > 1).tolist():
            yield from _pairs_of(hashes, order[starts[i] : ends[i]], distance)


def _pairs_of(
    hashes: npt.NDArray[np.uint64], members: npt.NDArray[np.intp], distance: int
) -> Iterator[tuple[int, int]]:
    own = hashes[members]
    rows = max(1, _BLOCK // len(own))
    for top in range(0, len(own), rows):
        apart = np.bitwise_count(own[top : top + rows, None] ^ own[None, top:])  # (rows, rest)
        for row, column in np.argwhere(apart <= distance).tolist():
            if row < column:
                yield int(members[top + row]), int(members[top + column])
