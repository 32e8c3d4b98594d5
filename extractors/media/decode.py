"""One media file -> the arrays that the extractors take (`extractors.parts` has their table).

    image -> image (n, S, S, 3), one picture for OCR
    video -> frames (m, S, S, 3), pictures for OCR, rows of its sound (j, ...)
    audio -> rows of sound (j, ...)

Runs in decoder processes that may die of a file; what a file can do short of that is a
`MediaError` with one line. Frames are streamed: only what is returned is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from common.errors import MediaError
from common.post import Failure, MediaKind, Modality
from config.settings import DecodeSettings, FeatureSettings
from extractors.parts import PartKind, SoundInput, audio_encoder

if TYPE_CHECKING:  # av and cv2 are loaded when the first file of their kind comes
    from extractors.media.sniff import FileType
    from extractors.media.video import PacketIndex

Allocate: TypeAlias = Callable[[tuple[int, ...], np.dtype[Any]], npt.NDArray[Any]]
"""Gives the memory of a result: `numpy.empty`, or a view of shared memory."""

Pixels: TypeAlias = npt.NDArray[np.uint8]
SoundRows: TypeAlias = npt.NDArray[np.float32]
Waveform: TypeAlias = npt.NDArray[np.float32]

_UINT8 = np.dtype(np.uint8)

_ENOUGH = 0.5
"""Share of a video's frames, and of the chosen ones, that must decode; else it is broken.

Below half, what is left says little about the film; a stricter bound would refuse films with a
scratch.
"""

_LOST_SOUND = 0.1
"""Share of a sound file's duration that may be missing.

Decoders drop a frame at either end, which is 5% of a second of MP3; double would take files that
are cut.
"""


@dataclass(frozen=True)
class DecodedMedia:
    """The arrays of one media file.

    Attributes:
        frames: uint8 ``(m, S, S, 3)`` RGB of a video, S its extractor's size, in order of time;
            fewer than `features.video.frames` where the clip has fewer distinct frames.
        image: uint8 ``(n, S, S, 3)`` RGB of an image; n above 1 only for animations.
        sound: float32 ``(j, ...)`` of a sound file or of a video's sound, as its encoder takes it.
        pictures: uint8 ``(height, width, 3)`` RGB for OCR.
        failures: Of the broken side of a video whose other side is usable.
    """

    frames: Pixels | None = None
    image: Pixels | None = None
    sound: SoundRows | None = None
    pictures: tuple[Pixels, ...] = ()
    failures: Mapping[Modality, Failure] = field(default_factory=dict)

    @property
    def parts(self) -> list[tuple[PartKind, npt.NDArray[Any]]]:
        """Return every array that has rows, by its name in the table."""
        arrays: list[tuple[PartKind, npt.NDArray[Any] | None]] = [
            ("frames", self.frames),
            ("image", self.image),
            ("sound", self.sound),
            *(("picture", picture) for picture in self.pictures),
        ]
        return [(kind, array) for kind, array in arrays if array is not None and array.size]


def decode_media(
    kind: MediaKind,
    path: str | Path,
    features: FeatureSettings,
    limits: DecodeSettings,
    allocate: Allocate = np.empty,
) -> DecodedMedia:
    """Decode one local media file.

    Args:
        kind: What the post says it is.
        path: The file; its name and extension mean nothing.
        features: Sizes and counts.
        limits: What a file may be; longer ones are read up to the limit.
        allocate: Called with shape and dtype for every array that is returned.

    Raises:
        MediaError: The file is missing, of another type, truncated, broken or too large.
    """
    if kind == "image":
        return _decode_image(Path(path), features, limits, allocate)
    if kind == "video":
        return _decode_video(Path(path), features, limits, allocate)
    return _decode_sound(Path(path), features, limits, allocate)


def _decode_image(
    path: Path, features: FeatureSettings, limits: DecodeSettings, allocate: Allocate
) -> DecodedMedia:
    from extractors.media.pictures import fitted_size, read_pictures, squash

    side, count = features.image.image_size, features.image.max_frames
    pictures: tuple[Pixels, ...] = ()
    squares: list[Pixels] = []
    for pixels in read_pictures(path, max_pixels=limits.max_pixels, max_frames=count):
        squares.append(squash(pixels, side, side))
        if features.ocr.enabled and not pictures:
            width, height = fitted_size(pixels.shape[1], pixels.shape[0], features.ocr.max_side)
            pictures = (_copy(squash(pixels, width, height), allocate),)
    image = allocate((len(squares), side, side, 3), _UINT8)
    np.stack(squares, out=image)
    return DecodedMedia(image=image, pictures=pictures)


def _decode_sound(
    path: Path, features: FeatureSettings, limits: DecodeSettings, allocate: Allocate
) -> DecodedMedia:
    from extractors.media.containers import find_stream, open_container, packets
    from extractors.media.sniff import check_type
    from extractors.media.sound import SoundTrack

    file_type = check_type(path, "audio")
    sound = audio_encoder(features.audio).sound
    with open_container(path, file_type) as container:
        stream = find_stream(container, "audio")
        if stream is None:
            raise MediaError(f"{file_type.name} has no sound")
        track = SoundTrack(stream, min(limits.max_audio_s, limits.max_duration_s), sound.rate_hz)
        for packet in packets(container, stream):
            track.feed(packet)
            if track.full:
                break
        waveform = track.waveform()
        if not len(waveform):
            raise MediaError(f"{file_type.name} is empty: it has no sound")
        if file_type.family in ("flac", "mp3", "id3") and stream.duration and not track.full:
            promised_s = float(stream.duration * stream.time_base)
            got_s = len(waveform) / sound.rate_hz
            if got_s < (1 - _LOST_SOUND) * promised_s:
                raise MediaError(f"truncated {file_type.name}: {got_s:.1f} of {promised_s:.1f} s")
    return DecodedMedia(sound=_sound_rows(waveform, sound, allocate))


def _decode_video(
    path: Path, features: FeatureSettings, limits: DecodeSettings, allocate: Allocate
) -> DecodedMedia:
    from extractors.media.sniff import check_type

    file_type = check_type(path, "video")
    failures: dict[Modality, Failure] = {}
    sound: SoundRows | None = None
    sound_input = audio_encoder(features.audio).sound
    index, waveform = _scan(path, file_type, limits, sound_input.rate_hz)
    if isinstance(waveform, MediaError):
        failures["audio"] = Failure.of("decode", waveform)
    elif len(waveform):
        sound = _sound_rows(waveform, sound_input, allocate)
    try:
        frames, pictures = _frames(
            path, file_type, index, features=features, limits=limits, allocate=allocate
        )
    except MediaError as error:
        if sound is None:
            raise
        failures["video"] = Failure.of("decode", error)
        return DecodedMedia(sound=sound, failures=failures)
    return DecodedMedia(frames=frames, sound=sound, pictures=pictures, failures=failures)


def _scan(
    path: Path, file_type: FileType, limits: DecodeSettings, rate_hz: int | None
) -> tuple[PacketIndex | None, Waveform | MediaError]:
    """Make the first pass: index the video's packets and decode its sound at a rate, if any."""
    from extractors.media.containers import find_stream, open_container, packets
    from extractors.media.sound import SoundTrack
    from extractors.media.video import PacketIndex

    with open_container(path, file_type) as container:
        video = find_stream(container, "video")
        audio = find_stream(container, "audio") if rate_hz is not None else None
        index = PacketIndex(video, limits.max_duration_s) if video is not None else None
        track = SoundTrack(audio, min(limits.max_audio_s, limits.max_duration_s), rate_hz or 0)
        for packet in packets(container, *(s for s in (video, audio) if s is not None)):
            if index is not None and packet.stream.type == "video":
                index.add(packet)
            else:
                track.feed(packet)
            if track.full and (index is None or index.past_limit):
                break
        try:
            return index, track.waveform()
        except MediaError as error:
            return index, error


def _frames(
    path: Path,
    file_type: FileType,
    index: PacketIndex | None,
    *,
    features: FeatureSettings,
    limits: DecodeSettings,
    allocate: Allocate,
) -> tuple[Pixels, tuple[Pixels, ...]]:
    """Make the second pass: decode the chosen frames, and those of them that OCR reads."""
    from extractors.media.pictures import centres, fitted_size
    from extractors.media.video import FrameScaler, choose_frames

    ocr, side = features.ocr, features.video.image_size
    square = FrameScaler(lambda width, height: (side, side))
    fitted = FrameScaler(lambda width, height: fitted_size(width, height, ocr.max_side))
    frames: Any = None
    pictures: list[Pixels] = []
    count = 0
    for frame, total in _chosen_frames(
        path,
        file_type,
        index,
        limits,
        lambda index: choose_frames(index, features.video.frames, features.video.decode),
    ):
        if frames is None:
            frames = allocate((total, side, side, 3), _UINT8)
        frames[count] = square(frame)
        if ocr.enabled and count in centres(total, min(ocr.frames, total)):
            pictures.append(_copy(fitted(frame), allocate))
        count += 1
    return frames[:count], tuple(pictures)


def _chosen_frames(
    path: Path,
    file_type: FileType,
    index: PacketIndex | None,
    limits: DecodeSettings,
    choose: Callable[[PacketIndex], list[int]],
) -> Iterator[tuple[Any, int]]:
    """Yield the chosen frames that decode, at least one, each with the number of chosen ones.

    Raises:
        MediaError: There are no frames, or too few of those that there should be.
    """
    from extractors.media.containers import find_stream, open_container
    from extractors.media.video import check_size, decode_frames

    with open_container(path, file_type) as container:
        stream = find_stream(container, "video")
        if index is None or stream is None:
            raise MediaError(f"{file_type.name} has no video stream")
        check_size(stream, limits.max_pixels)
        _check_whole(len(index), stream.frames if not index.past_limit else 0, file_type)
        chosen, count = choose(index), 0
        for frame in decode_frames(container, stream, index, chosen):
            yield frame, len(chosen)
            count += 1
    _check_whole(count, len(chosen), file_type)


def read_frames(
    path: Path,
    *,
    count: int,
    side: int,
    limits: DecodeSettings,
    mode: Literal["accurate", "keyframes"] = "accurate",
    random: np.random.Generator | None = None,
) -> Pixels:
    """Return the frames of a video file as `decode_media` gives them, without its sound.

    Args:
        path: The file.
        count: Segments that it is cut into.
        side: Of the square frames, in pixels.
        limits: What a file may be.
        mode: As ``features.video.decode``.
        random: Takes a frame at a random time of each segment instead of its centre frame.

    Returns:
        uint8 RGB ``(n, side, side, 3)``, n from 1 to `count`.

    Raises:
        MediaError: The file is missing, of another type, truncated, broken or too large.
    """
    from extractors.media.sniff import check_type
    from extractors.media.video import FrameScaler, choose_frames

    file_type = check_type(path, "video")
    index, _ = _scan(path, file_type, limits, None)
    scale = FrameScaler(lambda width, height: (side, side))
    frames = _chosen_frames(
        path, file_type, index, limits, lambda index: choose_frames(index, count, mode, random)
    )
    return np.stack([scale(frame) for frame, _ in frames])


def _check_whole(got: int, expected: int, file_type: FileType) -> None:
    if not got or got < _ENOUGH * expected:
        raise MediaError(f"broken {file_type.name}: {got} of {expected} frames can be read")


def _sound_rows(waveform: Waveform, sound: SoundInput, allocate: Allocate) -> SoundRows:
    from extractors.media.sound import sound_rows

    return _copy(sound_rows(waveform, sound), allocate)


def _copy(array: npt.NDArray[Any], allocate: Allocate) -> npt.NDArray[Any]:
    out = allocate(array.shape, array.dtype)
    out[...] = array
    return out
