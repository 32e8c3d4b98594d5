"""One media file -> the arrays that the extractors take (`extractors.parts` has their table).

    image -> image (n, S, S, 3), one picture for OCR
    video -> frames (m, S, S, 3), pictures for OCR, rows of its sound (j, ...)
    audio -> rows of sound (j, ...)

Runs in decoder processes that may die of a file; what a file can do short of that is a
`MediaError` with one line. Frames are streamed: only what is returned is kept.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import structlog

from common.errors import MediaError
from common.post import Failure, MediaKind, Modality
from config.features import FeatureSettings
from config.settings import DecodeSettings
from extractors.parts import (
    ALIKE,
    ALIKE_GRID,
    SPEECH,
    FrameChoice,
    PartKind,
    SoundInput,
    audio_encoder,
    centres,
    fitted_size,
    reading_size,
    speech_s,
)

if TYPE_CHECKING:  # av and cv2 are loaded when the first file of their kind comes
    from extractors.media.hwaccel import GpuDecoder
    from extractors.media.sniff import FileType
    from extractors.media.video import PacketIndex

Allocate: TypeAlias = Callable[[tuple[int, ...], np.dtype[Any]], npt.NDArray[Any]]
"""Gives the memory of a result: `numpy.empty`, or a view of shared memory."""

Pixels: TypeAlias = npt.NDArray[np.uint8]
SoundRows: TypeAlias = npt.NDArray[np.float32]
Waveform: TypeAlias = npt.NDArray[np.float32]

_UINT8 = np.dtype(np.uint8)
_log = structlog.get_logger()

_LOST_SOUND_S = 0.2
"""Seconds that may lack without a word: decoders drop a frame at either end, up to 0.1 s together.
Double would hide that a short sound is cut."""

_MOST_IN_MEMORY_BYTES = 64 << 20
"""Packets of a film that are kept for the second pass, which would have to open and read the file
again: 8 ms of a clip. Half would leave out a minute of 4K; more takes memory for no more gain."""

_LOST_PACKETS = 2
"""Packets of sound that may be broken without a word: the first and last of a recording that was
cut out of a broadcast. One would refuse short ones; more would hide damage to them."""


@dataclass(frozen=True)
class DecodedMedia:
    """The arrays of one media file.

    Attributes:
        frames: uint8 ``(m, S, S, 3)`` RGB of a video, S its extractor's size, in order of time;
            fewer than `features.video.frames` where the clip has fewer distinct frames.
        image: uint8 ``(n, S, S, 3)`` RGB of an image; n above 1 only for animations and, with
            ``features.image.padded``, for two views of each picture, one after the other.
        sound: float32 ``(j, ...)`` of a sound file or of a video's sound, as its encoder takes it.
        pictures: uint8 ``(height, width, 3)`` RGB for OCR.
        speech: float32 ``(k, 480000)`` of the same sound for ASR; None where that is off.
        failures: Of the broken side of a video whose other side is usable; and what is missing of a
            file of which the rest is used.
        times_s: When the frames are shown.
        turned: How they, or the picture, were turned upright.
        on_gpu: True: the GPU decoded the frames; False: it was to, and the CPU did it; None: that
            is not for the GPU.
    """

    frames: Pixels | None = None
    image: Pixels | None = None
    sound: SoundRows | None = None
    pictures: tuple[Pixels, ...] = ()
    speech: SoundRows | None = None
    failures: Mapping[Modality, Failure] = field(default_factory=dict)
    times_s: tuple[float, ...] = ()
    turned: str = ""
    on_gpu: bool | None = None

    @property
    def parts(self) -> list[tuple[PartKind, npt.NDArray[Any]]]:
        """Return every array that has rows, by its name in the table."""
        arrays: list[tuple[PartKind, npt.NDArray[Any] | None]] = [
            ("frames", self.frames),
            ("image", self.image),
            ("sound", self.sound),
            *(("picture", picture) for picture in self.pictures),
            ("speech", self.speech),
        ]
        return [(kind, array) for kind, array in arrays if array is not None and array.size]


def decode_media(
    kind: MediaKind,
    path: str | Path,
    features: FeatureSettings,
    limits: DecodeSettings,
    allocate: Allocate = np.empty,
) -> DecodedMedia:
    """Decode one local media file; MediaError for one that cannot be, or is another type.

    Args:
        kind: What the post says it is; name and extension of the file mean nothing.
        path: The file.
        features: Sizes and counts.
        limits: What a file may be; longer ones are read up to the limit.
        allocate: Called with shape and dtype for every array that is returned.
    """
    decode = {"image": _decode_image, "video": _decode_video, "audio": _decode_sound}[kind]
    return decode(Path(path), features, limits, allocate)


def _decode_image(
    path: Path, features: FeatureSettings, limits: DecodeSettings, allocate: Allocate
) -> DecodedMedia:
    from extractors.media.pictures import READ_SIDE, padded, read_pictures, shrink, squash

    side, count, ocr = features.image.image_size, features.image.max_frames, features.ocr
    pictures: tuple[Pixels, ...] = ()
    squares: list[Pixels] = []
    notes: list[str] = []
    for pixels in read_pictures(path, max_pixels=limits.max_pixels, max_frames=count, notes=notes):
        squares.append(squash(pixels, side, side))
        if features.image.padded:
            squares.append(padded(pixels, side))
        if ocr.enabled and not pictures:
            if ocr.max_side > READ_SIDE:
                larger = read_pictures(path, max_pixels=limits.max_pixels, side=ocr.max_side)
                pixels = next(larger)  # noqa: PLW2901
            width, height = reading_size(pixels.shape[1], pixels.shape[0], ocr.max_side)
            pictures = (shrink(pixels, width, height, allocate((height, width, 3), _UINT8)),)
    image = allocate((len(squares), side, side, 3), _UINT8)
    image[:] = squares
    return DecodedMedia(image=image, pictures=pictures, failures=_noted("image", *notes))


def _noted(modality: Modality, *notes: str) -> dict[Modality, Failure]:
    """Return what is missing of a file that is used; it stands in the result like a failure."""
    first = next(filter(None, notes), "")
    return {modality: Failure.of("decode", MediaError(first))} if first else {}


def _decode_sound(
    path: Path, features: FeatureSettings, limits: DecodeSettings, allocate: Allocate
) -> DecodedMedia:
    sound = audio_encoder(features.audio).sound
    waveform, note = read_waveform(path, limits, sound.rate_hz)
    rows = _sound_rows(waveform, sound, allocate)
    speech = _speech(path, waveform, features, limits, allocate)
    return DecodedMedia(sound=rows, speech=speech, failures=_noted("audio", note))


def read_waveform(path: Path, limits: DecodeSettings, rate_hz: int) -> tuple[Waveform, str]:
    """Return the sound of a file as the extractors hear it, and a note of what is missing of it.

    float32 ``(samples,)``, at least one; MediaError when there is no sound that can be read.
    """
    from extractors.media.containers import open_container
    from extractors.media.sniff import check_type

    file_type = check_type(path, "audio")
    with open_container(path, file_type) as container:
        scan = _scan(container, path, file_type, limits, rate_hz, only_sound=True)
    waveform = scan.waveform
    if isinstance(waveform, MediaError):
        raise waveform
    if not len(waveform):
        raise MediaError(f"{file_type.name} is empty: it has no sound")
    return waveform, scan.note


def _decode_video(
    path: Path, features: FeatureSettings, limits: DecodeSettings, allocate: Allocate
) -> DecodedMedia:
    from extractors.media.containers import open_container
    from extractors.media.sniff import check_type

    file_type = check_type(path, "video")
    with open_container(path, file_type) as container:
        sound_input = audio_encoder(features.audio).sound
        scan = _scan(container, path, file_type, limits, sound_input.rate_hz)
        film = _Film(path, file_type, scan, limits, features.video.image_size)
        return _both_sides(film, scan, features=features, allocate=allocate)


def _both_sides(
    film: _Film, scan: _Scan, *, features: FeatureSettings, allocate: Allocate
) -> DecodedMedia:
    """Return the arrays of a film; MediaError where neither its frames nor its sound can be had."""
    failures: dict[Modality, Failure] = {}
    sound: SoundRows | None = None
    speech: SoundRows | None = None
    waveform = scan.waveform
    if isinstance(waveform, MediaError):
        failures["audio"] = Failure.of("decode", waveform)
    elif len(waveform):
        sound = _sound_rows(waveform, audio_encoder(features.audio).sound, allocate)
        speech = _speech(film.path, waveform, features, film.limits, allocate)
        failures.update(_noted("audio", scan.note))
    try:
        frames, times_s, pictures = _frames(film, features=features, allocate=allocate)
    except MediaError as error:
        if sound is None:
            raise
        failures["video"] = Failure.of("decode", error)
        return DecodedMedia(sound=sound, speech=speech, failures=failures, on_gpu=film.on_gpu)
    failures.update(_noted("video", *film.notes))
    return DecodedMedia(
        frames=frames,
        sound=sound,
        pictures=pictures,
        speech=speech,
        failures=failures,
        times_s=times_s,
        turned=film.turned,
        on_gpu=film.on_gpu,
    )


@dataclass(frozen=True)
class _Scan:
    """The findings of the first pass over a file.

    Attributes:
        stream: The video's.
        index: Of its packets.
        packets: All of them, of a film that is small enough to keep; they go with the container.
        waveform: The sound, or why it is broken.
        note: What is missing of the sound.
    """

    stream: Any
    index: PacketIndex | None
    packets: list[Any] | None
    waveform: Waveform | MediaError
    note: str


def _scan(
    container: Any,
    path: Path,
    file_type: FileType,
    limits: DecodeSettings,
    rate_hz: int | None,
    *,
    only_sound: bool = False,
) -> _Scan:
    """Make the first pass: index the video's packets and decode its sound at a rate, if any."""
    from extractors.media.containers import find_stream, packets, promised_packets
    from extractors.media.sniff import check_share, has_duration
    from extractors.media.sound import SoundTrack
    from extractors.media.video import PacketIndex

    video = find_stream(container, "video") if not only_sound else None
    audio = find_stream(container, "audio") if rate_hz is not None else None
    if only_sound and audio is None:
        raise MediaError(f"{file_type.name} has no sound")
    index = PacketIndex(video, limits.max_duration_s) if video is not None else None
    track = SoundTrack(audio, min(limits.max_audio_s, limits.max_duration_s), rate_hz or 0)
    read, film, film_bytes = 0, [], 0
    for packet in packets(container, *(s for s in (video, audio) if s is not None)):
        if index is not None and packet.stream is video:
            index.add(packet)
            film_bytes += packet.size
            if film_bytes <= _MOST_IN_MEMORY_BYTES and not index.past_limit:
                film.append(packet)
        else:
            read += 1
            track.feed(packet)
        if track.full and (index is None or index.past_limit):
            break
    all_packets = film if film_bytes <= _MOST_IN_MEMORY_BYTES else None
    try:
        waveform = track.waveform()
        if audio is None or not len(waveform):
            return _Scan(video, index, all_packets, waveform, "")
        notes = [file_type.note]
        if not track.full:
            notes.append(check_share(read, promised_packets(audio), "packets", file_type))
            whole = track.fed - track.broken + _LOST_PACKETS
            notes.append(check_share(whole, track.fed, "packets", file_type))
            got_s = len(waveform) / (rate_hz or 1)
            if audio.duration and has_duration(path, file_type):
                promised_s = float(audio.duration * audio.time_base)
                if promised_s - got_s > _LOST_SOUND_S:
                    notes.append(check_share(got_s, promised_s, "s", file_type))
        return _Scan(video, index, all_packets, waveform, next(filter(None, notes), ""))
    except MediaError as error:
        return _Scan(video, index, all_packets, error, "")


def _frames(
    film: _Film, *, features: FeatureSettings, allocate: Allocate
) -> tuple[Pixels, tuple[float, ...], tuple[Pixels, ...]]:
    """Make the second pass: decode the chosen frames, and those of them that OCR reads."""
    from extractors.media.video import FrameScaler, choose_frames

    ocr, side = features.ocr, features.video.image_size
    square = FrameScaler(lambda width, height: (side, side))
    fitted = FrameScaler(lambda width, height: fitted_size(width, height, ocr.max_side), fast=True)
    frames: Any = None
    pictures: list[Pixels] = []
    times_s: list[float] = []
    read: list[int] = []
    for frame, total in film.chosen(
        lambda index: choose_frames(index, FrameChoice.of(features.video))
    ):
        if frames is None:
            frames = allocate((total, side, side, 3), _UINT8)
        count = len(times_s)
        frames[count] = square(frame)
        if ocr.enabled and count in centres(total, min(ocr.frames, total)):
            if not any(_alike(frames[count], frames[i]) for i in read):
                pictures.append(_copy(fitted(frame), allocate))
            read.append(count)
        times_s.append(film.time_s(frame))
    return frames[: len(times_s)], tuple(times_s), tuple(pictures)


def _alike(one: Pixels, other: Pixels) -> bool:
    """Tell whether two frames, as their encoder gets them, have the same text to read."""
    from extractors.media.pictures import average

    grids = [average(each, ALIKE_GRID, ALIKE_GRID).astype(np.int16) for each in (one, other)]
    return int(np.abs(grids[0] - grids[1]).max()) <= ALIKE


class _Film:
    """The second pass over a video: `notes` say what is missing, `turned` how it lay.

    Its frames are for pictures of `side` pixels; `on_gpu` is as in `DecodedMedia`.
    """

    def __init__(
        self, path: Path, file_type: FileType, scan: _Scan, limits: DecodeSettings, side: int
    ) -> None:
        self._side = side
        self.path, self._type, self._index, self.limits = path, file_type, scan.index, limits
        self._stream, self._packets = scan.stream, scan.packets
        self._time_base = self._start = 0.0
        self.notes = [file_type.note]
        self.turned = ""
        self.on_gpu: bool | None = None

    def time_s(self, frame: Any) -> float:
        """Return when a frame is shown, in seconds from the first one."""
        from extractors.media.video import time_of

        return round(((time_of(frame) or self._start) - self._start) * self._time_base, 3)

    def chosen(self, choose: Callable[[PacketIndex], list[int]]) -> Iterator[tuple[Any, int]]:
        """Yield the chosen frames that decode, each with the number of chosen ones.

        MediaError when there are none, or too few of those that there should be.
        """
        from extractors.media.sniff import check_share
        from extractors.media.video import FalseKey, Refused, orientation, time_of

        index = self._index
        chosen: list[int] = []
        count, last, ended = 0, -(1 << 62), False
        while not ended:
            if index is not None and not count:
                chosen = choose(index)
            try:
                for frame in self._decode(chosen, last):
                    if not count:
                        self.turned = _turns(orientation(frame))
                    yield frame, len(chosen)
                    # It may be one before the chosen one, in whose place it stands.
                    chosen_s = index.times[chosen[count]] if index is not None else last
                    count += 1
                    last = max(last, time_of(frame) or last, chosen_s)
                ended = True
            except FalseKey as lie:
                if index is not None:
                    index.doubt(lie)
            except Refused as refused:
                self.on_gpu, codec = False, self._stream.codec_context
                about = {"codec": codec.name, "profile": codec.profile, "reason": str(refused)}
                _log.warning("decode.gpu_refused", file=str(self.path), **about, use="CPU")
        if not count:
            raise MediaError(f"broken {self._type.name}: 0 of {len(chosen)} frames can be read")
        self.notes.append(check_share(count, len(chosen), "chosen frames", self._type, "broken"))

    def _decode(self, chosen: list[int], after: int) -> Iterator[Any]:
        """Decode those of the chosen frames that are shown after a time."""
        from extractors.media.containers import (
            find_stream,
            open_container,
            packets,
            promised_packets,
        )
        from extractors.media.sniff import check_share
        from extractors.media.video import check_size, decode_frames

        index, stream = self._index, self._stream
        read: Iterable[Any] | None = self._packets
        if index is None or stream is None:
            raise MediaError(f"{self._type.name} has no video stream")
        remaining = [i for i in chosen if index.times[i] > after and index.shown[i]]
        gpu = self._gpu(index, remaining)
        with contextlib.ExitStack() as opened:
            if read is None or gpu is not None:
                container = opened.enter_context(
                    gpu.open(self.path, self._type)
                    if gpu is not None
                    else open_container(self.path, self._type)
                )
                stream = find_stream(container, "video")
                read = packets(container, stream)
            if gpu is None:
                self._packets = None  # its decoder is used up: another try opens the file again
            check_size(stream, self.limits.max_pixels)
            self._time_base, self._start = float(stream.time_base), index.start
            if not index.past_limit:
                promised = promised_packets(stream)
                self.notes.append(check_share(len(index), promised, "frames", self._type))
            frames = decode_frames(read, stream, index, remaining, self._side, strict=bool(gpu))
            if gpu is None:
                yield from frames
                return
            for frame in frames:
                self.on_gpu = True
                yield gpu.download(frame)

    def _gpu(self, index: PacketIndex, chosen: list[int]) -> GpuDecoder | None:
        """Return the GPU's decoder where it is to decode these frames, and has not refused to."""
        if self.limits.hwaccel == "none" or self.on_gpu is False:
            return None
        from extractors.media import hwaccel

        if not hwaccel.worth_it(self._stream, index, chosen):
            return None
        gpu = hwaccel.gpu_decoder(os.getpid())
        if gpu is None:
            self.on_gpu = False
        return gpu


def _turns(upright: tuple[bool, bool, bool]) -> str:
    names = ("transposed", "left and right swapped", "top and bottom swapped")
    return ", ".join(name for name, turned in zip(names, upright, strict=True) if turned)


def read_frames(
    path: Path,
    *,
    choice: FrameChoice,
    side: int,
    limits: DecodeSettings,
    random: np.random.Generator | None = None,
) -> Pixels:
    """Return the frames of a video file as `decode_media` gives them, without its sound.

    uint8 RGB ``(n, side, side, 3)``, n at least 1; `random` takes a frame at a random time of each
    segment instead.
    """
    from extractors.media.containers import open_container
    from extractors.media.sniff import check_type
    from extractors.media.video import FrameScaler, choose_frames

    file_type = check_type(path, "video")
    scale = FrameScaler(lambda width, height: (side, side))
    with open_container(path, file_type) as container:
        scan = _scan(container, path, file_type, limits, None)
        film = _Film(path, file_type, scan, limits, side)
        frames = film.chosen(lambda index: choose_frames(index, choice, random))
        return np.stack([scale(frame) for frame, _ in frames])


def _sound_rows(waveform: Waveform, sound: SoundInput, allocate: Allocate) -> SoundRows:
    from extractors.media.sound import sound_rows

    return _copy(sound_rows(waveform, sound), allocate)


def _speech(
    path: Path,
    waveform: Waveform,
    features: FeatureSettings,
    limits: DecodeSettings,
    allocate: Allocate,
) -> SoundRows | None:
    """Return the windows of a file's sound that are heard for words; its last one is filled up."""
    most = int(speech_s(features, limits) * SPEECH.rate_hz)
    if most and audio_encoder(features.audio).sound.rate_hz != SPEECH.rate_hz:
        waveform, _ = read_waveform(path, limits, SPEECH.rate_hz)
    heard = waveform[:most]
    if not len(heard):
        return None
    whole = np.pad(heard, (0, -len(heard) % SPEECH.samples))
    return _copy(whole.reshape(-1, SPEECH.samples), allocate)  # (n * samples,) -> (n, samples)


def _copy(array: npt.NDArray[Any], allocate: Allocate) -> npt.NDArray[Any]:
    out = allocate(array.shape, array.dtype)
    out[...] = array
    return out
