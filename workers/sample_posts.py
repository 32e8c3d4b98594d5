"""Posts of made-up media, as heavy as ordinary ones: for measuring, not for training.

A clip of 20 s at 720p with sound and a key frame every 2 s, JPEGs of 1280x960 of which every other
one has a line of words, sounds of 20 s, and texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt
import soundfile

from common.post import Media, MediaKind, Post

Pixels = npt.NDArray[np.uint8]

SECONDS = 20
_WIDTH, _HEIGHT, _RATE_HZ, _KEY_S = 1280, 720, 25, 2
_PAN = 400
"""Pixels that a scene is wider than its frames: the camera wanders over it."""
_SOUND_HZ = 44_100
_AAC_FRAME = 1024
_PICTURES = 4
"""Different ones; more would only fill the disk, since no features are kept between posts."""
_WORDS = ("sun", "rain", "goal", "song", "dog", "cake", "train", "vote", "market", "river")


@dataclass(frozen=True, slots=True)
class Mix:
    """Media files of an average post, besides its text."""

    videos: int = 1
    images: int = 2
    audios: int = 0


@dataclass(frozen=True, slots=True)
class SampleFiles:
    """Made files, by kind."""

    files: dict[MediaKind, list[Path]]

    def post(self, mix: Mix, number: int) -> list[Post]:
        """Return one average post as posts of one file each, the first with the text.

        Smaller pieces end more evenly: a measurement waits less for the last one.
        """
        counts: dict[MediaKind, int] = {
            "video": mix.videos,
            "image": mix.images,
            "audio": mix.audios,
        }
        media: list[Media | None] = []
        for kind, count in counts.items():
            files = self.files.get(kind, [])
            media += [
                Media(kind, str(files[(number * count + i) % len(files)])) for i in range(count)
            ]
        chance = np.random.default_rng(number)
        text = f"post {number} about " + " ".join(chance.choice(_WORDS, 20))
        return [
            Post(f"{number}-{i}", "" if i else text, (each,) if each else ())
            for i, each in enumerate(media or [None])
        ]


def make_samples(folder: Path, mix: Mix) -> SampleFiles:
    """Make the files that a mix needs, in some seconds."""
    files: dict[MediaKind, list[Path]] = {}
    if mix.videos:
        files["video"] = [folder / "clip.mp4"]
        write_clip(files["video"][0])
    if mix.images:
        files["image"] = [folder / f"picture{i}.jpg" for i in range(_PICTURES)]
        for i, path in enumerate(files["image"]):
            write_picture(path, i, words=i % 2 == 0)
    if mix.audios:
        files["audio"] = [folder / "sound.wav"]
        soundfile.write(str(files["audio"][0]), tone(), _SOUND_HZ)
    return SampleFiles(files)


def texture(seed: int, width: int, height: int) -> Pixels:
    """Return a smooth random RGB picture, as hard to decode as a photo."""
    chance = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for step in (4, 16, 64):
        coarse = chance.random((height // step + 1, width // step + 1, 3), np.float32)
        total += step * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(255 * (total - total.min()) / np.ptp(total), np.uint8)


def tone() -> npt.NDArray[np.float32]:
    """Return a tone in noise ``(samples,)``."""
    second = np.arange(_SOUND_HZ * SECONDS) / _SOUND_HZ
    noise = np.random.default_rng(0).standard_normal(len(second))
    return (0.3 * np.sin(2 * np.pi * 220 * second) + 0.1 * noise).astype(np.float32)


def write_picture(path: Path, seed: int, *, words: bool) -> None:
    """Write a JPEG of 1280x960 pixels."""
    picture = texture(seed, 1280, 960)
    if words:
        cv2.putText(picture, f"summer sale {seed}%", (80, 500), 0, 4, (255, 255, 255), 8)
    if not cv2.imwrite(str(path), picture, [cv2.IMWRITE_JPEG_QUALITY, 88]):
        raise OSError(f"{path}: cannot be written")


def write_clip(path: Path) -> None:
    """Write an MP4 of H.264 and AAC."""
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "sc_threshold": "0"}
        stream: Any = container.add_stream("libx264", rate=_RATE_HZ, options=options)
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        stream.gop_size = _KEY_S * _RATE_HZ
        track: Any = container.add_stream("aac", rate=_SOUND_HZ, layout="mono")
        for planes in _frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode(None))
        wave = tone()
        for start in range(0, len(wave), _AAC_FRAME):
            chunk = np.ascontiguousarray(wave[None, start : start + _AAC_FRAME])
            samples = av.AudioFrame.from_ndarray(chunk, format="fltp", layout="mono")
            samples.sample_rate, samples.pts = _SOUND_HZ, start
            samples.time_base = Fraction(1, _SOUND_HZ)
            container.mux(track.encode(samples))
        container.mux(track.encode(None))


def _frames() -> Iterator[Pixels]:
    """Yield frames as planes of YUV ``(height * 3 / 2, width)``, cut out of a scene."""
    width, height = _WIDTH + _PAN, _HEIGHT + _PAN // 2
    for i in range(_RATE_HZ * SECONDS):
        if i % (5 * _RATE_HZ) == 0:
            scene = cv2.cvtColor(texture(i, width, height), cv2.COLOR_RGB2YUV_I420)
            # (height * 3 / 2, width) -> one plane of full size, two of half
            bright = scene[:height]
            blue, red = scene[height:].reshape(2, height // 2, width // 2)
        x, y = int(100 + 90 * np.sin(i / 40)), int(50 + 45 * np.cos(i / 30))  # in pixels of colour
        parts = [
            bright[2 * y : 2 * y + _HEIGHT, 2 * x : 2 * x + _WIDTH],
            blue[y : y + _HEIGHT // 2, x : x + _WIDTH // 2],
            red[y : y + _HEIGHT // 2, x : x + _WIDTH // 2],
        ]
        flat = np.concatenate([part.ravel() for part in parts])
        yield np.asarray(flat.reshape(_HEIGHT * 3 // 2, _WIDTH), np.uint8)
