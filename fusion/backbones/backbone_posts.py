"""Posts with pictures or videos out of data files, and who reads these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from lightning_fabric import Fabric

from common.errors import ConfigError, MediaError
from common.progress import notice, progress_bar
from config.backbone_train import BackboneTrainSettings
from config.labels import LabelMap
from fusion.data.data_file import entries, record_of
from fusion.train.distributed import agree, gathered
from fusion.train.skipping import Skipped

MediaName: TypeAlias = Literal["images", "videos"]
Pixels: TypeAlias = npt.NDArray[np.uint8]
Chance: TypeAlias = np.random.Generator


class FrameFeatures(Protocol):
    """A trained frame model, as the extractor runs it.

    Attributes:
        fingerprint: Of the features.
        dim: Length of a frame's.
    """

    fingerprint: str
    dim: int

    def __call__(self, path: Path) -> npt.NDArray[np.float16]:
        """Features ``(frames, dim)`` of a video file.

        Raises:
            MediaError: The file cannot be decoded.
        """


class MediaReader(Protocol):
    """Where pixels come from: this package decodes nothing. It pickles, for loader processes."""

    def picture(self, path: Path, size: int) -> Pixels:
        """A picture as the image extractor sees it, uint8 RGB ``(size, size, 3)``.

        Raises:
            MediaError: The file cannot be decoded.
        """

    def frames(self, path: Path, size: int, count: int, random: Chance | None) -> Pixels:
        """A frame of each of ``count`` segments of a video, uint8 RGB ``(count, size, size, 3)``.

        The centre one, or with ``random`` one at a random time; those of a short clip repeat.

        Raises:
            MediaError: The file cannot be decoded.
        """

    def extractor(
        self, arch: str, weights: Path, *, size: int, frames: int, device: str
    ) -> AbstractContextManager[FrameFeatures]:
        """The video extractor with trained weights, loaded inside the block.

        Raises:
            ConfigError: It cannot be loaded.
        """


@dataclass(frozen=True)
class MediaPost:
    """One post.

    Attributes:
        paths: Its pictures or videos; at least one.
        labels: Indices of its true tags.
    """

    post_id: str
    paths: tuple[Path, ...]
    labels: tuple[int, ...]


def read_posts(path: Path, labels: LabelMap, kind: MediaName) -> tuple[MediaPost, ...]:
    """The posts of a data file that have media of a kind; the others are left out.

    Raises:
        ConfigError: The file is missing, not as it should be, names an unknown label, or has no
            media of the kind.
    """
    found: list[MediaPost] = []
    for entry in entries(path):
        where = f"{path}: entry {entry.number}"
        record = record_of(entry.value, where, path)
        listed = entry.value.get(kind) or []
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise ConfigError(f"{where}: {kind} must be a list of paths")
        known = labels.encode(record.labels, where=f"{path}: post {record.post_id}")
        if listed:
            media = tuple(_beside(name, path) for name in listed)
            found.append(MediaPost(record.post_id, media, tuple(known)))
    if not found:
        raise ConfigError(f"{path}: no post has {kind}")
    return tuple(found)


def _beside(name: str, file: Path) -> Path:
    beside = file.parent / name  # an absolute path stays as it is
    return beside if beside.exists() else Path(name)


def targets_of(posts: Sequence[MediaPost], classes: int) -> npt.NDArray[np.float32]:
    """The true tags as float32 ``(posts, classes)`` of 0 and 1."""
    targets = np.zeros((len(posts), classes), np.float32)
    for row, post in zip(targets, posts, strict=True):
        row[list(post.labels)] = 1
    return targets


@dataclass(frozen=True)
class Posts:
    """What a run learns from.

    Attributes:
        valid: None without validation.
    """

    labels: LabelMap
    train: tuple[MediaPost, ...]
    valid: tuple[MediaPost, ...] | None


def all_media(posts: Sequence[MediaPost]) -> Iterator[tuple[str, Path]]:
    """Post ID and path of every medium, each path once."""
    seen: set[Path] = set()
    for post in posts:
        for path in post.paths:
            if path not in seen:
                seen.add(path)
                yield post.post_id, path


def prepare(
    settings: BackboneTrainSettings, reader: MediaReader, kind: MediaName, fabric: Fabric
) -> Posts:
    """Read labels and data files, and with ``data.skip_bad`` every medium.

    Raises:
        ConfigError: A file is missing, empty or wrong, names a label that is not in the map, or
            nothing is left to learn from.
    """
    data = settings.data

    def read() -> Posts:
        labels = LabelMap.load(data.labels)
        train = read_posts(data.train, labels, kind)
        if len(train) < 2:
            raise ConfigError(f"{data.train}: training takes at least two posts with {kind}")
        valid = read_posts(data.valid, labels, kind) if data.valid is not None else None
        return Posts(labels, train, valid)

    posts = agree(fabric, read)
    if not data.skip_bad:
        return posts
    skipped = Skipped(
        settings.trainer.save_dir / "log" / "skipped.jsonl", enabled=fabric.is_global_zero
    )
    check = partial(_readable, settings, reader, kind, fabric=fabric, skipped=skipped)
    with skipped:
        train, bad = check(posts=posts.train, file=data.train)
        valid = None
        if posts.valid is not None and data.valid is not None:
            valid, more = check(posts=posts.valid, file=data.valid)
            bad += more
    if bad:
        notice(
            f"warning: left out {bad} files that cannot be decoded; listed in {skipped.path}",
            enabled=fabric.is_global_zero,
        )
    return Posts(posts.labels, train, valid)


def _readable(
    settings: BackboneTrainSettings,
    reader: MediaReader,
    kind: MediaName,
    *,
    fabric: Fabric,
    skipped: Skipped,
    posts: Sequence[MediaPost],
    file: Path,
) -> tuple[tuple[MediaPost, ...], int]:
    """The posts without the media that cannot be decoded, and how many these are.

    Every file is decoded once.

    Raises:
        ConfigError: None can be.
    """
    media = list(all_media(posts))
    mine = media[fabric.global_rank :: fabric.world_size]
    size, bad = settings.backbone.image_size, dict[Path, tuple[str, str]]()
    shown = settings.trainer.progress and fabric.is_global_zero
    with progress_bar(f"check {file.name}", len(mine), enabled=shown) as bar:
        for post_id, path in mine:
            try:
                if kind == "images":
                    reader.picture(path, size)
                else:
                    reader.frames(path, size, settings.tsn.test_segments, None)
            except MediaError as error:
                bad[path] = (post_id, str(error))
            bar.advance()
    everyone = {path: found for part in gathered(fabric, bad) for path, found in part.items()}
    for _, path in media:
        if path in everyone:
            post_id, reason = everyone[path]
            skipped.add(path, post_id, "media", reason)
    left = (
        MediaPost(post.post_id, tuple(p for p in post.paths if p not in everyone), post.labels)
        for post in posts
    )
    found = tuple(post for post in left if post.paths)
    if len(found) < 2:
        raise ConfigError(f"{file}: hardly any of its {kind} can be decoded")
    return found, len(everyone)
