"""Clips as the benches decode them: 20 s of a moving scene with sound, 12 kinds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tests.support import media
from workers.sample_posts import texture

SECONDS = 20


@dataclass(frozen=True)
class Clip:
    """One kind of clip; `key_s` is the time from key frame to key frame."""

    suffix: str = ".mp4"
    codec: str = "libx264"
    width: int = 1280
    height: int = 720
    rate_hz: int = 25
    key_s: float = 2
    sound: str = "aac"
    channels: int = 2
    options: dict[str, str] = field(default_factory=lambda: {"preset": "veryfast"})


_NONE: dict[str, str] = {}
CLIPS = {
    "720p, key 2 s": Clip(channels=1),
    "720p, key 5 s": Clip(key_s=5),
    "720p, key 10 s": Clip(key_s=10),
    "720p, one key": Clip(key_s=SECONDS),
    "720p, 60 Hz": Clip(rate_hz=60),
    "upright phone, key 1 s": Clip(".mov", width=720, height=1280, rate_hz=30, key_s=1),
    "1080p, key 2 s": Clip(width=1920, height=1080),
    "360p, key 2 s": Clip(width=640, height=360),
    "broadcast TS": Clip(".ts", key_s=1),
    "HEVC": Clip(codec="libx265", options={"preset": "ultrafast"}),
    "VP9 WebM": Clip(
        ".webm", "libvpx-vp9", sound="libopus", options={"deadline": "realtime", "cpu-used": "8"}
    ),
    "MPEG-4 AVI": Clip(".avi", "mpeg4", sound="libmp3lame", options=_NONE),
}


def moving(clip: Clip) -> Iterator[Any]:
    """Yield the frames of a clip: a camera that wanders over a scene, a new one every 5 s."""
    width, height = clip.width, clip.height
    for i in range(clip.rate_hz * SECONDS):
        second = i / clip.rate_hz
        if second % 5 == 0:
            scene = texture(i, width + 400, height + 200)
        x, y = int(200 + 180 * np.sin(second / 1.6)), int(100 + 90 * np.cos(second / 1.2))
        frame = scene[y : y + height, x : x + width].copy()
        cv2.circle(frame, (int(width * second / 4) % width, height // 2), 60, (0, 0, 255), -1)
        yield frame


def stereo() -> Any:
    """Return the sound of the clips: a tone in noise, float32 ``(samples, 2)`` at 44.1 kHz."""
    chance = np.random.default_rng(0)
    second = np.arange(44_100 * SECONDS) / 44_100
    tone = 0.3 * np.sin(2 * np.pi * 220 * second) + 0.1 * chance.standard_normal(len(second))
    return np.stack([tone, tone], 1).astype(np.float32)


def write_clip(path: Path, clip: Clip) -> None:
    """Make a clip; a file of its name is whole."""
    part = path.with_name(f"part{clip.suffix}")
    media.write_video(
        part,
        moving(clip),
        clip.rate_hz,
        audio=stereo()[:, : clip.channels],
        audio_rate_hz=48_000 if clip.sound == "libopus" else 44_100,
        codec=clip.codec,
        audio_codec=clip.sound,
        gop=int(clip.key_s * clip.rate_hz),
        options={**clip.options, **({"sc_threshold": "0"} if clip.codec == "libx264" else {})},
    )
    part.rename(path)
