"""Random damage to a file: the same seed and number always give the same bytes."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence

_HEAD_BYTES = 256
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_PNG = b"\x89PNG\r\n\x1a\n"


def mutate(content: bytes, other: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage a file in one way, now and then in two.

    Args:
        content: The file.
        other: Another one, for what is spliced in.
        rng: Decides everything.

    Returns:
        What was done, and the bytes.
    """
    name = rng.choice(list(MUTATIONS))
    changed = MUTATIONS[name](bytearray(content), other, rng)
    if rng.random() < 0.25:
        changed = _flip(bytearray(changed), other, rng)
    if changed.startswith(_PNG) and rng.random() < 0.7:
        changed = with_png_checksums(changed)  # else only the checksum would ever be tested
    return name, changed


def _truncate(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    return bytes(data[: int(len(data) * rng.random() ** 0.5)])


def _flip(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 2, 8, 64))):
        if data:
            data[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _place(data: bytearray, rng: random.Random) -> int:
    """Pick an offset, in the headers at either end more often than in what they describe."""
    kind = rng.random()
    if kind < 0.4:
        return rng.randrange(min(len(data), _HEAD_BYTES))
    if kind < 0.55:
        return rng.randrange(max(0, len(data) - 4 * _HEAD_BYTES), len(data))
    return rng.randrange(len(data))


def _number(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    """Set a field of 1 to 8 bytes to 0, 1, or the largest there is."""
    for _ in range(rng.choice((1, 1, 3))):
        size = rng.choice((1, 2, 4, 8))
        value = rng.choice(_EXTREMES) if rng.random() < 0.8 else rng.getrandbits(8 * size)
        packed = (value & (1 << 8 * size) - 1).to_bytes(size, rng.choice(("big", "little")))
        if data:
            place = _place(data, rng)
            data[place : place + size] = packed
    return bytes(data)


def _overwrite(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    size = rng.choice((4, 32, 512, 4096))
    place = _place(data, rng) if data else 0
    filling = rng.choice((b"\0" * size, b"\xff" * size, rng.randbytes(size)))
    data[place : place + size] = filling[: max(0, len(data) - place)]
    return bytes(data)


def _delete(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    place = _place(data, rng) if data else 0
    del data[place : place + rng.choice((1, 2, 7, 100, 2000))]
    return bytes(data)


def _repeat(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    place, size = rng.randrange(len(data) or 1), rng.choice((1, 8, 200, 5000))
    piece = bytes(data[place : place + size])
    data[place:place] = piece * rng.choice((1, 3, 50))
    return bytes(data)


def _insert(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    place = _place(data, rng) if data else 0
    data[place:place] = rng.randbytes(rng.choice((1, 3, 64, 3000)))
    return bytes(data)


def _splice(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    """Join the beginning of this file and the end of another."""
    return bytes(data[: rng.randrange(len(data) or 1)]) + other[rng.randrange(len(other) or 1) :]


def _head_of_other(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    """Put another format's first bytes before this one's content."""
    size = rng.choice((4, 12, 64))
    return other[:size] + bytes(data[size:])


def _append(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    return bytes(data) + rng.choice((other, b"\0" * 4096, rng.randbytes(512), bytes(data)))


def _reorder(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    size = max(1, len(data) // rng.choice((2, 5, 20)))
    blocks = [bytes(data[i : i + size]) for i in range(0, len(data), size)]
    tail = blocks[1:]
    rng.shuffle(tail)
    return b"".join(blocks[:1] + tail)


def _nothing(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    """Change nothing: the file's name or its use is wrong."""
    return bytes(data)


MUTATIONS: dict[str, Callable[[bytearray, bytes, random.Random], bytes]] = {
    "truncated": _truncate,
    "bits flipped": _flip,
    "numbers": _number,
    "overwritten": _overwrite,
    "bytes deleted": _delete,
    "bytes repeated": _repeat,
    "bytes inserted": _insert,
    "spliced": _splice,
    "another's head": _head_of_other,
    "appended": _append,
    "reordered": _reorder,
    "wrong extension": _nothing,
}


def with_png_checksums(data: bytes) -> bytes:
    """Return a PNG with right checksums, as far as its chunks can be followed."""
    out, position = bytearray(data), 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 12 + length
        if end > len(data):
            break
        struct.pack_into(">I", out, end - 4, zlib.crc32(data[position + 4 : end - 4]))
        position = end
    return bytes(out)


def png_of(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Return a PNG of named chunks."""
    parts = [_PNG]
    for name, body in chunks:
        parts += [struct.pack(">I", len(body)), name, body]
        parts.append(struct.pack(">I", zlib.crc32(name + body)))
    return b"".join(parts)
