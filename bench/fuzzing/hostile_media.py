"""Containers made to hurt: lying sizes and clocks, depth, references to files, no end."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import av
import numpy as np
import soundfile

_LARGEST = 0xFFFFFFFF


def box(name: bytes, *bodies: bytes) -> bytes:
    """Return an ISO base media box."""
    body = b"".join(bodies)
    return struct.pack(">I", 8 + len(body)) + name + body


_FTYP = box(b"ftyp", b"isom\0\0\2\0isomiso2mp41")


def _mp4(
    *,
    timescale: int = 1000,
    duration: int = 1000,
    size: tuple[int, int] = (64, 48),
    samples: int = 1,
    delta: int = 1000,
    offset: int = 40,
    reference: bytes = b"",
    format_: bytes = b"avc1",
) -> bytes:
    """Return a small MP4 with one video track; every number of it can be a lie."""
    width, height = size
    mvhd = struct.pack(">IIIII", 0, 0, 0, timescale, duration) + b"\0\1\0\0\1" + b"\0" * 75
    tkhd = struct.pack(">IIIIII", 7, 0, 0, 1, 0, duration) + b"\0" * 52
    tkhd += struct.pack(">II", (width & 0xFFFF) << 16, (height & 0xFFFF) << 16)
    mdhd = struct.pack(">IIIIIHH", 0, 0, 0, timescale, duration, 0x55C4, 0)
    hdlr = b"\0" * 8 + b"vide" + b"\0" * 13
    entry = b"\0" * 6 + b"\0\1" + b"\0" * 16 + struct.pack(">HH", width & 0xFFFF, height & 0xFFFF)
    entry += b"\0\x48\0\0\0\x48\0\0\0\0\0\0\0\1" + b"\0" * 32 + b"\0\x18\xff\xff"
    configuration = box(b"avcC", b"\1\x42\0\x1e\xff\xe0\0")
    stsd = b"\0" * 4 + struct.pack(">I", 1) + box(format_, entry, configuration)
    where = reference or box(b"url ", b"\0\0\0\1")
    dref = box(b"dref", b"\0" * 4 + struct.pack(">I", 1) + where)
    stbl = box(
        b"stbl",
        box(b"stsd", stsd),
        box(b"stts", struct.pack(">IIII", 0, 1, samples, delta)),
        box(b"stsc", struct.pack(">IIIII", 0, 1, 1, samples & 0xFFFF or 1, 1)),
        box(b"stsz", struct.pack(">III", 0, 8, samples)),
        box(b"stco", struct.pack(">III", 0, 1, offset)),
    )
    minf = box(b"minf", box(b"vmhd", b"\0\0\0\1" + b"\0" * 8), box(b"dinf", dref), stbl)
    mdia = box(b"mdia", box(b"mdhd", mdhd), box(b"hdlr", hdlr), minf)
    moov = box(b"moov", box(b"mvhd", mvhd), box(b"trak", box(b"tkhd", tkhd), mdia))
    return _FTYP + box(b"mdat", b"\0\0\0\4\x65\x88\x84\0" * 4) + moov


def _alias(path: bytes) -> bytes:
    """Return a data reference of QuickTime to another file."""
    return box(b"alis", b"\0" * 4, b"\0" * 150, struct.pack(">HH", 2, len(path)), path + b"\0")


def _deep(depth: int, name: bytes = b"moov") -> bytes:
    content = b""
    for _ in range(depth):
        content = box(name, content)
    return _FTYP + content


def _ebml(number: int, body: bytes, *, unknown: bool = False) -> bytes:
    size = b"\x01" + b"\xff" * 7 if unknown else b"\x08" + len(body).to_bytes(4, "big")
    return number.to_bytes((number.bit_length() + 7) // 8, "big") + size + body


_EBML_HEAD = _ebml(0x1A45DFA3, _ebml(0x4282, b"matroska") + _ebml(0x4287, b"\4"))


def _matroska(duration: float, *, scale: int = 1_000_000, body: bytes = b"") -> bytes:
    info = _ebml(0x2AD7B1, scale.to_bytes(8, "big")) + _ebml(0x4489, struct.pack(">d", duration))
    video = _ebml(0xE0, _ebml(0xB0, b"\xff\xff\xff") + _ebml(0xBA, b"\xff\xff\xff"))
    entry = _ebml(0xD7, b"\1") + _ebml(0x83, b"\1") + _ebml(0x86, b"V_VP8") + video
    tracks = _ebml(0x1654AE6B, _ebml(0xAE, entry))
    return _EBML_HEAD + _ebml(0x18538067, _ebml(0x1549A966, info) + tracks + body, unknown=True)


def _wav(
    channels: int = 1, rate: int = 16000, bits: int = 16, length: int = 0, **more: Any
) -> bytes:
    align = more.get("align", channels * bits // 8 & 0xFFFF)
    head = struct.pack("<HHIIHH", more.get("codec", 1), channels, rate, 0, align, bits)
    data = b"\0\1" * 4000
    size = length or len(data)
    body = b"WAVEfmt \x10\0\0\0" + head + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", more.get("riff", len(body))) + body


def _flac(rate: int, samples: int, block: int = 4096) -> bytes:
    bits = rate << 44 | 0 << 41 | 15 << 36 | samples
    info = struct.pack(">HH", block, block) + b"\0" * 6 + bits.to_bytes(8, "big") + b"\0" * 16
    return b"fLaC\x80\0\0\x22" + info + b"\xff\xf8\xc9\x08" + b"\0" * 100


def _silence(seconds: int, rate_hz: int = 8000) -> bytes:
    """Return hours of sound in few bytes."""
    target = io.BytesIO()
    with soundfile.SoundFile(target, "w", rate_hz, 1, format="FLAC", subtype="PCM_16") as file:
        minute = np.zeros(rate_hz * 60, np.int16)
        for _ in range(seconds // 60):
            file.write(minute)
    return target.getvalue()


def _film(count: int, *, size: tuple[int, int] = (16, 16), step_s: float = 1.0) -> bytes:
    """Return a film of black frames with one key frame, so that the last needs all before it."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size = "yuv420p", count
        stream.codec_context.thread_count = 1
        frame = av.VideoFrame(*size, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for index in range(count):
            frame.pts, frame.time_base = round(index * step_s * 25), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target.getvalue()


def _growing() -> bytes:
    """Return a transport stream whose picture becomes larger on the way."""
    parts = []
    for size in ((32, 32), (1280, 720), (64, 2048)):
        target = io.BytesIO()
        with av.open(target, "w", format="mpegts") as container:
            stream: Any = container.add_stream("mpeg2video", rate=25)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            frame = av.VideoFrame(*size, "yuv420p")
            for index in range(6):
                frame.pts = index
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        parts.append(target.getvalue())
    return b"".join(parts)


def _hls_in_avi() -> bytes:
    """Return a playlist in an AVI's subtitle, by which FFmpeg once read local files."""
    playlist = (
        b"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1.0\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    )
    subtitle = b"GAB2\0\2\0" + b"\0" * 10 + playlist
    header = b"avih" + struct.pack("<I", 56) + b"\0" * 56
    stream = b"strh" + struct.pack("<I", 56) + b"txts" + b"\0" * 52 + b"strf\0\0\0\0"
    streams = b"LIST" + struct.pack("<I", 4 + len(stream)) + b"strl" + stream
    head = b"LIST" + struct.pack("<I", 4 + len(header + streams)) + b"hdrl" + header + streams
    chunk = b"00sb" + struct.pack("<I", len(subtitle)) + subtitle
    movie = b"LIST" + struct.pack("<I", 4 + len(chunk)) + b"movi" + chunk
    return b"RIFF" + struct.pack("<I", 4 + len(head + movie)) + b"AVI " + head + movie


_PLAYLIST = (
    b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n%s\n#EXTINF:1,\nhttp://127.0.0.1:1/a\n"
    b"#EXT-X-ENDLIST\n"
)
_CONCAT = b"ffconcat version 1.0\nfile /etc/passwd\nfile http://169.254.169.254/\n"
_SDP = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5000 RTP/AVP 96\n"
_DASH = (
    b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><BaseURL>'
    b"http://127.0.0.1:1/</BaseURL></Period></MPD>"
)

VIDEOS: Mapping[str, Callable[[], bytes]] = MappingProxyType(
    {
        # References to other files
        "playlist of a local file": lambda: _PLAYLIST % b"file:///etc/passwd",
        "playlist of a pipe": lambda: _PLAYLIST % b"pipe:0",
        "playlist of a concatenation": lambda: _PLAYLIST % b"concat:/etc/passwd|/etc/hosts",
        "playlist behind a box": lambda: _FTYP + _PLAYLIST % b"/etc/passwd",
        "concatenation": lambda: _CONCAT,
        "session description": lambda: _SDP,
        "dash manifest": lambda: _DASH,
        "playlist in an avi": _hls_in_avi,
        "mov that refers to a local file": lambda: _mp4(reference=_alias(b"/etc/passwd")),
        "mov that refers to a URL": lambda: _mp4(
            reference=box(b"url ", b"\0\0\0\0http://127.0.0.1:1/\0")
        ),
        "avisynth script": lambda: b'DirectShowSource("/etc/passwd")\n',
        "image sequence": lambda: b"/etc/%03d.png",
        # Clocks and counts
        "mp4 of endless duration": lambda: _mp4(duration=_LARGEST, delta=_LARGEST),
        "mp4 without a clock": lambda: _mp4(timescale=0),
        "mp4 with the finest clock": lambda: _mp4(timescale=_LARGEST),
        "mp4 of 2^32 samples": lambda: _mp4(samples=_LARGEST),
        "mp4 of 10 million samples": lambda: _mp4(samples=10_000_000, delta=1),
        "mp4 with samples outside": lambda: _mp4(offset=0x7FFFFFF0),
        "mp4 of 65535 pixels a side": lambda: _mp4(size=(65535, 65535)),
        "mp4 without pixels": lambda: _mp4(size=(0, 0)),
        "mp4 of an unknown codec": lambda: _mp4(format_=b"zzzz"),
        "mp4 of raw pictures": lambda: _mp4(format_=b"raw ", size=(8000, 8000)),
        "mp4 of png pictures": lambda: _mp4(format_=b"png "),
        # Boxes
        "mp4 of 10,000 nested boxes": lambda: _deep(10_000),
        "mp4 of nested metadata": lambda: _FTYP + box(b"moov", _deep(3000, b"udta")),
        "mp4 of 200,000 empty boxes": lambda: _FTYP + b"\0\0\0\x08free" * 200_000,
        "mp4 box of size 0": lambda: _FTYP + b"\0\0\0\0moov" + b"\0" * 100,
        "mp4 box of size 1": lambda: _FTYP + b"\0\0\0\1moov" + b"\xff" * 8,
        "mp4 box of size 7": lambda: _FTYP + b"\0\0\0\7moov" + b"\0" * 100,
        "mp4 box of 2^63 bytes": lambda: _FTYP + b"\0\0\0\1mdat\x7f" + b"\xff" * 7 + b"\0" * 99,
        "mp4 with only a type": lambda: _FTYP,
        "mp4 with a compressed header": lambda: _FTYP + box(b"moov", box(b"cmov", b"\xff" * 64)),
        # Matroska
        "matroska of infinite duration": lambda: _matroska(float("inf")),
        "matroska of no number's duration": lambda: _matroska(float("nan")),
        "matroska of negative duration": lambda: _matroska(-1e300),
        "matroska with a clock of 0": lambda: _matroska(10.0, scale=0),
        "matroska with the coarsest clock": lambda: _matroska(10.0, scale=(1 << 64) - 1),
        "matroska of voids": lambda: _matroska(1.0, body=_ebml(0xEC, b"") * 100_000),
        "matroska of nested clusters": lambda: _matroska(
            1.0, body=b"\x1f\x43\xb6\x75\x01" + b"\xff" * 7 + b"\xa0\x01" + b"\xff" * 7
        ),
        "matroska of one element of 2^56 bytes": lambda: _EBML_HEAD + b"\x18\x53\x80\x67\x01" * 9,
        # Others
        "flash of endless duration": lambda: (
            b"FLV\x01\x05\0\0\0\x09\0\0\0\0\x12\0\0\x20\0\0\0\0\0\0\0\x02\0\x0aonMetaData\x08\0\0\0\1"
            b"\0\x08duration\0\x7f\xef" + b"\xff" * 6
        ),
        "transport stream of padding": lambda: (b"\x47\x1f\xff\x10" + b"\xff" * 184) * 2000,
        "transport stream of noise": lambda: b"".join(
            b"\x47" + np.random.default_rng(i).bytes(187) for i in range(300)
        ),
        "mpeg of headers": lambda: (
            (b"\0\0\1\xba" + b"\x44" + b"\0" * 9 + b"\0\0\1\xb3" + b"\xff" * 8) * 999
        ),
        "windows media of noise": lambda: (
            b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\0\xaa\0\x62\xce\x6c" + b"\xff" * 400
        ),
        "avi with rates of 0": lambda: _hls_in_avi().replace(b"txts", b"vids"),
        "growing picture": _growing,
        "film of 2 hours, one key frame": lambda: _film(1500, step_s=5.0),
        "film of one frame": lambda: _film(1),
        "film of a day's length": lambda: _film(30, step_s=3000.0),
        "film with frames in one moment": lambda: _film(60, step_s=0.04),
    }
)

SOUNDS: Mapping[str, Callable[[], bytes]] = MappingProxyType(
    {
        "hours of silence": lambda: _silence(3 * 3600),
        "wav of no channels": lambda: _wav(channels=0),
        "wav of 65,535 channels": lambda: _wav(channels=65535),
        "wav at 0 Hz": lambda: _wav(rate=0),
        "wav at 1 Hz": lambda: _wav(rate=1),
        "wav at 2^32 Hz": lambda: _wav(rate=_LARGEST),
        "wav of 0 bits": lambda: _wav(bits=0),
        "wav of 65,535 bits": lambda: _wav(bits=65535),
        "wav of 2^32 bytes": lambda: _wav(length=_LARGEST, riff=_LARGEST),
        "wav of a strange codec": lambda: _wav(codec=0x1234),
        "wav with mp3 inside": lambda: _wav(codec=0x55),
        "wav with a block of 0": lambda: _wav(align=0),
        "flac at 0 Hz": lambda: _flac(0, 1000),
        "flac of 2^36 samples": lambda: _flac(44100, (1 << 36) - 1),
        "flac with blocks of 0": lambda: _flac(44100, 100, 0),
        "id3 of 256 MB": lambda: b"ID3\4\0\0\x7f\x7f\x7f\x7f" + b"\0" * 1000,
        "id3 in id3": lambda: b"ID3\4\0\0\0\0\0\0" * 5000 + b"\xff\xfb\x90\0" + b"\0" * 500,
        "mp3 of headers": lambda: (b"\xff\xfb\x90\0" + b"\0" * 413) * 200,
        "mp3 that says it is long": lambda: (
            b"\xff\xfb\x90\0" + b"\0" * 32 + b"Xing\0\0\0\7" + b"\xff" * 100 + b"\0" * 2000
        ),
        "ogg without pages": lambda: b"OggS" + b"\0" * 500,
        "ogg of empty pages": lambda: (b"OggS\0\2" + b"\0" * 20 + b"\xff" + b"\0" * 255) * 500,
        "amr of rubbish": lambda: b"#!AMR\n" + bytes(range(256)) * 20,
        "caf of 2^63 bytes": lambda: b"caff\0\1\0\0desc\x7f" + b"\xff" * 7 + b"\0" * 100,
        "aiff of 2^32 bytes": lambda: b"FORM\xff\xff\xff\xffAIFFCOMM\xff\xff\xff\xff" + b"\0" * 99,
        "aac of headers": lambda: b"\xff\xf1\x50\x80\x01\x1f\xfc\0" * 2000,
        "midi": lambda: b"MThd\0\0\0\6\0\1\0\1\0\x60MTrk\0\0\0\4\0\xff\x2f\0",
        "a playlist for a sound": lambda: _PLAYLIST % b"/etc/passwd",
        "a tracker's module": lambda: b"\0" * 1080 + b"M.K." + b"\0" * 1000,
    }
)
