"""Video files -> a few frames, spread evenly over the time that they are shown.

Source of the sampling: TSN (Wang et al., ECCV 2016): equal segments, the centre frame of each.

Two passes. The first only reads packets (15 ms for 30 s of 720p) and learns the presentation time
of every frame: headers lie about duration and rate, packets hardly. Sound is decoded on the way.
The second decodes from the key frame before each chosen frame up to that frame, and passes over
what lies between without decoding it. It goes through all packets again instead of seeking, which
is exact in every container, those without an index too. Key frames of packets are a claim: where
the first decoded frame is none, decoding starts further back.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import av
import cv2
import numpy as np
import numpy.typing as npt
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import VideoReformatter

from common.errors import MediaError
from extractors.media.containers import Packet, Stream, reason
from extractors.parts import FrameChoice

Pixels: TypeAlias = npt.NDArray[np.uint8]
Frame: TypeAlias = Any

_DISCARDABLE = ("h264",)
"""Codecs whose frames that no other frame refers to are marked for certain (nal_ref_idc = 0)."""


_MAX_LIES = 3
"""False key frames before none is believed any more: each costs another reading of the file. Half
would decode whole films for two of them; double only reads more."""

_CONVERTED_AT_ONCE = ("yuv420p", "yuvj420p")
"""Formats of pixels from which FFmpeg makes RGB of the same size in a sixth of the time of others:
large pictures are scaled in them, although their colours have half of the width then."""

_FREE = (0, 1, 5)  # AVPictureType: unknown, I, SI; the others refer to frames before them

_PACKED_DELAY = 4
"""Packets between one that holds two frames and the last of the two; real files need two."""


class FalseKey(Exception):
    """The packet at a position gave no frame to start from; `time` is of the first that did."""

    def __init__(self, position: int, time: int | None) -> None:
        super().__init__(position, time)
        self.position, self.time = position, time


class Refused(Exception):
    """A GPU's decoder does not decode a file as it should; the message is why."""


class PacketIndex:
    """Time, order and key flag of every packet of one video stream: 17 bytes each."""

    def __init__(self, stream: Stream, max_duration_s: float) -> None:
        self._limit = max_duration_s / float(stream.time_base)
        self._interval = _interval(stream)
        self._start: int | None = None
        self._last = (-(1 << 62), 0)  # time and duration of the frame shown last
        self.times = array("q")
        """Presentation time of each packet in decoding order, in the stream's time base."""
        self.keys = bytearray()
        self.shown = bytearray()
        self.cut_away = bytearray()
        """Packets that an edit list hides; their frames are decoded and never come out."""
        self.past_limit = False
        self.packed = False
        """Packets hold two frames, as DivX wrote them into AVI files."""
        self._may_be_packed = stream.codec_context.name == "mpeg4"
        self._lies = 0

    def add(self, packet: Packet) -> None:
        """Add the next packet, unless it lies behind the longest duration."""
        time = time_of(packet)
        if time is None:  # no time stamps at all: count
            time = self.times[-1] + self._interval if self.times else 0
        if self._start is None:
            self._start = time
        if time - self._start > self._limit:
            self.past_limit = True
            return
        self.times.append(time)
        self.keys.append(packet.is_keyframe)
        self.cut_away.append(getattr(packet, "is_discard", False))
        self.shown.append(not self.cut_away[-1])
        self._last = max(self._last, (time, packet.duration or 0))
        if self._may_be_packed and not self.packed:
            self.packed = bytes(packet).count(b"\0\0\1\xb6") > 1  # starts of frames

    def doubt(self, lie: FalseKey) -> None:
        """Take note of a key frame that is none, or of a beginning inside a group of pictures."""
        self._lies += 1
        if lie.position == 0:
            if lie.time is not None:
                self._hide_before(lie.time)
        elif self._lies <= _MAX_LIES:
            self.keys[lie.position] = False
        else:
            self.keys = bytearray(len(self))

    def _hide_before(self, time: int) -> None:
        for i, own in enumerate(self.times):
            if own < time:
                self.shown[i] = False

    def __len__(self) -> int:
        return len(self.times)

    @property
    def start(self) -> int:
        """Return the time of the first frame that can be shown."""
        return min((self.times[i] for i in self._usable()), default=0)

    def _usable(self) -> Iterator[int]:
        """Yield the packets that are shown, from the first key frame on.

        Frames before it refer to some that are not there.
        """
        first = self.keys.find(True)
        since = self.times[first] if first > 0 else min(self.times, default=0)
        return (i for i in range(len(self)) if self.shown[i] and self.times[i] >= since)

    def choose(self, count: int, random: np.random.Generator | None = None) -> list[int]:
        """Return the packets of the centre frames of `count` equal segments, in order of time.

        A segment's centre frame is the one on display at the middle of the segment, so that a
        variable frame rate is followed. A clip of fewer frames gives each of its frames once; a
        frame that is on display over several centres is given once. `random` takes a frame at a
        random time of each segment instead, as TSN trains. They are positions in decoding order.
        """
        order = self._in_order()
        if len(order) <= count:
            return order
        times = [self.times[i] for i in order]
        start, end = times[0], self._end(order)
        if end - start < count:  # all times alike: no clock to go by
            return [
                order[int((k + at) * len(order) / count)] for k, at in _positions(count, random)
            ]
        moments = (start + (k + at) * (end - start) / count for k, at in _positions(count, random))
        return list(dict.fromkeys(order[bisect_right(times, moment) - 1] for moment in moments))

    def choose_cheap(self, count: int, least: int) -> list[int]:
        """Return packets of frames that are spread over the clip and cost little, in order of time.

        Each of `least` equal segments without a key frame has the frame that is reached first, and
        each of `count` one where it is decoded on the way: of several, the nearest to the centre.
        Of what is not decoded on the way, all key frames, as long as they are not more than
        `count`: encoders put them where a scene begins, also a short one.
        """
        order = self._in_order()
        least = min(least, count)
        if len(order) <= least or self._end(order) - self.times[order[0]] < count:
            return self.choose(least)
        keys = set() if self.packed else {i for i in order if self.keys[i]}
        must = self._segments(order, least)
        runs = plan_runs(self, [min(each) for each in must if each and keys.isdisjoint(each)])
        passed = {i for run in runs for i in range(run.first, run.last + 1)}
        chosen = keys if len(keys) <= count else set(self.nearest_keys(self.choose(count)))
        chosen, cheap = chosen - passed, keys | passed
        start, length = self.times[order[0]], self._end(order) - self.times[order[0]]
        for parts, segments in ((count, self._segments(order, count)), (least, must)):
            for k, each in enumerate(segments):
                near = cheap.intersection(each) if chosen.isdisjoint(each) else ()
                centre = start + (k + 0.5) * length / parts
                if near:
                    chosen.add(min(near, key=lambda i: (abs(self.times[i] - centre), i)))
        while len(chosen) > count:  # segments of the one kind lie across borders of the other
            crowded = sorted((chosen.intersection(each) for each in must), key=len)[-1]
            chosen.remove(max(crowded))
        return sorted(chosen, key=self.times.__getitem__)

    def _in_order(self) -> list[int]:
        return sorted(self._usable(), key=self.times.__getitem__)

    def _end(self, order: list[int]) -> int:
        return self.times[order[-1]] + (self._last[1] or self._interval)

    def _segments(self, order: list[int], count: int) -> list[list[int]]:
        """Return the packets of frames that begin in each of `count` equal segments."""
        start, end = self.times[order[0]], self._end(order)
        segments: list[list[int]] = [[] for _ in range(count)]
        for i in order:
            segments[(self.times[i] - start) * count // (end - start)].append(i)
        return segments

    def nearest_keys(self, chosen: list[int]) -> list[int]:
        """Return the key frames nearest in time to chosen packets, each once, in order of time."""
        keys = sorted((i for i in range(len(self)) if self.keys[i]), key=self.times.__getitem__)
        if not keys:
            return chosen
        near = (min(keys, key=lambda k: abs(self.times[k] - self.times[i])) for i in chosen)
        return sorted(dict.fromkeys(near), key=self.times.__getitem__)

    def key_before(self, position: int) -> int:
        """Return the key frame that decoding must start from to reach a packet; 0 without one.

        A frame that follows a key frame in the file but is shown before it may refer to frames
        before that key frame (an open group of pictures): then it is the key frame before.
        """
        if self.packed:
            return 0
        for i in range(position, -1, -1):
            if self.keys[i] and self.times[i] <= self.times[position]:
                return i
        return 0


def _positions(count: int, random: np.random.Generator | None) -> Iterator[tuple[int, float]]:
    """Yield each segment and a position in it, in [0, 1): the middle, or a random one."""
    if random is None:
        return ((k, 0.5) for k in range(count))
    return enumerate(random.random(count).tolist())


def _interval(stream: Stream) -> int:
    rate = stream.average_rate or stream.guessed_rate or 25
    return max(1, round(1 / (float(rate) * float(stream.time_base))))


def time_of(shown: Packet | Frame) -> int | None:
    """Return the time at which a packet or frame is shown, in its stream's time base."""
    time = shown.pts if shown.pts is not None else shown.dts
    return None if time is None else int(time)


@dataclass(frozen=True, slots=True)
class Run:
    """Packets `first` to `last`, decoded without a gap, for the frames at `times`.

    The first frame of a `silent` one is hidden by an edit list, so that it cannot be judged.
    """

    first: int
    last: int
    times: tuple[int, ...]
    silent: bool = False


def plan_runs(index: PacketIndex, chosen: list[int]) -> list[Run]:
    """Return the packets to decode to reach the chosen ones, in decoding order."""
    delay = _PACKED_DELAY if index.packed else 0
    spans = sorted((index.key_before(i), i) for i in chosen)
    runs: list[Run] = []
    for first, target in spans:
        time = index.times[target]
        if runs and first <= runs[-1].last + 1:
            last = runs[-1]
            times = tuple(sorted((*last.times, time)))
            runs[-1] = Run(last.first, max(last.last, target + delay), times, last.silent)
        else:
            silent = bool(index.cut_away[first])
            runs.append(Run(first, target + delay, (time,), silent))
    return runs


def decode_frames(
    read: Iterable[Packet],
    stream: Stream,
    index: PacketIndex,
    chosen: list[int],
    side: int,
    *,
    strict: bool = False,
) -> Iterator[Frame]:
    """Decode the chosen frames of an index from all packets, in order of time, one at a time.

    They are for pictures of `side` pixels: key frames of more than twice of that, with none
    besides, are left as blocks; the loop filter that would smooth them takes a tenth of their time.

    A frame that is broken is replaced by the nearest one that decodes between its neighbours,
    and left out where there is none. FalseKey says that decoding started where it cannot:
    `PacketIndex.doubt` it, and choose again what is missing. Where it is `strict`, packets that do
    not decode, and missing frames, are Refused: on a GPU the file may be whole.
    """
    runs = plan_runs(index, chosen)
    if not runs:
        return
    codec = _decoder(stream)
    if all(run.first == run.last for run in runs) and min(codec.width, codec.height) > 2 * side:
        codec.options = {**codec.options, "skip_loop_filter": "all"}
    chosen_times = {index.times[i] for i in chosen}
    position, current = -1, 0
    # Without a real key frame, as live encoders send for hours: FFmpeg's H.264 decoder itself keeps
    # frames back until all of their parts have been refreshed.
    refreshed = codec.name == "h264" and not any(index.keys)
    picker = _Picker(runs[0], refreshed=refreshed)
    for packet in _unpacked(read, stream, index):
        position += 1
        run = runs[current]
        if position < run.first:
            continue
        if strict and packet.is_corrupt:  # which a GPU decodes to something, without a word
            raise Refused("a packet is damaged")
        codec.skip_frame = _skip(codec, index, position, chosen_times)
        yield from picker.pick(_decode(codec, packet, strict))
        if position < run.last:
            continue
        yield from picker.pick(_decode(codec, None, strict))
        yield from picker.rest(strict)
        current += 1
        if current == len(runs):
            return
        codec.flush_buffers()  # after a flush the decoder takes no more packets without it
        picker = _Picker(runs[current], refreshed=refreshed)
    yield from picker.pick(_decode(codec, None, strict))
    yield from picker.rest(strict)


def _decoder(stream: Stream) -> Any:
    """Return the stream's decoder, or the only one that knows the transparency of VP8 and VP9."""
    codec = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and codec.name in ("vp8", "vp9"):
        name = "libvpx-vp9" if codec.name == "vp9" else "libvpx"
        codec, options = av.CodecContext.create(name, "r"), codec.options
        codec.options = options
    codec.thread_count = 1  # decoder processes are the parallelism; more threads only fight
    return codec


def _unpacked(read: Iterable[Packet], stream: Stream, index: PacketIndex) -> Iterator[Packet]:
    """Yield packets of one frame each, also where they are packed in twos."""
    if not index.packed:
        yield from read
        return
    unpack = BitStreamFilterContext("mpeg4_unpack_bframes", stream)
    for packet in read:
        for single in unpack.filter(packet):
            single.pts = None  # it is that of the frame it was packed with; the decoder knows dts
            yield single


def _skip(codec: Any, index: PacketIndex, position: int, chosen_times: set[int]) -> str:
    """Let the decoder pass over frames that are neither chosen nor referred to."""
    needed = codec.name not in _DISCARDABLE or index.times[position] in chosen_times
    return "DEFAULT" if needed else "NONREF"


def _decode(codec: Any, packet: Packet | None, strict: bool) -> list[Frame]:
    try:
        return list(codec.decode(packet))
    except (av.error.FFmpegError, ValueError) as error:
        if strict:
            raise Refused(reason(error)) from error
        return []  # what does not decode is missed when the frames are counted


class _Picker:
    """A picker of those frames of a run, in order of time, that are shown at given times.

    Frames before the first that needs no other one are passed over: they are grey or smeared.
    None is where the decoder gives only `refreshed` ones.
    """

    def __init__(self, run: Run, *, refreshed: bool = False) -> None:
        self._refreshed = refreshed
        self._first = run.first
        self._times = list(run.times)
        self._last: Frame | None = None
        self._begun = run.silent

    def pick(self, frames: list[Frame]) -> Iterator[Frame]:
        """Yield the chosen ones among the next frames."""
        for frame in frames:
            time = time_of(frame)
            if not self._begun:
                # As far as its decoder tells, a frame to start from refers to no other one.
                free = frame.key_frame or int(frame.pict_type) in _FREE
                if not free and not self._refreshed:
                    continue
                self._begun = True
                if time is not None and self._times and time > self._times[0]:
                    raise FalseKey(self._first, time)
            self._last = frame
            if self._times and (time is None or time >= self._times[0]):
                while self._times and (time is None or time >= self._times[0]):
                    self._times.pop(0)
                    if time is None:
                        break
                self._last = None
                yield frame

    def rest(self, strict: bool) -> Iterator[Frame]:
        """Yield the run's last frame where frames are still missing: the nearest that decodes."""
        if strict and self._times:
            raise Refused("frames are missing")
        if not self._begun and self._first:
            raise FalseKey(self._first, None)
        if self._times and self._last is not None:
            yield self._last
        self._times, self._last = [], None


def check_size(stream: Stream, max_pixels: int) -> None:
    """Refuse a video without a size, or with more than `max_pixels`, before it is decoded."""
    codec = stream.codec_context
    if not codec.width or not codec.height:
        raise MediaError("the video's header is broken: it has no width and height")
    if codec.width * codec.height > max_pixels:
        size = f"{codec.width}×{codec.height}"
        raise MediaError(f"{size} pixels are more than decode.max_pixels: {max_pixels}")
    codec.options = {**codec.options, "max_pixels": str(max_pixels)}  # it may grow on the way


class FrameScaler:
    """A scaler that also turns frames upright; keeps FFmpeg's tables between frames.

    `size` takes the upright width and height of a frame, and gives those of the result. One that is
    `fast` is for OCR: as long as sides are more than half of the frame's, it interpolates linearly.
    """

    def __init__(self, size: Callable[[int, int], tuple[int, int]], *, fast: bool = False) -> None:
        self._size, self._fast = size, fast
        self._reformatter = VideoReformatter()

    def __call__(self, frame: Frame) -> Pixels:
        """Convert a frame to uint8 RGB ``(height, width, 3)``."""
        lying, mirrored, flipped = orientation(frame)
        width, height = (frame.height, frame.width) if lying else (frame.width, frame.height)
        width, height = self._size(width, height)
        if lying:
            width, height = height, width
        try:
            pixels: Any = _on_page(frame, width, height) if _has_alpha(frame.format.name) else None
            if pixels is None:
                fast = self._fast and 2 * width >= frame.width and 2 * height >= frame.height
                late = fast and frame.format.name in _CONVERTED_AT_ONCE
                scaled = self._reformatter.reformat(
                    frame,
                    width=width,
                    height=height,
                    # Scaling to rgb24 takes twice as long, and halves the width of colours.
                    format=None if late else "gbrp",
                    interpolation="FAST_BILINEAR" if fast else "AREA",
                    threads=1,  # as of the decoder; by default one of each core for each scaler
                )
                pixels = scaled.to_ndarray(format="rgb24", threads=1) if late else _rgb(scaled)
        except (av.error.FFmpegError, ValueError) as error:
            raise MediaError(f"frames cannot be converted: {reason(error)}") from error
        upright = np.asarray(pixels, np.uint8)
        if lying:
            upright = upright.transpose(1, 0, 2)  # (width, height, 3) -> (height, width, 3)
        return upright[:: -1 if flipped else 1, :: -1 if mirrored else 1]


def _rgb(frame: Frame) -> Pixels:
    """Return a frame of planes of green, blue and red as RGB ``(height, width, 3)``."""
    green, blue, red = (
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, : plane.width]
        for plane in frame.planes
    )
    return np.asarray(cv2.merge([red, green, blue]))


def orientation(frame: Frame) -> tuple[bool, bool, bool]:
    """Return what turns a frame upright: transpose it, then swap left and right, top and bottom.

    Of the display matrix, not of its angle: that of a mirrored frame means nothing.
    """
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return False, False, False
    # (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = (int(v) for v in np.frombuffer(bytes(side), np.int32)[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


@lru_cache(maxsize=64)
def _has_alpha(pixel_format: str) -> bool:
    return any(part.is_alpha for part in av.VideoFormat(pixel_format).components)


def _on_page(frame: Frame, width: int, height: int) -> Pixels | None:
    """Return a frame laid on a page as pictures are, at a size; None where it is opaque."""
    from extractors.media.pictures import average, on_page

    pixels = frame.to_ndarray(format="rgba")
    return None if pixels[:, :, 3].min() == 255 else average(on_page(pixels), width, height)


def choose_frames(
    index: PacketIndex, choice: FrameChoice, random: np.random.Generator | None = None
) -> list[int]:
    """Return the frames to decode; with `random`, one at a random time of each segment."""
    if choice.mode == "auto" and random is None:
        return index.choose_cheap(choice.count, choice.least)
    chosen = index.choose(choice.count, random)
    return index.nearest_keys(chosen) if choice.mode == "keyframes" else chosen
