"""Posts with their pictures or videos, decoded when they are needed: what backbones learn from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch.utils.data import Dataset

from common.errors import ConfigError, MediaError
from common.post import Stream
from common.progress import notice, progress_bar
from config.labels import LabelMap
from config.settings import DecodeSettings, VideoSettings
from config.train import BackboneTrainSettings
from extractors.media.decode import read_frames
from extractors.media.pictures import read_pictures, squash
from extractors.models.visual import VideoExtractor, segments
from fusion.backbones.augment import augment
from fusion.data.collate import Batch
from fusion.data.data_file import MEDIA_KEYS, beside, entries, parse_post
from fusion.train.distributed import all_ranks, gathered
from fusion.train.prepare import Skipped

MediaName: TypeAlias = Literal["images", "videos"]
Pixels: TypeAlias = npt.NDArray[np.uint8]
Chance: TypeAlias = np.random.Generator
STREAM: Stream = "video"
"""The stream of a batch that holds its items: one name for pictures, clips and features."""


@dataclass(frozen=True)
class MediaItems:
    """Media files as the extractors would see them; pickles, for loader processes.

    Attributes:
        limits: What a file may be.
    """

    limits: DecodeSettings = field(default_factory=DecodeSettings)

    def picture(self, path: Path, size: int) -> npt.NDArray[np.uint8]:
        """Return a picture as the image extractor sees it, uint8 RGB ``(size, size, 3)``.

        Raises:
            MediaError: The file cannot be decoded.
        """
        pixels = next(iter(read_pictures(path, max_pixels=self.limits.max_pixels, max_frames=1)))
        return squash(pixels, size, size)

    def frames(
        self, path: Path, size: int, count: int, random: np.random.Generator | None
    ) -> npt.NDArray[np.uint8]:
        """Return a frame of each of ``count`` segments, uint8 RGB ``(count, size, size, 3)``.

        The centre one, or with ``random`` one at a random time; those of a short clip repeat.

        Raises:
            MediaError: The file cannot be decoded.
        """
        found = read_frames(path, count=count, side=size, limits=self.limits, random=random)
        return found[segments(len(found), count)]

    @contextmanager
    def extractor(
        self, arch: str, weights: Path, *, size: int, frames: int, device: str
    ) -> Iterator[FrameExtractor]:
        """Yield the video extractor with trained weights, loaded inside the block.

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
        self._settings, self._limits = settings, limits
        self._extractor = VideoExtractor(settings, device)
        self._extractor.load()
        self.fingerprint: str = self._extractor.fingerprint
        self.dim: int = self._extractor.dim

    def __call__(self, path: Path) -> npt.NDArray[np.float16]:
        """Return features ``(frames, dim)`` of a video file.

        Raises:
            MediaError: The file cannot be decoded.
            FeatureError: The model gave values that are not finite.
        """
        pixels = read_frames(
            path,
            count=self._settings.frames,
            side=self._settings.image_size,
            limits=self._limits,
            mode=self._settings.decode,
        )
        [features] = self._extractor.forward([self._extractor.preprocess(pixels)])
        rows: npt.NDArray[np.float16] = features
        return rows

    def close(self) -> None:
        """Free the model."""
        self._extractor.close()


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
    """Return the posts of a data file that have media of a kind; the others are left out.

    Raises:
        ConfigError: The file is missing, not as it should be, names an unknown label, or has no
            media of the kind.
    """
    found: list[MediaPost] = []
    for entry in entries(path):
        post = parse_post(entry.value, entry.where).post
        known = labels.encode(post.labels, where=f"{path}: post {post.post_id}")
        media = tuple(
            beside(each.source, path) for each in post.media if MEDIA_KEYS[each.kind] == kind
        )
        if media:
            found.append(MediaPost(post.post_id, media, tuple(known)))
    if not found:
        raise ConfigError(f"{path}: no post has {kind}")
    return tuple(found)


def targets_of(posts: Sequence[MediaPost], classes: int) -> npt.NDArray[np.float32]:
    """Return the true tags as float32 ``(posts, classes)`` of 0 and 1."""
    targets = np.zeros((len(posts), classes), np.float32)
    for row, post in zip(targets, posts, strict=True):
        row[list(post.labels)] = 1
    return targets


@dataclass(frozen=True)
class Posts:
    """The posts of a run.

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
    settings: BackboneTrainSettings,
    reader: MediaItems,
    kind: MediaName,
    folder: Path,
    fabric: Fabric,
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

    posts = all_ranks(fabric, read)
    if not data.skip_bad:
        return posts
    skipped = Skipped(folder / "log" / "skipped.jsonl", enabled=fabric.is_global_zero)
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
    reader: MediaItems,
    kind: MediaName,
    *,
    fabric: Fabric,
    skipped: Skipped,
    posts: Sequence[MediaPost],
    file: Path,
) -> tuple[tuple[MediaPost, ...], int]:
    """Return the posts without media that cannot be decoded, and the number of those media.

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


@dataclass(frozen=True)
class MediaSample:
    """One post as a backbone takes it.

    Attributes:
        items: Its media ``(n, ...)``; n is at least 1.
        target: float32 ``(classes,)``.
    """

    post_id: str
    items: npt.NDArray[Any]
    target: npt.NDArray[np.float32]


class MediaDataset(Dataset[Any], ABC):
    """Posts whose media are read when they are asked for, by a subclass."""

    def __init__(
        self, posts: Sequence[MediaPost], classes: int, *, max_items: int, seed: int | None
    ) -> None:
        """Make one.

        Args:
            posts: With media.
            classes: Number of tags.
            max_items: Media of one post.
            seed: Of what is drawn in training; None draws nothing.
        """
        self._posts, self._targets = tuple(posts), targets_of(posts, classes)
        self._max_items, self._seed = max_items, seed

    def __len__(self) -> int:
        """Number of posts."""
        return len(self._posts)

    def __getitem__(self, row: int) -> MediaSample:
        """Return one post.

        Raises:
            MediaError: One of its files cannot be decoded.
        """
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[MediaSample]:
        """Return the posts of a batch.

        What is drawn depends on the batch's posts and their order alone. An epoch's order is one
        of its own, so each epoch draws others, and a resumed one the same as the interrupted one,
        in whichever process it is read.

        Raises:
            MediaError: A file cannot be decoded.
        """
        chance = None if self._seed is None else np.random.default_rng([self._seed, *rows])
        return [self._sample(row, chance) for row in rows]

    @abstractmethod
    def item(self, path: Path, chance: Chance | None) -> npt.NDArray[Any]:
        """Return one media file."""

    def _sample(self, row: int, chance: Chance | None) -> MediaSample:
        post = self._posts[row]
        items: list[npt.NDArray[Any]] = []
        for index in _chosen(len(post.paths), self._max_items, chance):
            try:
                items.append(self.item(post.paths[index], chance))
            except MediaError as error:
                raise MediaError(f"post {post.post_id}: {post.paths[index]}: {error}") from error
        return MediaSample(post.post_id, np.stack(items), self._targets[row])


class PixelDataset(MediaDataset):
    """Pictures ``(n, 1, S, S, 3)``, or segments of clips ``(n, segments, S, S, 3)``, uint8."""

    def __init__(
        self,
        posts: Sequence[MediaPost],
        classes: int,
        reader: MediaItems,
        *,
        size: int,
        segments: int | None,
        max_items: int,
        seed: int | None = None,
        augmented: bool = False,
    ) -> None:
        """Make one.

        Args:
            posts: With media.
            classes: Number of tags.
            reader: Decodes them.
            size: Side of the square pictures, in pixels.
            segments: Of a clip; None for pictures.
            max_items: Media of one post.
            seed: Of what is drawn in training; None for validation.
            augmented: Change pictures a little.
        """
        super().__init__(posts, classes, max_items=max_items, seed=seed)
        self._reader, self._size, self._segments = reader, size, segments
        self._augmented = augmented

    def item(self, path: Path, chance: Chance | None) -> Pixels:
        """Return pixels of one file, uint8 ``(segments or 1, S, S, 3)``."""
        if self._segments is None:
            pixels = self._reader.picture(path, self._size)[None]
        else:
            pixels = self._reader.frames(path, self._size, self._segments, chance)
        if chance is None or not self._augmented:
            return pixels
        changed = augment(pixels.astype(np.float32), "clip", chance)
        return np.rint(changed).astype(np.uint8)


class CollateMedia:
    """A maker of batches out of `MediaSample`; pickles, for loader processes."""

    def __call__(self, samples: Sequence[MediaSample]) -> Batch:
        """Pad to the most media of one post: tokens ``(posts, n, ...)``, masks ``(posts, n)``."""
        counts = [len(sample.items) for sample in samples]
        first = samples[0].items
        padded = np.zeros((len(samples), max(counts), *first.shape[1:]), first.dtype)
        for row, sample in zip(padded, samples, strict=True):
            row[: len(sample.items)] = sample.items
        mask = torch.arange(max(counts))[None, :] < torch.tensor(counts)[:, None]
        return Batch(
            tuple(sample.post_id for sample in samples),
            {STREAM: torch.from_numpy(padded)},
            {STREAM: mask},
            torch.from_numpy(np.stack([sample.target for sample in samples])),
        )


def best_of_post(scores: torch.Tensor, mask: torch.Tensor, none: torch.Tensor) -> torch.Tensor:
    """Return the highest score of each class among a post's media: labels belong to posts.

    Args:
        scores: ``(media, classes)`` of all posts, in order.
        mask: bool ``(posts, n)``, True where a post has a medium.
        none: ``(classes,)`` for posts without any.

    Returns:
        ``(posts, classes)``.
    """
    posts = mask.shape[0]
    owners = torch.arange(posts, device=mask.device)[:, None].expand_as(mask)[mask]  # (media,)
    lowest = scores.new_full((posts, scores.shape[1]), float("-inf"))
    best = lowest.scatter_reduce(0, owners[:, None].expand_as(scores), scores, "amax")
    return torch.where(mask.any(dim=1, keepdim=True), best, none.to(scores.dtype))


def _chosen(count: int, most: int, chance: Chance | None) -> list[int]:
    if count <= most:
        return list(range(count))
    if chance is None:
        return [(2 * k + 1) * count // (2 * most) for k in range(most)]
    return sorted(chance.choice(count, most, replace=False).tolist())
