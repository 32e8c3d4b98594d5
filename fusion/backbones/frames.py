"""Features of videos' frames on disk: what the attention LSTM learns from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning_fabric import Fabric

from common.errors import ConfigError, FeatureError, MediaError
from common.files import new_file
from common.progress import progress_bar
from config.train import BackboneTrainSettings
from fusion.backbones.media import (
    Chance,
    FrameExtractor,
    MediaDataset,
    MediaItems,
    MediaPost,
    all_media,
)


class FrameStore:
    """One file for each video, by the fingerprint of its features and the video's own state."""

    def __init__(self, folder: Path, fingerprint: str, dim: int) -> None:
        self._folder = folder / fingerprint[:16]
        self.dim = dim

    def has(self, path: Path) -> bool:
        """Return whether a video's features are stored."""
        return self._place(path).exists()

    def write(self, path: Path, features: npt.NDArray[np.float16]) -> None:
        """Keep the features ``(frames, dim)`` of a video; the file is whole or not there.

        Raises:
            ConfigError: The file cannot be written.
        """
        place = self._place(path)
        try:
            with new_file(place, sync=False, shared=True) as file:
                np.save(file, features, allow_pickle=False)
        except OSError as error:
            raise ConfigError(f"{place}: cannot be written: {error}") from error

    def read(self, path: Path) -> npt.NDArray[np.float16]:
        """Return the features ``(frames, dim)`` of a video.

        Raises:
            FeatureError: They are not there, or broken.
        """
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


class FrameDataset(MediaDataset):
    """Posts with the features of their videos' frames, float16 ``(n, frames, dim)``."""

    def __init__(
        self,
        posts: Sequence[MediaPost],
        classes: int,
        store: FrameStore,
        *,
        max_items: int,
        seed: int | None = None,
    ) -> None:
        super().__init__(posts, classes, max_items=max_items, seed=seed)
        self._store = store

    def item(self, path: Path, chance: Chance | None) -> npt.NDArray[Any]:
        return self._store.read(path)


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
    backbone, options = settings.backbone, settings.tsn
    opened = reader.extractor(
        backbone.arch,
        weights,
        size=backbone.image_size,
        frames=options.frames,
        device=_device(fabric),
    )
    with opened as extract:
        folder = settings.trainer.save_dir / "frames"
        store = FrameStore(folder, extract.fingerprint, extract.dim)
        todo = [found for found in all_media(posts) if not store.has(found[1])]
        mine = todo[fabric.global_rank :: fabric.world_size]
        shown = settings.trainer.progress and fabric.is_global_zero
        with progress_bar("frames", len(mine), enabled=shown) as bar:
            for post_id, path in mine:
                store.write(path, _features(extract, post_id, path))
                bar.advance()
    return store


def _features(extract: FrameExtractor, post_id: str, path: Path) -> npt.NDArray[np.float16]:
    try:
        return extract(path)
    except MediaError as error:
        raise MediaError(f"post {post_id}: {path}: {error}") from error


def _device(fabric: Fabric) -> str:
    device = fabric.device
    return "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"
