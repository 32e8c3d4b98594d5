"""The type of a file by its first bytes, never by its name, and a check that its end is there.

Only the formats named here are opened at all: FFmpeg would also take playlists, which name
further files and addresses, and would find sound in random bytes.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from common.errors import MediaError
from common.post import MediaKind

_HEAD = 4096  # bytes; the first two frames of any MPEG sound fit, and an HTML page shows itself
_NOUNS: dict[MediaKind, str] = {"image": "picture", "video": "video", "audio": "sound"}
_UNKNOWN_SIZES = (0, 0x7FFFFFFF)  # what recorders write that never came back to fill in the size

TOLERATED_LOSS = 0.01
"""Share of the promised bytes that may be missing.

Some writers promise a few bytes more than they write. Double would take films that lack seconds;
half would refuse short ones for their padding.
"""

MAX_PARTS = 1_000_000
"""Boxes, chunks, blocks or segments of a file; only one made to waste time has more.

Walking through them takes a few seconds at most. A GIF of 200 MB, the most that is downloaded, has
800,000 blocks: half would refuse it, double would only double the time that can be wasted.
"""


@dataclass(frozen=True, slots=True)
class FileType:
    """A kind of file.

    Attributes:
        name: For a person: ``MP4 video``.
        family: Short name that code compares: ``jpeg``, ``mp4``, ``wav``, ...
        kinds: What a post may use it as; empty for what is no media file.
    """

    name: str
    family: str
    kinds: frozenset[MediaKind] = frozenset()


def _picture(name: str, family: str) -> FileType:
    return FileType(f"{name} picture", family, frozenset({"image"}))


def _container(name: str, family: str) -> FileType:
    return FileType(f"{name} video", family, frozenset({"video", "audio"}))


def _sound(name: str, family: str) -> FileType:
    return FileType(f"{name} sound", family, frozenset({"audio"}))


_GIF = FileType("GIF picture", "gif", frozenset({"image", "video"}))
_MP3, _AAC, _TS = _sound("MP3", "mp3"), _sound("AAC", "aac"), _container("MPEG-TS", "mpegts")
_TEXT = FileType("text", "text")

_PREFIXES: tuple[tuple[bytes, FileType], ...] = (
    (b"\xff\xd8\xff", _picture("JPEG", "jpeg")),
    (b"\x89PNG\r\n\x1a\n", _picture("PNG", "png")),
    (b"GIF87a", _GIF),
    (b"GIF89a", _GIF),
    (b"II*\x00", _picture("TIFF", "tiff")),
    (b"MM\x00*", _picture("TIFF", "tiff")),
    (b"\x1aE\xdf\xa3", _container("Matroska", "matroska")),
    (b"OggS", FileType("Ogg file", "ogg", frozenset({"video", "audio"}))),
    (b"FLV\x01", _container("Flash", "flv")),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", _container("Windows Media", "asf")),
    (b"\x00\x00\x01\xba", _container("MPEG", "mpeg")),
    (b"fLaC", _sound("FLAC", "flac")),
    (b"#!AMR", _sound("AMR", "amr")),
    (b"caff", _sound("CAF", "caf")),
    (b"ID3", _sound("MP3", "id3")),
    (b"%PDF-", FileType("PDF document", "pdf")),
    (b"PK\x03\x04", FileType("ZIP archive", "zip")),
    (b"\x1f\x8b", FileType("gzip archive", "gzip")),
    (b"#EXTM3U", FileType("playlist", "playlist")),
)

_RIFF: dict[bytes, FileType] = {
    b"WEBP": _picture("WebP", "webp"),
    b"WAVE": _sound("WAV", "wav"),
    b"AVI ": _container("AVI", "avi"),
}

_BOXES = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")


def sniff(head: bytes) -> FileType | None:
    """Return the type that a file's first bytes show; None when they show none."""
    for prefix, kind in _PREFIXES:
        if head.startswith(prefix):
            return kind
    return _by_structure(head) or _by_sync(head) or _by_text(head)


def _by_structure(head: bytes) -> FileType | None:
    """Return a type whose mark is not at the very beginning."""
    file_type = None
    if head[:4] == b"RIFF":
        file_type = _RIFF.get(head[8:12])
    elif head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        file_type = _sound("AIFF", "aiff")
    elif head[4:8] == b"ftyp":
        file_type = _by_brand(head)
    elif head[4:8] in _BOXES:
        file_type = _container("QuickTime", "mp4")
    elif head[:2] == b"BM" and len(head) >= 18 and head[6:10] == b"\0\0\0\0":
        file_type = _picture("BMP", "bmp")
    elif len(head) > 376 and head[0] == head[188] == head[376] == 0x47:
        file_type = _TS
    return file_type


def _by_brand(head: bytes) -> FileType:
    size = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[8:12], *(head[i : i + 4] for i in range(16, size - 3, 4))}
    if brands & {b"avif", b"avis"}:
        return _picture("AVIF", "avif")
    if head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        return FileType("HEIC picture, which cannot be decoded", "heic")
    if head[8:12] in (b"M4A ", b"M4B "):
        return FileType("M4A sound", "mp4", frozenset({"audio"}))
    return _container("QuickTime" if head[8:12] == b"qt  " else "MP4", "mp4")


def _by_sync(head: bytes) -> FileType | None:
    """Return the type of MPEG audio without a tag: a header that leads to a second one like it."""
    length = _mpeg_audio_length(head)
    if length is not None and _same_stream(head, length):
        return _MP3
    if len(head) > 6 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        length = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
        if length > 7 and _same_stream(head, length):
            return _AAC
    return None


def _same_stream(head: bytes, length: int) -> bool:
    following = head[length : length + 2]
    return len(following) == 2 and following[0] == 0xFF and (following[1] ^ head[1]) & 0xFE == 0


def _mpeg_audio_length(head: bytes) -> int | None:
    """Return the bytes of the MPEG audio frame that starts here; None when none does."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    index, rate_index, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer not in (1, 2) or index in (0, 15) or rate_index == 3:
        return None
    first = version == 3  # MPEG-1; 2 and 2.5 have other tables
    if not first:
        table = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
    elif layer == 2:
        table = (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)
    else:
        table = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
    rate_hz = (44100, 48000, 32000)[rate_index] // {3: 1, 2: 2, 0: 4}[version]
    factor = 72 if layer == 1 and not first else 144
    return factor * table[index - 1] * 1000 // rate_hz + padding


def _by_text(head: bytes) -> FileType | None:
    start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return FileType("HTML page", "html")
    if b"<svg" in start:
        return FileType("SVG drawing", "svg")
    if start.startswith(b"<?xml"):
        return FileType("XML document", "xml")
    printable = sum(byte >= 32 or byte in (9, 10, 13) for byte in head[:512])
    return _TEXT if start and printable == len(head[:512]) and head.isascii() else None


def check_type(path: Path, kind: MediaKind) -> FileType:
    """Return the type of a file that a post uses as `kind`.

    Raises:
        MediaError: The file is missing, empty, truncated, or of another or an unknown type.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(_HEAD)
            if not size:
                raise MediaError("the file is empty")
            file_type = sniff(head)
            if file_type is None or kind not in file_type.kinds:
                is_what = file_type.name if file_type else "unknown type of file"
                raise MediaError(f"is not a {_NOUNS[kind]}: {is_what}")
            promised = _promised_bytes(stream, size, file_type)
    except OSError as error:
        raise MediaError(f"cannot be read: {error.strerror}") from error
    if promised > size and promised - size > TOLERATED_LOSS * promised:
        raise MediaError(f"truncated {file_type.name}: {size} of {promised} bytes")
    return file_type


def _promised_bytes(stream: BinaryIO, size: int, file_type: FileType) -> int:
    """Return the bytes that a file says it has; 0 where its format does not say."""
    if file_type.family == "mp4":
        return _end_of_boxes(stream, size)
    if file_type.family in ("wav", "avi", "webp"):
        return _end_of_riff(stream)
    if file_type.family == "matroska":
        return _end_of_segment(stream)
    return 0


def _end_of_boxes(stream: BinaryIO, size: int) -> int:
    """Return the end of the last box of the top level, ISO/IEC 14496-12 section 4.2."""
    position = count = 0
    while position + 8 <= size:
        count += 1
        if count > MAX_PARTS:
            raise MediaError("broken MP4 video: it is nothing but boxes")
        stream.seek(position)
        header = stream.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length == 0:  # up to the end of the file
            return size
        if length < 8 or not header[4:8].strip(b" \xa9").isalnum():
            return position  # no box: padding or rubbish behind the last one
        position += length
    return position


def _end_of_riff(stream: BinaryIO) -> int:
    """Return the end of the outer chunk of a RIFF file."""
    stream.seek(4)
    (length,) = struct.unpack("<I", stream.read(4).ljust(4, b"\0"))
    return 0 if length in _UNKNOWN_SIZES or length >= 0xFFFFFF00 else length + 8


def _end_of_segment(stream: BinaryIO) -> int:
    """Return the end of a Matroska Segment; 0 when its length is unknown (live recordings)."""
    stream.seek(4)
    length, _ = _ebml_length(stream)
    stream.seek(length, os.SEEK_CUR)
    if stream.read(4) != b"\x18\x53\x80\x67":
        return 0
    length, known = _ebml_length(stream)
    return stream.tell() + length if known else 0


def _ebml_length(stream: BinaryIO) -> tuple[int, bool]:
    """Return a variable-length integer, and False where it is the reserved "unknown"."""
    first = (stream.read(1) or b"\0")[0]
    if not first:
        return 0, False
    width = 9 - first.bit_length()
    value = first & (0xFF >> width)
    for byte in stream.read(width - 1):
        value = value << 8 | byte
    return value, value != (1 << 7 * width) - 1
