"""Video files -> a few frames, spread evenly over the time that they are shown.

Source of the sampling: TSN (Wang et al., ECCV 2016): equal segments, the centre frame of each.

Two passes. The first only reads packets (15 ms for 30 s of 720p) and learns the presentation time
of every frame: headers lie about duration and rate, packets hardly. Sound is decoded on the way.
The second decodes from the key frame before each chosen frame up to that frame, and passes over
what lies between without decoding it. It reads sequentially instead of seeking, which is exact
in every container, those without an index too.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from common.errors import MediaError
from extractors.media.containers import Container, Packet, Stream, packets, reason

Pixels: TypeAlias = npt.NDArray[np.uint8]
Frame: TypeAlias = Any

_DISCARDABLE = ("h264",)
"""Codecs whose frames that no other frame refers to are marked for certain (nal_ref_idc = 0)."""


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
        self.past_limit = False

    def add(self, packet: Packet) -> None:
        """Add the next packet, unless it lies behind the longest duration."""
        time = _time_of(packet)
        if time is None:  # no time stamps at all: count
            time = self.times[-1] + self._interval if self.times else 0
        if self._start is None:
            self._start = time
        if time - self._start > self._limit:
            self.past_limit = True
            return
        self.times.append(time)
        self.keys.append(packet.is_keyframe)
        self.shown.append(not getattr(packet, "is_discard", False))
        self._last = max(self._last, (time, packet.duration or 0))

    def __len__(self) -> int:
        return len(self.times)

    def choose(self, count: int, random: np.random.Generator | None = None) -> list[int]:
        """Return the packets of the centre frames of `count` equal segments, in order of time.

        A segment's centre frame is the one on display at the middle of the segment, so that a
        variable frame rate is followed. A clip of fewer frames gives each of its frames once; a
        frame that is on display over several centres is given once.

        Args:
            count: Segments.
            random: Takes a frame at a random time of each segment instead, as TSN trains.

        Returns:
            Positions in decoding order, at most `count`.
        """
        order = sorted((i for i in range(len(self)) if self.shown[i]), key=self.times.__getitem__)
        if len(order) <= count:
            return order
        times = [self.times[i] for i in order]
        start, end = times[0], times[-1] + (self._last[1] or self._interval)
        if end - start < count:  # all times alike: no clock to go by
            return [
                order[int((k + at) * len(order) / count)] for k, at in _positions(count, random)
            ]
        moments = (start + (k + at) * (end - start) / count for k, at in _positions(count, random))
        return list(dict.fromkeys(order[bisect_right(times, moment) - 1] for moment in moments))

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


def _time_of(packet: Packet) -> int | None:
    time = packet.pts if packet.pts is not None else packet.dts
    return None if time is None else int(time)


@dataclass(frozen=True, slots=True)
class Run:
    """Packets `first` to `last`, decoded without a gap, for the frames at `times`."""

    first: int
    last: int
    times: tuple[int, ...]


def plan_runs(index: PacketIndex, chosen: list[int]) -> list[Run]:
    """Return the packets to decode to reach the chosen ones, in decoding order."""
    spans = sorted((index.key_before(i), i) for i in chosen)
    runs: list[Run] = []
    for first, target in spans:
        time = index.times[target]
        if runs and first <= runs[-1].last + 1:
            last = runs[-1]
            times = tuple(sorted((*last.times, time)))
            runs[-1] = Run(last.first, max(last.last, target), times)
        else:
            runs.append(Run(first, target, (time,)))
    return runs


def decode_frames(
    container: Container,
    stream: Stream,
    index: PacketIndex,
    chosen: list[int],
) -> Iterator[Frame]:
    """Decode the chosen frames of an index, in order of time, one at a time.

    A frame that is broken is replaced by the nearest one that decodes between its neighbours,
    and left out where there is none. The container must stand at its beginning.
    """
    runs = plan_runs(index, chosen)
    if not runs:
        return
    codec = stream.codec_context
    codec.thread_count = 1  # decoder processes are the parallelism; more threads only fight
    chosen_times = {index.times[i] for i in chosen}
    position, current = -1, 0
    picker = _Picker(runs[0].times)
    for packet in packets(container, stream):
        position += 1
        run = runs[current]
        if position < run.first:
            continue
        codec.skip_frame = _skip(codec, index, position, chosen_times)
        yield from picker.pick(_decode(codec, packet))
        if position < run.last:
            continue
        yield from picker.pick(_decode(codec, None))
        yield from picker.rest()
        current += 1
        if current == len(runs):
            return
        codec.flush_buffers()  # after a flush the decoder takes no more packets without it
        picker = _Picker(runs[current].times)
    yield from picker.pick(_decode(codec, None))
    yield from picker.rest()


def _skip(codec: Any, index: PacketIndex, position: int, chosen_times: set[int]) -> str:
    """Let the decoder pass over frames that are neither chosen nor referred to."""
    needed = codec.name not in _DISCARDABLE or index.times[position] in chosen_times
    return "DEFAULT" if needed else "NONREF"


def _decode(codec: Any, packet: Packet | None) -> list[Frame]:
    try:
        return list(codec.decode(packet))
    except (av.error.FFmpegError, ValueError):
        return []  # what does not decode is missed when the frames are counted


class _Picker:
    """A picker of those frames of a run, in order of time, that are shown at given times."""

    def __init__(self, times: tuple[int, ...]) -> None:
        self._times = list(times)
        self._last: Frame | None = None

    def pick(self, frames: list[Frame]) -> Iterator[Frame]:
        """Yield the chosen ones among the next frames."""
        for frame in frames:
            time = frame.pts if frame.pts is not None else frame.dts
            self._last = frame
            if self._times and (time is None or time >= self._times[0]):
                while self._times and (time is None or time >= self._times[0]):
                    self._times.pop(0)
                    if time is None:
                        break
                self._last = None
                yield frame

    def rest(self) -> Iterator[Frame]:
        """Yield the run's last frame where frames are still missing: the nearest that decodes."""
        if self._times and self._last is not None:
            yield self._last
        self._times, self._last = [], None


def check_size(stream: Stream, max_pixels: int) -> None:
    """Refuse a video by its size before a frame of it is decoded.

    Raises:
        MediaError: It has no size, or more than `max_pixels`.
    """
    codec = stream.codec_context
    if not codec.width or not codec.height:
        raise MediaError("the video's header is broken: it has no width and height")
    if codec.width * codec.height > max_pixels:
        size = f"{codec.width}×{codec.height}"
        raise MediaError(f"{size} pixels are more than decode.max_pixels: {max_pixels}")
    codec.options = {**codec.options, "max_pixels": str(max_pixels)}  # it may grow on the way


class FrameScaler:
    """A scaler that also turns frames upright; keeps FFmpeg's tables between frames.

    Args:
        size: Upright width and height of a frame -> those of the result.
    """

    def __init__(self, size: Callable[[int, int], tuple[int, int]]) -> None:
        self._size = size
        self._reformatter = VideoReformatter()

    def __call__(self, frame: Frame) -> Pixels:
        """Convert a frame to uint8 RGB ``(height, width, 3)``.

        Raises:
            MediaError: The frame's pixel format cannot be converted.
        """
        turns = round(frame.rotation / 90) % 4  # quarter turns, counter-clockwise
        lying = turns % 2 == 1
        width, height = (frame.height, frame.width) if lying else (frame.width, frame.height)
        width, height = self._size(width, height)
        if lying:
            width, height = height, width
        try:
            scaled = self._reformatter.reformat(
                frame, width=width, height=height, format="rgb24", interpolation="AREA"
            )
            pixels = scaled.to_ndarray()
        except (av.error.FFmpegError, ValueError) as error:
            raise MediaError(f"frames cannot be converted: {reason(error)}") from error
        return np.rot90(np.asarray(pixels, np.uint8), turns)


Mode: TypeAlias = Literal["accurate", "keyframes"]


def choose_frames(
    index: PacketIndex, count: int, mode: Mode, random: np.random.Generator | None = None
) -> list[int]:
    """Return the frames to decode: those of `PacketIndex.choose`, or the key frames nearest."""
    chosen = index.choose(count, random)
    return chosen if mode == "accurate" else index.nearest_keys(chosen)
