"""Sizes that the header of a sound lacks, since it was written to a pipe or never closed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal, NamedTuple

from extractors.media.sniff import HEAD_BYTES, LARGEST_PROMISE


class _Chunks(NamedTuple):
    first: int  # offset of the first chunk
    name_bytes: int
    size_bytes: int
    order: Literal["big", "little"]
    counted: int  # bytes of the chunk's own header that its size includes
    alignment: int
    data: bytes  # name of the chunk that holds the samples

    def number(self, head: bytes, at: int) -> int:
        """Return the size at an offset."""
        return int.from_bytes(head[at : at + self.size_bytes], self.order)


_W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\0\xc0\x4f\x8e\xdb\x8a"

_CHUNKS = {
    "aiff": _Chunks(12, 4, 4, "big", 0, 2, b"SSND"),
    "w64": _Chunks(40, 16, 8, "little", 24, 8, _W64_DATA),
}


class FilledIn(io.FileIO):
    """A file that is read as if some of its bytes were others."""

    def __init__(self, path: Path, bytes_at: dict[int, bytes]) -> None:
        super().__init__(path)
        self._bytes_at = bytes_at

    def __del__(self) -> None:
        self.close()  # a container of PyAV leaves it open

    def read(self, size: int | None = -1, /) -> bytes:
        begin = self.tell()
        data = bytearray(super().read(-1 if size is None else size) or b"")
        for at, value in self._bytes_at.items():
            for index, byte in enumerate(value, at - begin):
                if 0 <= index < len(data):
                    data[index] = byte
        return bytes(data)


def filled_in(path: Path, family: str) -> FilledIn | None:
    """Open an AU, AIFF or Wave64 sound with the sizes that its header lacks.

    Zero and numbers too large to be true stand there until a writer comes back; FFmpeg knows them
    in WAV only. Returns None for other families, and where the samples have a size.
    """
    if family not in ("au", *_CHUNKS):
        return None
    length = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    sizes = _au_sizes(head, length) if family == "au" else _chunk_sizes(head, length, family)
    return FilledIn(path, sizes) if sizes else None


def _au_sizes(head: bytes, length: int) -> dict[int, bytes]:
    begin, stated = (int.from_bytes(head[at : at + 4], "big") for at in (4, 8))
    rest = length - begin
    return {8: rest.to_bytes(4, "big")} if _is_unknown(stated) and 0 < rest < 2**32 else {}


def _chunk_sizes(head: bytes, length: int, family: str) -> dict[int, bytes]:
    chunks = _CHUNKS[family]
    outer = chunks.name_bytes  # the size of the whole file stands behind its first name
    right = {outer: length - 8 if family == "aiff" else length}
    wrong = set()
    at = chunks.first
    while (begin := at + chunks.name_bytes + chunks.size_bytes) <= len(head):
        name, size_at = head[at : at + chunks.name_bytes], at + chunks.name_bytes
        stated = chunks.number(head, size_at) - chunks.counted
        if name == chunks.data:
            right[size_at] = length - begin + chunks.counted
            # SSND has 8 bytes before the samples.
            if _is_unknown(stated - 8):
                wrong.add(size_at)
            break
        if name == b"COMM" and _is_unknown(chunks.number(head, begin + 2)):
            right[begin + 2] = LARGEST_PROMISE  # FFmpeg stops at the end of the samples
            wrong.add(begin + 2)
        at = begin + max(stated, 0)
        at += -at % chunks.alignment
    if wrong or not at < chunks.number(head, outer) < LARGEST_PROMISE:
        wrong.add(outer)
    return {
        at: right[at].to_bytes(chunks.size_bytes, chunks.order)
        for at in wrong
        if right[at] < 256**chunks.size_bytes
    }


def _is_unknown(size: int) -> bool:
    return not 0 < size < LARGEST_PROMISE
