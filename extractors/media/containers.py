"""Containers of video and sound, by PyAV: opened safely, read one packet at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import av
import av.logging
from av.codec.hwaccel import HWAccel

from common.errors import MediaError
from extractors.media.sizes import filled_in
from extractors.media.sniff import HEAD_BYTES, FileType

Container: TypeAlias = Any  # av's stubs of streams and packets are unions that help nobody
Stream: TypeAlias = Any
Packet: TypeAlias = Any

_DEMUXERS = {
    "mp4": "mov,mp4,m4a,3gp,3g2,mj2",
    "matroska": "matroska,webm",
    "flv": "flv,live_flv",
    "id3": "mp3,aac,flac",
    "ac3": "ac3,eac3",
}
"""FFmpeg's names of the demuxers of a family; all others are called as the family."""

_UNCERTAIN = ("mpegts", "mp3", "aac", "mp4")
"""Families that FFmpeg is told: it would not recognise one that begins inside a packet or frame, or
an MP4 whose head is longer than what it reads here."""

_CLOCK_JUMPS = ("mpegts", "mpeg")
"""Demuxers whose clocks may restart or jump where recordings were joined or the source changed."""

_JUMP_S = 10.0
"""A step of such a clock that is none of its film, as ffmpeg itself judges it.

Half would close real gaps of bad reception; double would leave holes that nothing was shown in.
"""

_NO_PICTURES = ("attached_pic", "timed_thumbnails", "still_image")
"""Dispositions of streams that are not the film: cover art and previews."""

_MAX_BROKEN_READS = 100
"""Failed reads before the rest of a file is given up.

FFmpeg finds its way again after a few. Half would lose films with a long scratch; double only
wastes time on files that never recover.
"""


def open_container(path: Path, file_type: FileType, hwaccel: HWAccel | None = None) -> Container:
    """Open a file with the demuxer of its sniffed type and no other.

    FFmpeg would otherwise also open playlists, and what they name, on disk and on the network.
    MediaError when FFmpeg cannot read it.
    """
    av.logging.set_level(av.logging.PANIC)  # what goes wrong comes as an exception
    family, url = file_type.family, f"file:{path}"
    demuxer = _DEMUXERS.get(family, family)
    if file_type.start:
        url = f"subfile,,start,{file_type.start},end,0,,:{url}"
    options = {"format_whitelist": demuxer, "protocol_whitelist": "file,subfile"}
    if family == "mp4":
        # Its index tells all that FFmpeg would learn from decoding a frame, 6 ms of 720p, and from
        # reading more than one of each stream, another one.
        options |= {"skip_frame": "all", "probesize": str(HEAD_BYTES)}
    told = demuxer.partition(",")[0] if family in _UNCERTAIN else None
    try:
        file = None if file_type.start else filled_in(path, family)
        return av.open(
            file or url, format=told, options=options, metadata_errors="ignore", hwaccel=hwaccel
        )
    except (av.error.FFmpegError, ValueError) as error:
        raise MediaError(f"{file_type.name} cannot be read: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Return an exception of PyAV in one line, without the path that it carries."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]


def find_stream(container: Container, kind: str) -> Stream | None:
    """Return the ``video`` or ``audio`` stream marked as default, else the first, or None."""
    first = None
    for stream in container.streams:
        if stream.type != kind or stream.codec_context is None or _has(stream, *_NO_PICTURES):
            continue
        if _has(stream, "default"):
            return stream
        first = first or stream
    return first


def _has(stream: Stream, *names: str) -> bool:
    flags = type(stream.disposition)
    return any(bool(stream.disposition & getattr(flags, n, flags(0))) for n in names)


def promised_packets(stream: Stream) -> int:
    """Return the packets that the index of an MP4 lists, edits applied; 0 without such an index."""
    if "mp4" not in stream.container.format.name.split(","):
        return 0
    return len(getattr(stream, "index_entries", ()))  # PyAV has it since 17


def packets(container: Container, *streams: Stream) -> Iterator[Packet]:
    """Yield the packets of some streams up to the end of what can be read, but for broken ones.

    Clocks that restart or jump are made to go on.
    """
    demuxed = container.demux(*streams)
    jumps = container.format.name in _CLOCK_JUMPS
    clocks = {stream.index: _Clock(stream) for stream in streams if jumps}
    broken = 0
    while broken < _MAX_BROKEN_READS:
        try:
            packet = next(demuxed)
        except StopIteration:
            return
        except av.error.FFmpegError:
            broken += 1
            demuxed = container.demux(*streams)
            continue
        except IndexError:  # PyAV, at a packet of a stream that was not there at the beginning
            demuxed = container.demux(*streams)
            continue
        if packet.size:  # the empty ones at the end are there to flush decoders
            if jumps:
                clocks[packet.stream_index].set(packet)
            yield packet


class _Clock:
    """The clock of one stream, going on where that of the file restarts or jumps."""

    def __init__(self, stream: Stream) -> None:
        self._jump = round(_JUMP_S / float(stream.time_base))
        self._step = round(0.04 / float(stream.time_base))  # of a packet that tells no duration
        self._expected: int | None = None
        self._offset = 0

    def set(self, packet: Packet) -> None:
        """Move a packet's time stamps to this clock."""
        stamp = packet.dts if packet.dts is not None else packet.pts
        if stamp is None:
            return
        if self._expected is not None:
            step = stamp + self._offset - self._expected
            if step < -self._jump // 10 or step > self._jump:
                self._offset -= step
        if packet.pts is not None:
            packet.pts += self._offset
        if packet.dts is not None:
            packet.dts += self._offset
        self._expected = stamp + self._offset + (packet.duration or self._step)
