"""Pictures made to hurt: bombs, lying headers, loops, and what is no picture at all."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from fuzzing.mutate import png_of

_MIB = 1 << 20


def _ihdr(width: int, height: int, depth: int = 8, colour: int = 2, interlaced: int = 0) -> bytes:
    return struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)


def _zeros(size: int) -> bytes:
    """Return that many zero bytes, compressed to a thousandth of the size."""
    packer = zlib.compressobj(9)
    block = b"\0" * _MIB
    parts = [packer.compress(block) for _ in range(size // _MIB)]
    return b"".join([*parts, packer.compress(b"\0" * (size % _MIB)), packer.flush()])


def _png(width: int, height: int, data: bytes = b"", **header: int) -> bytes:
    body = data or zlib.compress(b"\0" * 100)
    return png_of([(b"IHDR", _ihdr(width, height, **header)), (b"IDAT", body), (b"IEND", b"")])


def _png_with(name: bytes, body: bytes) -> bytes:
    data = zlib.compress((b"\0" + b"\x80" * 48) * 16)
    header = (b"IHDR", _ihdr(16, 16))
    return png_of([header, (name, body), (b"IDAT", data), (b"IEND", b"")])


def _png_bomb(side: int) -> bytes:
    """Return a whole picture of one colour, grey, so that `side` squared pixels are few bytes."""
    return _png(side, side, _zeros((side + 1) * side), colour=0)


def _apng(frames: int) -> bytes:
    data = zlib.compress((b"\0" + b"\x80" * 48) * 16)
    control = struct.pack(">IIIIIHHBB", 0, 16, 16, 0, 0, 1, 10, 0, 0)
    return png_of(
        [
            (b"IHDR", _ihdr(16, 16)),
            (b"acTL", struct.pack(">II", frames, 0)),
            (b"fcTL", control),
            (b"IDAT", data),
            (b"IEND", b""),
        ]
    )


def _gif(width: int, height: int, frames: bytes, flags: int = 0x80) -> bytes:
    table = b"\0\0\0\xff\xff\xff" if flags & 0x80 else b""
    return b"GIF89a" + struct.pack("<HHBBB", width, height, flags, 0, 0) + table + frames + b";"


def _gif_frame(width: int, height: int, left: int = 0, top: int = 0) -> bytes:
    data = b"\x02\x02\x4c\x01\x00"  # one pixel and the end
    return b"," + struct.pack("<HHHHB", left, top, width, height, 0) + data


def _jpeg_segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def _jpeg(width: int, height: int, *, progressive: bool = False, scans: int = 1) -> bytes:
    table = b"\0" + bytes([1] * 64)
    frame = struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\x00"
    huffman = b"\0" + bytes([0, 1] + [0] * 14) + b"\0"
    scan = _jpeg_segment(0xDA, b"\x01\x01\x00\x00\x00\x00") + b"\0" * 8
    return b"".join(
        [
            b"\xff\xd8",
            _jpeg_segment(0xDB, table),
            _jpeg_segment(0xC2 if progressive else 0xC0, frame),
            _jpeg_segment(0xC4, huffman),
            _jpeg_segment(0xC4, b"\x10" + huffman[1:]),
            scan * scans,
            b"\xff\xd9",
        ]
    )


def _exif_loop() -> bytes:
    tiff = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 0xFFFF) + b"\x12\x01" * 200
    return b"\xff\xd8" + _jpeg_segment(0xE1, b"Exif\0\0" + tiff) + _jpeg(16, 16)[2:]


def _webp(*chunks: tuple[bytes, bytes], length: int | None = None) -> bytes:
    body = b"WEBP" + b"".join(
        name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) & 1)
        for name, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) if length is None else length) + body


def _bmp(width: int, height: int, bits: int = 24, compression: int = 0, data: bytes = b"") -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, 54) + header + data


def _tiff(*tags: tuple[int, int, int, int], next_at: int = 0, order: str = "<") -> bytes:
    directory = struct.pack(f"{order}H", len(tags))
    for tag, kind, count, value in tags:
        short = kind == 3 and count == 1
        field = struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
        directory += struct.pack(f"{order}HHI", tag, kind, count) + field
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", 8) + directory + struct.pack(f"{order}I", next_at)


def _tiff_of(width: int, height: int, **changes: int) -> bytes:
    values = {"bits": 8, "rows": height, "offset": 8, "size": 0xFFFFFF, "samples": 1, **changes}
    return _tiff(
        (0x0100, 4, 1, width),
        (0x0101, 4, 1, height),
        (0x0102, 3, 1, values["bits"]),
        (0x0103, 3, 1, values.get("compression", 1)),
        (0x0106, 3, 1, 1),
        (0x0111, 4, 1, values["offset"]),
        (0x0115, 3, 1, values["samples"]),
        (0x0116, 4, 1, values["rows"]),
        (0x0117, 4, 1, values["size"]),
        (0x0153, 3, 1, values.get("format", 1)),
        next_at=values.get("next_at", 0),
    )


def _zip() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"\0" * _MIB)
    return target.getvalue()


PICTURES: Mapping[str, Callable[[], bytes]] = MappingProxyType(
    {
        # PNG
        "png of 2^31 pixels a side": lambda: _png(0x7FFFFFFF, 0x7FFFFFFF),
        "png of 2^32 pixels a side": lambda: _png(0xFFFFFFFF, 0xFFFFFFFF),
        "png of 65535 pixels a side": lambda: _png(65535, 65535),
        "png without width": lambda: _png(0, 100),
        "png in one row": lambda: _png(50_000_000, 1),
        "png in one column": lambda: _png(1, 50_000_000),
        "png bomb under the limit": lambda: _png_bomb(4000),
        "png bomb over the limit": lambda: _png_bomb(10_001),
        "png bomb of 16 bits and alpha": lambda: _png(
            3000, 3000, _zeros(24001 * 3000), depth=16, colour=6
        ),
        "png interlaced bomb": lambda: _png(
            3000, 3000, _zeros(3001 * 3100), colour=0, interlaced=1
        ),
        "png with more data than pixels": lambda: _png(8, 8, _zeros(64 * _MIB)),
        "png with less data than pixels": lambda: _png(2000, 2000),
        "png palette without one": lambda: _png(16, 16, zlib.compress(b"\0" * 400), colour=3),
        "png of depth 3": lambda: _png(16, 16, depth=3),
        "png of colour type 7": lambda: _png(16, 16, colour=7),
        "png with a bomb for a profile": lambda: _png_with(b"iCCP", b"a\0\0" + _zeros(64 * _MIB)),
        "png with a bomb for a text": lambda: _png_with(b"zTXt", b"a\0\0" + _zeros(64 * _MIB)),
        "png with a bomb for a long text": lambda: _png_with(
            b"iTXt", b"a\0\1\0\0\0" + _zeros(64 * _MIB)
        ),
        "png with many chunks": lambda: png_of(
            [(b"IHDR", _ihdr(8, 8)), *[(b"aaAa", b"")] * 200_000, (b"IEND", b"")]
        ),
        "png without data": lambda: png_of([(b"IHDR", _ihdr(8, 8)), (b"IEND", b"")]),
        "png without a header": lambda: png_of([(b"IDAT", b"x"), (b"IEND", b"")]),
        "png of 2^32 frames": lambda: _apng(0xFFFFFFFF),
        "png of no frames": lambda: _apng(0),
        "png with a looping exif": lambda: _png_with(b"eXIf", b"II*\0\0\0\0\0"),
        # GIF
        "gif with a huge screen": lambda: _gif(65535, 65535, _gif_frame(1, 1)),
        "gif with frames larger than the screen": lambda: _gif(4, 4, _gif_frame(60000, 60000)),
        "gif with frames outside the screen": lambda: _gif(4, 4, _gif_frame(4, 4, 65000, 65000)),
        "gif of 20,000 frames": lambda: _gif(4, 4, _gif_frame(4, 4) * 20_000),
        "gif with many blocks": lambda: _gif(4, 4, b"!\xfe" + b"\x01a" * 500_000 + b"\0"),
        "gif without frames": lambda: _gif(4, 4, b""),
        "gif of no size": lambda: _gif(0, 0, _gif_frame(0, 0)),
        "gif of codes of 12 bits": lambda: _gif(
            4, 4, b"," + struct.pack("<HHHHB", 0, 0, 4, 4, 0) + b"\x0c\x04\xff\xff\xff\xff\0"
        ),
        # JPEG
        "jpeg of 65535 pixels a side": lambda: _jpeg(65535, 65535),
        "jpeg within the limit, without its data": lambda: _jpeg(9000, 9000),
        "jpeg without width": lambda: _jpeg(0, 16),
        "jpeg of 2,000 scans": lambda: _jpeg(3000, 3000, progressive=True, scans=2000),
        "jpeg with a looping exif": _exif_loop,
        "jpeg of fill bytes": lambda: b"\xff\xd8" + b"\xff" * (2 * _MIB),
        "jpeg of empty segments": lambda: b"\xff\xd8" + b"\xff\xe0\0\0" * 200_000 + b"\xff\xd9",
        # WebP, BMP, TIFF, AVIF
        "webp of 2^24 pixels a side": lambda: _webp((b"VP8X", b"\x02" + b"\0" * 3 + b"\xff" * 6)),
        "webp with a lying length": lambda: _webp((b"VP8 ", b"\0" * 20), length=0xFFFFFFF0),
        "webp of empty chunks": lambda: _webp(*[(b"JUNK", b"")] * 200_000),
        "webp of 50,000 frames": lambda: _webp(
            (b"VP8X", b"\x02" + b"\0" * 9), *[(b"ANMF", b"\0" * 16)] * 50_000
        ),
        "bmp of 2^31 pixels a side": lambda: _bmp(0x7FFFFFFF, 0x7FFFFFFF),
        "bmp of negative width": lambda: _bmp(-16, 16),
        "bmp of the most negative height": lambda: _bmp(16, -(1 << 31)),
        "bmp packed by runs": lambda: _bmp(9000, 9000, 8, 1, b"\xff\0" * 1000),
        "bmp of 0 bits": lambda: _bmp(16, 16, 0),
        "bmp with a compression of its own": lambda: _bmp(16, 16, 24, 77, b"\0" * 900),
        "tiff of 2^32 pixels a side": lambda: _tiff_of(0xFFFFFFFF, 0xFFFFFFFF),
        "tiff within the limit, without its data": lambda: _tiff_of(9000, 9000),
        "tiff in one strip of 2^32 rows": lambda: _tiff_of(64, 64, rows=0xFFFFFFFF),
        "tiff of 64-bit samples": lambda: _tiff_of(64, 64, bits=64, format=3),
        "tiff of 200 channels": lambda: _tiff_of(64, 64, samples=200),
        "tiff of 1 bit": lambda: _tiff_of(64, 64, bits=1),
        "tiff that is a jpeg inside": lambda: _tiff_of(64, 64, compression=7),
        "tiff whose directory follows itself": lambda: _tiff_of(8, 8, next_at=8),
        "tiff with a directory outside": lambda: b"II*\0\xff\xff\xff\xff",
        "tiff of 65,535 tags": lambda: b"II*\0\x08\0\0\0\xff\xff" + b"\0\x01\x04\0\x01\0\0\0" * 99,
        "avif without a size": lambda: b"\0\0\0\x18ftypavif\0\0\0\0avifmif1" + b"\0" * 64,
        "avif of 2^32 pixels a side": lambda: (
            b"\0\0\0\x18ftypavif\0\0\0\0avifmif1\0\0\0\x14ispe\0\0\0\0" + b"\xff" * 8
        ),
        # No pictures
        "svg that reads a file": lambda: (
            b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
        ),
        "xml of entities": lambda: (
            b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><a>&c;</a>'
        ),
        "html": lambda: b"<!DOCTYPE html><script>alert(1)</script>",
        "pdf": lambda: b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n%%EOF",
        "zip": _zip,
        "gzip bomb": lambda: gzip.compress(b"\0" * (16 * _MIB)),
        "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) (r) file",
        "imagemagick script": lambda: b"push graphic-context\nimage over 0,0 0,0 'url(http://a)'",
        "nothing": lambda: b"",
        "one byte": lambda: b"\xff",
        "zeros": lambda: b"\0" * 100_000,
        "ones": lambda: b"\xff" * 100_000,
        "text": lambda: b"post_id: 1\n" * 100,
    }
)
