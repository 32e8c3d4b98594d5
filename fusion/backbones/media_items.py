"""Media files as the training of backbones reads them: what the extractors would see of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from config.settings import DecodeSettings, VideoSettings


@dataclass(frozen=True)
class MediaItems:
    """A `fusion.backbones.media.MediaReader` over files on this machine.

    Attributes:
        limits: What a file may be.
    """

    limits: DecodeSettings = field(default_factory=DecodeSettings)

    def picture(self, path: Path, size: int) -> npt.NDArray[np.uint8]:
        """A picture as the image extractor sees it, uint8 RGB ``(size, size, 3)``.

        Raises:
            MediaError: The file cannot be decoded.
        """
        from extractors.media.pictures import read_pictures, squash

        pixels = next(iter(read_pictures(path, max_pixels=self.limits.max_pixels, max_frames=1)))
        return squash(pixels, size, size)

    def frames(
        self, path: Path, size: int, count: int, random: np.random.Generator | None
    ) -> npt.NDArray[np.uint8]:
        """A frame of each of ``count`` segments of a video, uint8 RGB ``(count, size, size, 3)``.

        The centre one, or with ``random`` one at a random time; those of a short clip repeat.

        Raises:
            MediaError: The file cannot be decoded.
        """
        from extractors.media.decode import read_frames
        from extractors.models.visual import segments

        found = read_frames(path, count=count, side=size, limits=self.limits, random=random)
        return found[segments(len(found), count)]

    @contextmanager
    def extractor(
        self, arch: str, weights: Path, *, size: int, frames: int, device: str
    ) -> Iterator[FrameExtractor]:
        """The video extractor with trained weights, loaded inside the block.

        Raises:
            ConfigError: It cannot be loaded.
        """
        settings = VideoSettings(
            arch=arch,
            weights=str(weights),
            image_size=size,
            frames=frames,
            short_clips="repeat",
        )
        found = FrameExtractor(settings, self.limits, device)
        try:
            yield found
        finally:
            found.close()


class FrameExtractor:
    """Features of a video's frames, of the very extractor that serves them.

    Attributes:
        fingerprint: Of the features.
        dim: Length of a frame's.
    """

    def __init__(self, settings: VideoSettings, limits: DecodeSettings, device: str) -> None:
        from extractors.models.visual import VideoExtractor

        self._settings, self._limits = settings, limits
        self._extractor: Any = VideoExtractor(settings, device)
        self._extractor.load()
        self.fingerprint: str = self._extractor.fingerprint
        self.dim: int = self._extractor.dim

    def __call__(self, path: Path) -> npt.NDArray[np.float16]:
        """Features ``(frames, dim)`` of a video file.

        Raises:
            MediaError: The file cannot be decoded.
            FeatureError: The model gave values that are not finite.
        """
        from extractors.media.decode import read_frames

        pixels = read_frames(
            path,
            count=self._settings.frames,
            side=self._settings.image_size,
            limits=self._limits,
            mode=self._settings.decode,
        )
        [features] = self._extractor.forward([self._extractor.preprocess(pixels)])
        found: npt.NDArray[np.float16] = features
        return found

    def close(self) -> None:
        """Free the model."""
        self._extractor.close()
