"""What a picture's header says, read before anything is decoded.

Size, number of frames, EXIF orientation, and whether the file is whole: a decoder that is handed
half a file may fill the rest with grey and say nothing.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from common.errors import MediaError
from extractors.media.sniff import MAX_PARTS

_TRUNCATED = "truncated"

_MAX_SCANS = 500
"""Of a progressive JPEG, which has about ten; each may cost a pass over all pixels."""


@dataclass(frozen=True, slots=True)
class PictureHeader:
    """Header of a picture file.

    Attributes:
        width: Pixels, before the orientation is applied.
        height: Pixels, before the orientation is applied.
        frames: Pictures of an animation; 1 for a still.
        orientation: EXIF orientation, 1 to 8.
    """

    width: int
    height: int
    frames: int = 1
    orientation: int = 1


def read_header(data: memoryview, family: str) -> PictureHeader:
    """Read the header of a picture and walk through its structure to its end.

    Args:
        data: The whole file.
        family: ``jpeg``, ``png``, ``gif``, ``webp``, ``bmp``, ``tiff`` or ``avif``.

    Raises:
        MediaError: The file is truncated, or its structure is broken.
    """
    try:
        header = _READERS[family](data)
    except (IndexError, struct.error) as error:
        raise MediaError(f"{_TRUNCATED} {family.upper()} picture") from error
    except _BrokenError as error:
        raise MediaError(f"{error} {family.upper()} picture") from error
    if header.width < 1 or header.height < 1:
        raise MediaError(f"a picture without pixels: {header.width}×{header.height}")
    return header


class _BrokenError(Exception):
    """``truncated`` or ``broken``; `read_header` adds the name of the format."""


def _parts() -> Iterator[None]:
    """One for each part of a file's structure; raises when there are more than can be meant."""
    for _ in range(MAX_PARTS):
        yield
    raise _BrokenError("broken")


# JPEG ----------------------------------------------------------------------------------------


def _jpeg(data: memoryview) -> PictureHeader:
    """Segments up to the first scan, then the end marker; ITU T.81 annex B."""
    size: tuple[int, int] | None = None
    orientation, position, parts = 1, 2, _parts()
    for _ in parts:
        while data[position] == 0xFF and data[position + 1] == 0xFF:
            position += 1  # fill bytes
            next(parts)
        if data[position] != 0xFF:
            raise _BrokenError("broken")
        marker = data[position + 1]
        (length,) = struct.unpack_from(">H", data, position + 2)
        body = data[position + 4 : position + 2 + length]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", body, 1)
            size = (width, height)
        elif marker == 0xE1 and bytes(body[:6]) == b"Exif\0\0":
            orientation = _exif_orientation(body[6:])
        position += 2 + length
        if marker == 0xDA:
            break
    if size is None:
        raise _BrokenError("broken")
    # Inside a scan 0xFF is always followed by 0 or a restart marker, so that this is the end.
    if _find(data, b"\xff\xd9", position) < 0:
        raise _BrokenError(_TRUNCATED)
    if _count(data, b"\xff\xda", position) > _MAX_SCANS:
        raise _BrokenError("broken")
    return PictureHeader(*size, orientation=orientation)


def _count(data: memoryview, needle: bytes, start: int, block: int = 1 << 20) -> int:
    """`bytes.count` on a memoryview, a block at a time; for a needle of two bytes."""
    return sum(bytes(data[i : i + block + 1]).count(needle) for i in range(start, len(data), block))


def _find(data: memoryview, needle: bytes, start: int, block: int = 1 << 20) -> int:
    """`bytes.find` on a memoryview, a block at a time, the last one first: it is mostly there."""
    last = max(start, len(data) - block)
    at = bytes(data[last:]).find(needle)
    if at >= 0:
        return last + at
    for begin in range(start, last, block):
        at = bytes(data[begin : begin + block + len(needle)]).find(needle)
        if at >= 0:
            return begin + at
    return -1


def _exif_orientation(tiff: memoryview) -> int:
    """Tag 0x0112 of the first directory; 1 when it is absent or the EXIF is broken."""
    try:
        value = _tiff_tags(tiff).get(0x0112, 1)
    except (struct.error, IndexError, _BrokenError):
        return 1
    return value if 1 <= value <= 8 else 1


# PNG -----------------------------------------------------------------------------------------


def _png(data: memoryview) -> PictureHeader:
    """Chunks up to IEND, with the checksums of those that matter; PNG specification section 5."""
    width, height = struct.unpack_from(">II", data, 16)
    frames, orientation, position = 1, 1, 8
    for _ in _parts():
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise _BrokenError(_TRUNCATED)
        critical = not name[0] & 0x20
        (checksum,) = struct.unpack_from(">I", data, end - 4)
        if critical and zlib.crc32(data[position + 4 : end - 4]) != checksum:
            raise _BrokenError("broken")
        if name == b"acTL":
            (frames,) = struct.unpack_from(">I", data, position + 8)
        elif name == b"eXIf":
            orientation = _exif_orientation(data[position + 8 : end - 4])
        elif name == b"IEND":
            return PictureHeader(width, height, max(1, frames), orientation)
        position = end
    raise _BrokenError("broken")


# GIF -----------------------------------------------------------------------------------------


def _gif(data: memoryview) -> PictureHeader:
    """Blocks up to the trailer; GIF89a specification."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + _colour_table(flags)
    frames, parts = 0, _parts()
    while position < len(data) and data[position] != 0x3B:  # a missing trailer is tolerated
        if data[position] == 0x21:
            position = _sub_blocks(data, position + 2, parts)
        elif data[position] == 0x2C:
            start = position + 11 + _colour_table(data[position + 9])
            position = _sub_blocks(data, start, parts)
            frames += 1
        elif frames:
            break  # rubbish behind the last frame
        else:
            raise _BrokenError("broken")
    if not frames:
        raise _BrokenError(_TRUNCATED)
    return PictureHeader(width, height, frames)


def _colour_table(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _sub_blocks(data: memoryview, position: int, parts: Iterator[None]) -> int:
    """Position behind a run of length-prefixed blocks."""
    while data[position]:
        position += 1 + data[position]
        next(parts)
    next(parts)
    return position + 1


# WebP, BMP -----------------------------------------------------------------------------------


def _webp(data: memoryview) -> PictureHeader:
    """RIFF chunks; RFC 9649."""
    size: tuple[int, int] | None = None
    frames, orientation = 0, 1
    for name, body in _riff_chunks(data):
        if name == b"VP8X":
            size = (
                int.from_bytes(body[4:7], "little") + 1,
                int.from_bytes(body[7:10], "little") + 1,
            )
        elif name == b"VP8 " and size is None:
            width, height = struct.unpack_from("<HH", body, 6)
            size = (width & 0x3FFF, height & 0x3FFF)
        elif name == b"VP8L" and size is None:
            (bits,) = struct.unpack_from("<I", body, 1)
            size = ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        elif name == b"ANMF":
            frames += 1
        elif name == b"EXIF":
            orientation = _exif_orientation(body[6:] if bytes(body[:4]) == b"Exif" else body)
    if size is None:
        raise _BrokenError("broken")
    return PictureHeader(*size, frames=max(1, frames), orientation=orientation)


def _riff_chunks(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    (total,) = struct.unpack_from("<I", data, 4)
    position, end = 12, total + 8
    if end > len(data) + 1:  # some writers leave the last byte of padding out
        raise _BrokenError(_TRUNCATED)
    parts = _parts()
    while position + 8 <= min(end, len(data)):
        next(parts)
        name, length = struct.unpack_from("<4sI", data, position)
        body = data[position + 8 : position + 8 + length]
        if len(body) < length:
            raise _BrokenError(_TRUNCATED)
        yield name, body
        position += 8 + length + (length & 1)


def _bmp(data: memoryview) -> PictureHeader:
    """Info header; rows of an uncompressed picture must all be there."""
    offset, size = struct.unpack_from("<II", data, 10)
    if size < 16:  # OS/2
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    rows = abs(height)
    if compression in (0, 3) and offset + (width * bits + 31) // 32 * 4 * rows > len(data):
        raise _BrokenError(_TRUNCATED)
    return PictureHeader(width, rows)


# TIFF, AVIF ----------------------------------------------------------------------------------


def _tiff_tags(data: memoryview) -> Mapping[int, int]:
    """Tags of the first directory whose value is one short or long; TIFF 6.0 section 2."""
    order = {b"II": "<", b"MM": ">"}.get(bytes(data[:2]))
    if order is None:
        raise _BrokenError("broken")
    (directory,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, directory)
    tags: dict[int, int] = {}
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, kind, values = struct.unpack_from(f"{order}HHI", data, entry)
        if values == 1 and kind in (3, 4):
            (tags[tag],) = struct.unpack_from(
                f"{order}{'H' if kind == 3 else 'I'}", data, entry + 8
            )
    return tags


def _tiff(data: memoryview) -> PictureHeader:
    """First directory. OpenCV itself turns a TIFF upright and finds that its end is missing."""
    tags = _tiff_tags(data)
    return PictureHeader(tags.get(0x0100, 0), tags.get(0x0101, 0))


def _avif(data: memoryview) -> PictureHeader:
    """The largest `ispe` property; ISO/IEC 23008-12 section 6.5.3."""
    head = bytes(data[: 1 << 16])
    sizes = []
    position = head.find(b"ispe")
    while position >= 0:
        sizes.append(struct.unpack_from(">II", head, position + 8))
        position = head.find(b"ispe", position + 4)
    if not sizes:
        raise _BrokenError("broken")
    return PictureHeader(*max(sizes, key=lambda size: size[0] * size[1]))


_READERS: dict[str, Callable[[memoryview], PictureHeader]] = {
    "jpeg": _jpeg,
    "png": _png,
    "gif": _gif,
    "webp": _webp,
    "bmp": _bmp,
    "tiff": _tiff,
    "avif": _avif,
}
