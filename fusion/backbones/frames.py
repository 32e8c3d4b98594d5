"""Features of videos' frames on disk: what the attention LSTM learns from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from lightning_fabric import Fabric

from common.errors import ConfigError, FeatureError, MediaError
from common.files import new_file
from common.progress import progress_bar
from config.settings import VideoSettings
from config.train import BackboneTrainSettings
from extractors.media.decode import read_frames
from extractors.models.visual import VideoExtractor
from fusion.backbones.media import MediaItems, MediaPost, all_media


class FrameStore:
    """One file for each video, by the fingerprint of its features and the video's own state."""

    def __init__(self, folder: Path, fingerprint: str, dim: int) -> None:
        self._folder = folder / fingerprint[:16]
        self.dim = dim

    def has(self, path: Path) -> bool:
        return self._place(path).exists()

    def write(self, path: Path, features: npt.NDArray[np.float16]) -> None:
        """Keep the features ``(frames, dim)`` of a video; the file is whole or not there."""
        place = self._place(path)
        try:
            with new_file(place, sync=False, shared=True) as file:
                np.save(file, features, allow_pickle=False)
        except OSError as error:
            raise ConfigError(f"{place}: cannot be written: {error}") from error

    def read(self, path: Path) -> npt.NDArray[np.float16]:
        """Return the features ``(frames, dim)`` of a video."""
        place = self._place(path)
        try:
            found: npt.NDArray[np.float16] = np.load(place, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise FeatureError(f"{place}: cannot be read; delete it and go on with --resume") from (
                error
            )
        return found

    def _place(self, path: Path) -> Path:
        try:
            facts = path.stat()
            version = f" {facts.st_size} {facts.st_mtime_ns}".encode()
        except OSError:
            version = b""  # its reader says what is wrong
        name = hashlib.sha256(os.fsencode(path.absolute()) + version).hexdigest()[:40]
        return self._folder / name[:2] / f"{name}.npy"


def extract_frames(
    settings: BackboneTrainSettings,
    reader: MediaItems,
    weights: Path,
    posts: Sequence[MediaPost],
    fabric: Fabric,
) -> FrameStore:
    """Run the trained frame model over all videos; those that are done already are kept.

    Raises:
        ConfigError: The model cannot be loaded, or a file cannot be written.
        MediaError: A video cannot be decoded.
    """
    device = str(fabric.device) if fabric.device.type == "cuda" else "cpu"
    video = VideoSettings(
        arch=settings.backbone.arch,
        weights=str(weights),
        image_size=settings.backbone.image_size,
        frames=settings.tsn.frames,
        short_clips="repeat",
    )
    extractor = VideoExtractor(video, device)
    extractor.load()
    try:
        store = FrameStore(
            settings.trainer.save_dir / "frames", extractor.fingerprint, extractor.dim
        )
        todo = [(post_id, path) for post_id, path in all_media(posts) if not store.has(path)]
        mine = todo[fabric.global_rank :: fabric.world_size]
        shown = settings.trainer.progress and fabric.is_global_zero
        with progress_bar("frames", len(mine), enabled=shown) as bar:
            for post_id, path in mine:
                try:
                    pixels = read_frames(
                        path,
                        count=video.frames,
                        side=video.image_size,
                        limits=reader.limits,
                        mode=video.decode,
                    )
                except MediaError as error:
                    raise MediaError(f"post {post_id}: {path}: {error}") from error
                [features] = extractor.forward([extractor.preprocess(pixels)])
                store.write(path, features)
                bar.advance()
    finally:
        extractor.close()
    return store
