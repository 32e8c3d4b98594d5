"""Makers of small real media files for tests: encoded by OpenCV, Pillow, soundfile and PyAV.

Pixels are uint8 RGB ``(height, width, 3)`` unless said otherwise; sound is float32 in [-1, 1],
``(samples,)`` for mono and ``(samples, channels)`` for more.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import soundfile
from PIL import Image

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Sound = np.ndarray[Any, np.dtype[np.float32]]

RED, GREEN, BLUE = (220, 30, 30), (30, 200, 40), (30, 40, 220)
WHITE, BLACK, GREY = (255, 255, 255), (0, 0, 0), (128, 128, 128)


def solid(width: int, height: int, colour: Sequence[int] = RED) -> Pixels:
    return np.full((height, width, len(colour)), colour, np.uint8)


def halves(
    width: int, height: int, left: Sequence[int] = RED, right: Sequence[int] = BLUE
) -> Pixels:
    """Left half one colour, right half another: shows rotation and mirroring."""
    pixels = solid(width, height, left)
    pixels[:, width // 2 :] = right
    return pixels


def quadrants(width: int, height: int) -> Pixels:
    """Red, green over blue, white: every one of the eight orientations looks different."""
    pixels = halves(width, height, RED, GREEN)
    pixels[height // 2 :, : width // 2] = BLUE
    pixels[height // 2 :, width // 2 :] = WHITE
    return pixels


def grey_steps(count: int, width: int = 64, height: int = 48, lowest: int = 20) -> list[Pixels]:
    """`count` frames of one grey each, evenly from `lowest` to 235: the grey tells which frame."""
    levels = np.linspace(lowest, 235, count).round().astype(int)
    return [solid(width, height, (v, v, v)) for v in levels.tolist()]


def noise(width: int, height: int, seed: int = 0) -> Pixels:
    """Random pixels: files of it are large, so that cutting them cuts the picture."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def tone(
    frequency_hz: float = 440, duration_s: float = 1, rate_hz: int = 16000, level: float = 0.5
) -> Sound:
    """A mono sine, float32 ``(samples,)``."""
    times = np.arange(round(duration_s * rate_hz)) / rate_hz
    return (level * np.sin(2 * np.pi * frequency_hz * times)).astype(np.float32)


def _bgr(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 2:
        return pixels
    code = cv2.COLOR_RGBA2BGRA if pixels.shape[2] == 4 else cv2.COLOR_RGB2BGR
    return cv2.cvtColor(pixels, code)


def _write(path: Path, extension: str, pixels: np.ndarray, options: Sequence[int] = ()) -> Path:
    done, data = cv2.imencode(extension, _bgr(pixels), list(options))
    assert done
    path.write_bytes(data.tobytes())
    return path


def write_jpeg(
    path: Path, pixels: np.ndarray, *, quality: int = 95, orientation: int | None = None
) -> Path:
    """A JPEG, grey ``(height, width)`` or RGB; `orientation` 1 to 8 goes into its EXIF."""
    _write(path, ".jpg", pixels, (cv2.IMWRITE_JPEG_QUALITY, quality))
    if orientation is not None:
        tiff = b"MM\x00\x2a\x00\x00\x00\x08\x00\x01" + struct.pack(
            ">HHIHHI", 0x0112, 3, 1, orientation, 0, 0
        )
        body = b"Exif\x00\x00" + tiff
        segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
        data = path.read_bytes()
        path.write_bytes(data[:2] + segment + data[2:])
    return path


def write_cmyk_jpeg(path: Path, pixels: Pixels) -> Path:
    """A four-channel JPEG of RGB pixels, as Adobe programs write them (inverted, with APP14)."""
    Image.fromarray(pixels).convert("CMYK").save(path, format="JPEG", quality=95)
    return path


def write_png(path: Path, pixels: np.ndarray) -> Path:
    """A PNG: uint8 or uint16; grey ``(height, width)``, RGB or RGBA."""
    return _write(path, ".png", pixels)


def write_webp(path: Path, pixels: Pixels) -> Path:
    return _write(path, ".webp", pixels)


def write_animation(path: Path, frames: Sequence[np.ndarray], *, frame_ms: int = 100) -> Path:
    """An animated GIF, WebP or PNG, by the path's extension (.gif, .webp, .png)."""
    kind = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}[path.suffix]
    first, *rest = [Image.fromarray(frame) for frame in frames]
    extra = {"lossless": True} if kind == "WEBP" else {}
    first.save(
        path, format=kind, save_all=True, append_images=rest, duration=frame_ms, loop=0, **extra
    )
    return path


def write_wav(path: Path, sound: Sound, rate_hz: int = 16000, *, subtype: str = "PCM_16") -> Path:
    soundfile.write(str(path), sound, rate_hz, format="WAV", subtype=subtype)
    return path


def write_ogg(path: Path, sound: Sound, rate_hz: int = 16000) -> Path:
    soundfile.write(str(path), sound, rate_hz, format="OGG", subtype="VORBIS")
    return path


def write_flac(path: Path, sound: Sound, rate_hz: int = 16000) -> Path:
    soundfile.write(str(path), sound, rate_hz, format="FLAC")
    return path


def write_aac(
    path: Path,
    sound: Sound,
    rate_hz: int = 44100,
    *,
    codec: str = "aac",
    options: dict[str, str] | None = None,
    encoder: dict[str, str] | None = None,
) -> Path:
    """Sound by PyAV in the container that the extension names (.m4a, .mp3 with codec mp3, …)."""
    with av.open(str(path), "w", options=options or {}) as container:
        track = _Track(container, codec, rate_hz, sound, encoder)
        track.write(None)
        track.close()
    return path


def write_mp3(
    path: Path, sound: Sound, rate_hz: int = 44100, *, cover: Pixels | None = None
) -> Path:
    """An MP3, with cover art (an attached picture) when `cover` is given."""
    with av.open(str(path), "w", format="mp3") as container:
        track = _Track(container, "libmp3lame", rate_hz, sound)
        if cover is not None:
            stream: Any = container.add_stream("mjpeg", rate=1)
            stream.width, stream.height, stream.pix_fmt = cover.shape[1], cover.shape[0], "yuvj420p"
            stream.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(cover, format="rgb24").reformat(format="yuvj420p")
            frame.pts = 0
            packets = [*stream.encode(frame), *stream.encode(None)]
            container.mux(packets)
        track.write(None)
        track.close()
    return path


class _Track:
    """Encodes one sound into one stream, as far as it is asked to."""

    def __init__(
        self,
        container: Any,
        codec: str,
        rate_hz: int,
        sound: Sound,
        options: dict[str, str] | None = None,
    ) -> None:
        self._container = container
        layout = {1: "mono", 2: "stereo", 6: "5.1"}[1 if sound.ndim == 1 else sound.shape[1]]
        self._stream: Any = container.add_stream(codec, rate=rate_hz, options=options or {})
        self._stream.layout = layout
        self._resampler = av.AudioResampler(self._stream.format, layout, rate_hz)
        self._layout, self._rate_hz = layout, rate_hz
        self._rows = sound.reshape(len(sound), -1)  # (samples, channels)
        self._position = 0

    def write(self, until_s: float | None) -> None:
        """Encode up to a time; None encodes all that is left."""
        end = (
            len(self._rows)
            if until_s is None
            else min(len(self._rows), int(until_s * self._rate_hz))
        )
        while self._position < end:
            rows = self._rows[self._position : min(end, self._position + 1024)]
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(rows.T, np.float32), format="fltp", layout=self._layout
            )
            frame.sample_rate, frame.pts = self._rate_hz, self._position
            frame.time_base = Fraction(1, self._rate_hz)
            for converted in self._resampler.resample(frame):
                self._container.mux(self._stream.encode(converted))
            self._position += len(rows)

    def close(self) -> None:
        for converted in self._resampler.resample(None):
            self._container.mux(self._stream.encode(converted))
        self._container.mux(self._stream.encode(None))


def write_video(
    path: Path,
    frames: Iterable[Pixels],
    rate_hz: int = 25,
    *,
    audio: Sound | Sequence[Sound] | None = None,
    audio_rate_hz: int = 44100,
    codec: str = "libx264",
    audio_codec: str = "aac",
    times_s: Sequence[float] | None = None,
    rotation: int = 0,
    gop: int = 12,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
) -> Path:
    """A video: H.264 + AAC in the container that the extension names, unless told otherwise.

    Args:
        path: ``.mp4``, ``.mov``, ``.mkv``, ``.webm``, ``.avi``, ``.ts``, ``.flv`` …
        frames: RGB frames of one even size.
        rate_hz: Frames per second; ignored where `times_s` is given.
        audio: Sound track, or several.
        audio_rate_hz: Its sample rate.
        codec: Video encoder (libx264, libx265, libvpx, mpeg4 …).
        audio_codec: Sound encoder (aac, libopus, libmp3lame …).
        times_s: Presentation time of each frame: variable frame rate.
        rotation: Degrees clockwise that a player must turn the frames (90, 180, 270), as phones
            write it; MP4 and MOV only.
        gop: Frames from key frame to key frame.
        options: Encoder options.
        container_options: Muxer options.
        pix_fmt: Pixel format of the encoder.
    """
    encoder = dict(options or {})
    if codec in ("libx264", "libx265"):
        encoder.setdefault("preset", "ultrafast")
    if codec == "libx265":
        encoder.setdefault("x265-params", "log-level=none:pools=1:frame-threads=1")
    sounds = [] if audio is None else [audio] if isinstance(audio, np.ndarray) else list(audio)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate_hz, options=encoder)
        stream.pix_fmt, stream.gop_size = pix_fmt, gop
        stream.codec_context.thread_count = 1
        if times_s is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        tracks = [_Track(container, audio_codec, audio_rate_hz, sound) for sound in sounds]
        for frame, time_s in _timed(frames, rate_hz, times_s):
            if not stream.codec_context.is_open:
                stream.width, stream.height = frame.width, frame.height
            for track in tracks:
                track.write(time_s)
            container.mux(stream.encode(frame))
        for track in tracks:
            track.write(None)
            track.close()
        container.mux(stream.encode(None))
    if rotation:
        _rotate(path, rotation)
    return path


def _timed(
    frames: Iterable[Pixels], rate_hz: int, times_s: Sequence[float] | None
) -> Iterator[tuple[av.VideoFrame, float]]:
    for index, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        if times_s is None:
            frame.pts, frame.time_base = index, Fraction(1, rate_hz)
            yield frame, index / rate_hz
        else:
            frame.pts, frame.time_base = round(times_s[index] * 1000), Fraction(1, 1000)
            yield frame, times_s[index]


def _rotate(path: Path, degrees: int) -> None:
    """Put a rotation into the display matrix of the first track's header (``tkhd``)."""
    one = 0x00010000
    matrix = {
        90: (0, one, 0, -one, 0, 0, 0, 0, 0x40000000),
        180: (-one, 0, 0, 0, -one, 0, 0, 0, 0x40000000),
        270: (0, -one, 0, one, 0, 0, 0, 0, 0x40000000),
    }[degrees]
    data = bytearray(path.read_bytes())
    body = data.index(b"tkhd") + 4
    offset = body + (40 if data[body] == 0 else 52)
    data[offset : offset + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(bytes(data))


def truncate(source: Path, target: Path, keep: float) -> Path:
    """The first part of a file: `keep` of its bytes, 0 to 1."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * keep)])
    return target


def write_random(path: Path, size_bytes: int = 4096, seed: int = 0) -> Path:
    """Bytes that are no media file."""
    path.write_bytes(np.random.default_rng(seed).integers(0, 256, size_bytes, np.uint8).tobytes())
    return path
