"""The type of a file by its bytes, never by its name, and a check that its end is there.

Only the formats named here are opened at all: FFmpeg would also take playlists, which name
further files and addresses, and would find sound in random bytes.

The one policy for files that are cut or damaged is `check_share`.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from common.errors import MediaError
from common.post import MediaKind

HEAD_BYTES = 1 << 16
"""Read to tell the type: dozens of frames of sound that begins inside a frame. Half would miss some
behind a picture that has lost its tag; double only costs time."""
_NOUNS: dict[MediaKind, str] = {"image": "picture", "video": "video", "audio": "sound"}
LARGEST_PROMISE = 1_000_000_000
"""RIFF sizes from here on are placeholders of pipes, recorders and speech servers that never come
back to fill in the size (0x7FFFFFFF, 2e9, 0x80000000, 0xFFFFFFFF, and these less a header)."""

TOLERATED_LOSS = 0.01
"""Share of what was promised that may be missing without a word.

Some writers promise a few bytes more than they write. Double would hide that films lack seconds;
half would remark on short ones for their padding.
"""

LEAST_SHARE = 0.9
"""Share of a file that must be readable; with less it is broken.

Lower would tag posts for what they hardly show; higher would refuse downloads that lack their last
moment.
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
        kinds: What a post may use it as; empty for a file that is not media.
        start: Offset of the first byte; what is before it belongs to no format.
        note: What is missing of the file, where the rest is used.
    """

    name: str
    family: str
    kinds: frozenset[MediaKind] = frozenset()
    start: int = 0
    note: str = ""


def _picture(name: str, family: str) -> FileType:
    return FileType(f"{name} picture", family, frozenset({"image"}))


def _container(name: str, family: str) -> FileType:
    return FileType(f"{name} video", family, frozenset({"video", "audio"}))


def _sound(name: str, family: str) -> FileType:
    return FileType(f"{name} sound", family, frozenset({"audio"}))


def check_share(
    got: float, promised: float, unit: str, file_type: FileType, verdict: str = "truncated"
) -> str:
    """Judge a file by how much of what it promises can be read; return a note, "" for a whole one.

    The one policy for all formats: MediaError below `LEAST_SHARE`. A promise is what a container
    must keep (an index, the size of a chunk), never an estimate.
    """
    if got >= (1 - TOLERATED_LOSS) * promised:
        return ""
    amounts = f"{got:.4g} of {promised:.4g}" if isinstance(got, float) else f"{got} of {promised}"
    text = f"{verdict} {file_type.name}: {amounts} {unit}"
    if round(got / promised, 3) < LEAST_SHARE:
        raise MediaError(text)
    return f"{text}, which are used"


_GIF = FileType("GIF picture", "gif", frozenset({"image", "video"}))
_MP3, _AAC, _AC3 = _sound("MP3", "mp3"), _sound("AAC", "aac"), _sound("AC-3", "ac3")
_TS, _PS = _container("MPEG-TS", "mpegts"), _container("MPEG", "mpeg")
_TEXT = FileType("text", "text")

_PREFIXES: tuple[tuple[bytes, FileType], ...] = (
    (b"\xff\xd8\xff", _picture("JPEG", "jpeg")),
    (b"\x89PNG\r\n\x1a\n", _picture("PNG", "png")),
    (b"GIF87a", _GIF),
    (b"GIF89a", _GIF),
    (b"II*\x00", _picture("TIFF", "tiff")),
    (b"MM\x00*", _picture("TIFF", "tiff")),
    (b"II+\x00\x08\0\0\0", _picture("TIFF", "tiff")),
    (b"MM\x00+\0\x08\0\0", _picture("TIFF", "tiff")),
    (b"\x1aE\xdf\xa3", _container("Matroska", "matroska")),
    (b"OggS", FileType("Ogg file", "ogg", frozenset({"video", "audio"}))),
    (b"FLV\x01", _container("Flash", "flv")),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", _container("Windows Media", "asf")),
    (b"\x00\x00\x01\xba", _PS),
    (b"\x00\x00\x01\xb3", _container("MPEG stream", "mpegvideo")),
    (b"DKIF", _container("IVF", "ivf")),
    (b".RMF", _container("RealMedia", "rm")),
    (b"\x06\x0e\x2b\x34\x02\x05\x01\x01", _container("MXF", "mxf")),
    (b"\x1f\x07\x00", _container("DV", "dv")),
    (b"riff\x2e\x91\xcf\x11", _sound("Wave64", "w64")),
    (b".snd", _sound("AU", "au")),
    (b"wvpk", _sound("WavPack", "wv")),
    (b"MAC ", _sound("Monkey's Audio", "ape")),
    (b"TTA1", _sound("True Audio", "tta")),
    (b"\x7f\xfe\x80\x01", _sound("DTS", "dts")),
    (b"Creative Voice File", _sound("VOC", "voc")),
    (b"\x00\x00\x00\x0cjP  ", _picture("JPEG 2000", "jpeg2000")),
    (b"\xff\x4f\xff\x51", _picture("JPEG 2000", "jpeg2000")),
    (b"\x00\x00\x00\x0cJXL ", FileType("JPEG XL picture, which cannot be decoded", "jxl")),
    (b"\xff\x0a", FileType("JPEG XL picture, which cannot be decoded", "jxl")),
    (b"II\xbc", FileType("JPEG XR picture, which cannot be decoded", "jxr")),
    (b"8BPS", FileType("Photoshop document, which cannot be decoded", "psd")),
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

_BMP_HEADERS = [size.to_bytes(4, "little") for size in (12, 16, 40, 52, 56, 64, 108, 124)]
_BOXES = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")


_JUNK = b"\0\t\n\r \xef\xbb\xbf"  # before some files: padding of recorders, lines of broken servers
_LEADING_ZEROS = 4
"""Bytes of `_JUNK` that may be the file's own: the first box of MP4 and AVIF has a size of four."""


def sniff(head: bytes) -> FileType | None:
    """Return the type that a file's first bytes show; None when they show none."""
    sniffed = _by_mark(head)
    if sniffed is None:
        junk = len(head) - len(head.lstrip(_JUNK))
        if head.startswith(b"APETAGEX"):
            junk = 32 + int.from_bytes(head[12:16], "little")
        # What looks like padding may be zeros that a file begins with: the size of its first box.
        for start in range(junk, max(0, junk - _LEADING_ZEROS - 1), -1):
            inner = _by_mark(head[start:])
            if inner and inner.kinds:
                sniffed = replace(inner, start=start)
                break
    return sniffed or _by_text(head) or _by_search(head)


def _by_mark(head: bytes) -> FileType | None:
    """Return the type of a file that begins here."""
    for prefix, kind in _PREFIXES:
        if head.startswith(prefix):
            return kind
    file_type = None
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64"):
        file_type = _RIFF.get(head[8:12])
    elif head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        file_type = _sound("AIFF", "aiff")
    elif head[4:8] == b"ftyp":
        file_type = _by_brand(head)
    elif head[4:8] in _BOXES:
        file_type = _container("QuickTime", "mp4")
    elif head[:2] == b"BM" and head[14:18] in _BMP_HEADERS:
        file_type = _picture("BMP", "bmp")
    elif len(head) > 376 and head[0] == head[188] == head[376] == 0x47:
        file_type = _TS
    return file_type or next((kind for kind in _FRAMED if _frames(head, 0, kind, 1)), None)


def _by_search(head: bytes) -> FileType | None:
    """Return the type of a recording that begins inside a packet or frame."""
    for size in (192, 188, 204):  # of cameras, of broadcasts, with error correction
        packets = min(8, len(head) // size)
        for at in range(size if packets >= _CHAIN else 0):
            if head[at : at + packets * size : size].count(0x47) == packets:
                return _TS  # FFmpeg finds the first packet itself
    if pack := _PACK.search(head):
        return replace(_PS, start=pack.start())
    for match in _SYNC.finditer(head):
        for kind in _FRAMED:
            if _frames(head, match.start(), kind, _CHAIN):
                return replace(kind, start=match.start())
    return None


def _by_brand(head: bytes) -> FileType:
    size = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[8:12], *(head[i : i + 4] for i in range(16, size - 3, 4))}
    if brands & {b"avif", b"avis"}:
        return _picture("AVIF", "avif")
    if head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        return _picture("HEIC", "heif")
    if head[8:12] in (b"M4A ", b"M4B "):
        return FileType("M4A sound", "mp4", frozenset({"audio"}))
    return _container("QuickTime" if head[8:12] == b"qt  " else "MP4", "mp4")


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


def _aac_length(head: bytes) -> int | None:
    """Return the bytes of the ADTS frame that starts here; None when none does."""
    if len(head) < 6 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
        return None
    length = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return length if length > 7 else None


def _ac3_length(head: bytes) -> int | None:
    """Return the bytes of the AC-3 or E-AC-3 frame that starts here; None when none does."""
    if len(head) < 6 or head[:2] != b"\x0b\x77" or head[5] >> 3 > 16:
        return None
    if head[5] >> 3 > 10:  # E-AC-3 says its size itself
        return ((head[2] & 7) << 8 | head[3]) * 2 + 2
    rate, index = head[4] >> 6, (head[4] & 63) >> 1
    if rate == 3 or index > 18:
        return None
    rates = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640)
    words = rates[index] * 96_000 // (48_000, 44_100, 32_000)[rate]
    return 2 * (words + (head[4] & 1 if rate == 1 else 0))


_FRAMED: dict[FileType, Callable[[bytes], int | None]] = {
    _MP3: _mpeg_audio_length,
    _AAC: _aac_length,
    _AC3: _ac3_length,
}
"""Sound without a container -> the length of a frame."""
_PACK = re.compile(rb"\0\0\x01\xba(?:[\x40-\x7f].{9}\xff{0,7}|[\x20-\x2f].{7})\0\0\x01", re.DOTALL)
"""Head of a pack of an MPEG-2 or MPEG-1 program stream, and the start of what follows it."""
_SYNC = re.compile(rb"\xff[\xe0-\xff]|\x0b\x77")
_CHAIN = 5
"""Frames that follow each other where a file does not begin with one. Random bytes hold two frames
in a row once in some hundred files, five never."""


def _frames(head: bytes, at: int, kind: FileType, count: int) -> bool:
    """Return True where frames of one stream follow each other, and one more begins behind them."""
    first = head[at : at + 2]
    for _ in range(count):
        length = _FRAMED[kind](head[at : at + 8])
        if length is None:
            return False
        at += length
        following = head[at : at + 2]
        if following[:1] != first[:1] or (following[1:] or b"\0")[0] & 0xFE != first[1] & 0xFE:
            return False
    return True


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
    """Return the type of a file; MediaError when it is none that a post can use as `kind`."""
    with _opened(path) as stream:
        return _checked_type(stream, kind)


def read_file(path: Path, kind: MediaKind) -> tuple[FileType, bytes]:
    """Return the type of a file, as `check_type` does, and all of its bytes."""
    with _opened(path) as stream:  # once: opening takes as long as reading a picture
        file_type = _checked_type(stream, kind)
        stream.seek(0)
        return file_type, stream.read()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        # Without a buffer, which large reads would only be copied through.
        with open(path, "rb", buffering=0, opener=_without_waiting) as stream:
            yield stream
    except OSError as error:
        raise MediaError(f"cannot be read: {error.strerror}") from error


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe would wait for somebody to write


def _checked_type(stream: BinaryIO, kind: MediaKind) -> FileType:
    status = os.fstat(stream.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise MediaError("is not a regular file, but a pipe or a device")
    size = status.st_size
    if not size:
        raise MediaError("the file is empty")
    file_type = type_of(stream)
    if file_type is None or kind not in file_type.kinds:
        is_what = file_type.name if file_type else "unknown type of file"
        raise MediaError(f"is not a {_NOUNS[kind]}: {is_what}")
    promised = _promised_bytes(stream, size, file_type)
    note = check_share(size, promised, "bytes", file_type)
    return replace(file_type, note=note) if note else file_type


def type_of(stream: BinaryIO) -> FileType | None:
    """Return the type of an open file, behind padding and behind its ID3 tag too."""
    skipped, head = 0, stream.read(HEAD_BYTES)
    while head and not head.strip(b"\0"):
        skipped, head = skipped + len(head), stream.read(HEAD_BYTES)
    zeros = skipped + len(head) - len(head.lstrip(b"\0"))
    if zeros > _LEADING_ZEROS:
        skipped = zeros - _LEADING_ZEROS
        stream.seek(skipped)
        head = stream.read(HEAD_BYTES)
    sniffed = sniff(head)
    if sniffed is None:
        return None
    if sniffed.family == "id3":
        behind = sniffed.start + skipped + id3_bytes(head[sniffed.start :])
        stream.seek(behind)
        inner = sniff(stream.read(HEAD_BYTES))
        demuxed = inner is not None and inner.family in ("mp3", "aac", "flac")  # with their tags
        if inner is not None and "audio" in inner.kinds and (inner.start or not demuxed):
            return replace(inner, start=inner.start + behind)
    return replace(sniffed, start=sniffed.start + skipped) if skipped else sniffed


def id3_bytes(head: bytes) -> int:
    """Return the length of the ID3 tag that a file begins with, 0 without one."""
    if not head.startswith(b"ID3") or len(head) < 10:
        return 0
    size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
    return size + (20 if head[5] & 0x10 else 10)


def has_duration(path: Path, file_type: FileType) -> bool:
    """Return True where sound without a container says its length, False where it is estimated."""
    if file_type.family == "flac":
        return True
    if file_type.family not in ("mp3", "id3"):
        return False
    with path.open("rb") as stream:
        stream.seek(file_type.start)
        first = stream.seek(file_type.start + id3_bytes(stream.read(10)))
        frame = stream.read(128).ljust(128, b"\0")
        size = stream.seek(0, os.SEEK_END) - first
    header = re.search(rb"Xing|Info|VBRI", frame[:64])
    if header is None:
        return False
    at = header.end()  # VBRI has its bytes behind 6 others; else flags, frames, bytes
    at += 6 if header[0] == b"VBRI" else 4 + 4 * (frame[at + 3] & 1)
    told = int.from_bytes(frame[at : at + 4], "big")
    # With much more behind the sound, FFmpeg estimates after all.
    untold = header[0] != b"VBRI" and not frame[header.end() + 3] & 2
    return untold or size - told <= told >> 4


def _promised_bytes(stream: BinaryIO, size: int, file_type: FileType) -> int:
    """Return the bytes that a file says it has; 0 where its format does not say."""
    if file_type.start:
        return 0
    if file_type.family == "mp4":
        return _end_of_boxes(stream, size)
    if file_type.family in ("wav", "avi", "aiff"):
        return _end_of_chunk(stream)
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


def _end_of_chunk(stream: BinaryIO) -> int:
    """Return the end of the outer chunk of a RIFF or AIFF file; 0 where its size is made up."""
    stream.seek(0)
    head = stream.read(8)
    length = int.from_bytes(head[4:], "little" if head[:4] == b"RIFF" else "big")
    return length + 8 if 0 < length < LARGEST_PROMISE and head[:4] != b"RF64" else 0


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
