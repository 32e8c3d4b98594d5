"""Sound media files, one of each format that is read: what mutations start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import cv2
import numpy as np

from common.post import MediaKind
from tests.support import media


@dataclass(frozen=True)
class Seed:
    """A sound file.

    Attributes:
        name: Its format, which is also its extension.
        kind: What a post would use it as.
    """

    name: str
    kind: MediaKind
    content: bytes


def make_seeds(folder: Path) -> list[Seed]:
    """Encode them all; the folder holds scratch files afterwards."""
    makers: tuple[tuple[MediaKind, Mapping[str, Callable[[Path], object]]], ...] = (
        ("image", _PICTURES),
        ("video", _VIDEOS),
        ("audio", _SOUNDS),
    )
    seeds: list[Seed] = []
    for kind, some in makers:
        for name, make in some.items():
            path = folder / f"seed-{name}"
            make(path)
            seeds.append(Seed(name, kind, path.read_bytes()))
    return seeds


def _picture(path: Path, **options: int) -> None:
    media.write_jpeg(path, media.noise(96, 64), quality=80, **options)


def _opencv(path: Path, pixels: np.ndarray) -> None:
    if not cv2.imwrite(str(path), pixels):
        raise OSError(f"{path.name} cannot be encoded")


def _video(path: Path, codec: str = "libx264", *, sound: str = "", frames: int = 20) -> None:
    media.write_video(
        path,
        media.grey_steps(frames, 64, 48),
        10,
        audio=media.tone(duration_s=frames / 10, rate_hz=44100) if sound else None,
        codec=codec,
        audio_codec=sound or "aac",
        audio_rate_hz=48000 if sound == "libopus" else 44100,
        gop=5,
        pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p",
    )


_PICTURES: Mapping[str, Callable[[Path], object]] = MappingProxyType(
    {
        "turned.jpg": lambda path: _picture(path, orientation=6),
        "cmyk.jpg": lambda path: media.write_cmyk_jpeg(path, media.quadrants(64, 48)),
        "plain.png": lambda path: media.write_png(path, media.noise(64, 48)),
        "deep.png": lambda path: _opencv(path, media.noise(48, 32).astype(np.uint16) * 257),
        "alpha.png": lambda path: media.write_png(
            path, np.dstack([media.noise(40, 30)] * 2)[..., :4]
        ),
        "moving.png": lambda path: media.write_animation(path, media.grey_steps(4)),
        "still.gif": lambda path: media.write_animation(path, [media.quadrants(64, 48)]),
        "moving.gif": lambda path: media.write_animation(path, media.grey_steps(6)),
        "still.webp": lambda path: media.write_webp(path, media.noise(64, 48)),
        "moving.webp": lambda path: media.write_animation(path, media.grey_steps(4)),
        "plain.bmp": lambda path: _opencv(path, media.noise(40, 30)),
        "plain.tiff": lambda path: _opencv(path, media.noise(40, 30)),
        "float.tiff": lambda path: _opencv(path, media.noise(24, 16).astype(np.float32) / 255),
        "plain.avif": lambda path: _opencv(path, media.noise(48, 48)),
    }
)

_VIDEOS: Mapping[str, Callable[[Path], object]] = MappingProxyType(
    {
        "h264.mp4": lambda path: _video(path, sound="aac"),
        "hevc.mp4": lambda path: _video(path, "libx265"),
        "turned.mov": lambda path: media.write_video(path, media.grey_steps(12), rotation=90),
        "h264.mkv": lambda path: _video(path, sound="libmp3lame"),
        "vp8.webm": lambda path: _video(path, "libvpx", sound="libopus"),
        "vp9.webm": lambda path: _video(path, "libvpx-vp9", frames=8),
        "mpeg4.avi": lambda path: _video(path, "mpeg4", sound="libmp3lame"),
        "mjpeg.avi": lambda path: _video(path, "mjpeg"),
        "h264.ts": lambda path: _video(path, sound="aac"),
        "h263.flv": lambda path: _video(path, "flv", sound="libmp3lame"),
        "mpeg2.mpg": lambda path: _video(path, "mpeg2video", sound="mp2"),
        "wmv2.wmv": lambda path: _video(path, "wmv2", sound="libmp3lame"),
        "film.gif": lambda path: media.write_animation(path, media.grey_steps(12)),
    }
)

_SOUNDS: Mapping[str, Callable[[Path], object]] = MappingProxyType(
    {
        "plain.wav": lambda path: media.write_wav(path, media.tone(duration_s=1.5)),
        "float.wav": lambda path: media.write_wav(path, media.tone(), subtype="FLOAT"),
        "many.wav": lambda path: media.write_wav(
            path, np.tile(media.tone(duration_s=1.0)[:, None], (1, 17))
        ),
        "plain.ogg": lambda path: media.write_ogg(path, media.tone(duration_s=1.2)),
        "plain.flac": lambda path: media.write_flac(path, media.tone(duration_s=1.2)),
        "plain.mp3": lambda path: media.write_mp3(path, media.tone(rate_hz=44100)),
        "cover.mp3": lambda path: media.write_mp3(
            path, media.tone(rate_hz=44100), cover=media.quadrants(64, 64)
        ),
        "plain.m4a": lambda path: media.write_aac(path, media.tone(rate_hz=44100)),
        "plain.aac": lambda path: media.write_aac(path, media.tone(rate_hz=44100)),
        "plain.aiff": lambda path: media.write_aac(
            path, media.tone(rate_hz=44100), codec="pcm_s16be"
        ),
        "plain.caf": lambda path: media.write_aac(
            path, media.tone(rate_hz=44100), codec="pcm_s16be"
        ),
        "plain.amr": lambda path: media.write_aac(
            path, media.tone(rate_hz=8000), 8000, codec="libopencore_amrnb"
        ),
        "plain.wma": lambda path: media.write_aac(
            path, media.tone(rate_hz=44100), codec="libmp3lame"
        ),
    }
)
