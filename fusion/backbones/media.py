"""Posts with their pictures or videos, decoded when they are needed: what backbones learn from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
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
from common.progress import notice
from config.labels import LabelMap
from config.settings import DecodeSettings
from config.train import BackboneTrainSettings
from extractors.media.decode import read_frames
from extractors.media.pictures import read_pictures, squash
from extractors.models.visual import segments
from fusion.data.data_file import MEDIA_KEYS, beside, entries, parse_post
from fusion.data.schema import Batch
from fusion.train.distributed import all_ranks, gathered
from fusion.train.prepare import Skipped, by_item

Kind: TypeAlias = Literal["picture", "clip", "patch"]
MediaName: TypeAlias = Literal["images", "videos"]
Pixels: TypeAlias = npt.NDArray[np.uint8]
Chance: TypeAlias = np.random.Generator
STREAM: Stream = "video"
"""The stream of a batch that holds its items: one name for pictures, clips and features."""


@dataclass(frozen=True)
class MediaItems:
    """Media files as the extractors would see them; pickles, for loader processes."""

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


@dataclass(frozen=True)
class MediaPost:
    """One post with at least one picture or video, and the indices of its true tags."""

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
    """The posts of a run; ``valid`` is None without validation."""

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
    """Return the posts without media that cannot be decoded, and the number of those media."""
    media, size = list(all_media(posts)), settings.backbone.image_size

    def reason(medium: tuple[str, Path]) -> str | None:
        try:
            if kind == "images":
                reader.picture(medium[1], size)
            else:
                reader.frames(medium[1], size, settings.tsn.test_segments, None)
        except MediaError as error:
            return str(error)
        return None

    shown = settings.trainer.progress and fabric.is_global_zero
    found = gathered(fabric, by_item(fabric, media, reason, f"check {file.name}", progress=shown))
    everyone = {path: why for part in found for (_, path), why in part if why is not None}
    for post_id, path in media:
        if path in everyone:
            skipped.add(path, post_id, "media", everyone[path])
    left = (
        MediaPost(post.post_id, tuple(p for p in post.paths if p not in everyone), post.labels)
        for post in posts
    )
    usable = tuple(post for post in left if post.paths)
    if len(usable) < 2:
        raise ConfigError(f"{file}: hardly any of its {kind} can be decoded")
    return usable, len(everyone)


@dataclass(frozen=True)
class MediaSample:
    """One post as a backbone takes it: media ``(n, ...)``, and float32 ``(classes,)``."""

    post_id: str
    items: npt.NDArray[Any]
    target: npt.NDArray[np.float32]


class MediaDataset(Dataset[Any], ABC):
    """Posts whose media are made ready when they are asked for, by a subclass.

    Attributes:
        targets: float32 ``(posts, classes)`` of 0 and 1.
    """

    def __init__(
        self,
        posts: Sequence[tuple[str, Any]],
        targets: npt.NDArray[np.float32],
        *,
        max_items: int,
        seed: int | None = None,
    ) -> None:
        """Make one.

        Args:
            posts: ID of each post, and a sequence of its media; at least one.
            targets: The true tags.
            max_items: Media of one post: random ones in training, else evenly spaced ones.
            seed: Of what is drawn in training; None draws nothing.
        """
        self._posts, self.targets = tuple(posts), targets
        self._max_items, self._seed = max_items, seed

    def __len__(self) -> int:
        """Number of posts."""
        return len(self._posts)

    def __getitem__(self, row: int) -> MediaSample:
        """Return one post; errors are those of `__getitems__`."""
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
    def item(self, medium: Any, chance: Chance | None) -> npt.NDArray[Any]:
        """Return one medium as the model takes it."""

    def _sample(self, row: int, chance: Chance | None) -> MediaSample:
        post_id, media = self._posts[row]
        items: list[npt.NDArray[Any]] = []
        for index in _chosen(len(media), self._max_items, chance):
            try:
                items.append(self.item(media[index], chance))
            except MediaError as error:
                raise MediaError(f"post {post_id}: {media[index]}: {error}") from error
        return MediaSample(post_id, np.stack(items), self.targets[row])


class PixelDataset(MediaDataset):
    """Files: pictures ``(n, 1, S, S, 3)``, or segments of clips ``(n, segments, S, S, 3)``, uint8.

    Args:
        reader: Decodes them.
        size: Side of the square pictures, in pixels.
        segments: Of a clip; None for pictures.
        augmented: Change pictures a little in training.
        options: Of `MediaDataset`.
    """

    def __init__(
        self,
        posts: Sequence[MediaPost],
        classes: int,
        reader: MediaItems,
        *,
        size: int,
        segments: int | None,
        augmented: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(_media_of(posts), targets_of(posts, classes), **options)
        self._reader, self._size, self._segments = reader, size, segments
        self._augmented = augmented

    def item(self, medium: Path, chance: Chance | None) -> Pixels:
        if self._segments is None:
            pixels = self._reader.picture(medium, self._size)[None]
        else:
            pixels = self._reader.frames(medium, self._size, self._segments, chance)
        return pixels if chance is None or not self._augmented else augment(pixels, "clip", chance)


class FrameDataset(MediaDataset):
    """Videos' features of frames, float16 ``(n, frames, dim)``, from where they are stored."""

    def __init__(
        self,
        posts: Sequence[MediaPost],
        classes: int,
        read: Callable[[Path], npt.NDArray[np.float16]],
        **options: Any,
    ) -> None:
        super().__init__(_media_of(posts), targets_of(posts, classes), **options)
        self._read = read

    def item(self, medium: Path, chance: Chance | None) -> npt.NDArray[np.float16]:
        return self._read(medium)


class ArrayDataset(MediaDataset):
    """Items that are in memory, as their extractor takes them; changed a little in training.

    Pictures uint8 ``(n, 1, S, S, 3)``, clips in the order of their frames uint8
    ``(n, frames, S, S, 3)``, patches of sound float32 ``(n, 1, 96, 64, 1)``.

    Args:
        items: One array of each post: pictures ``(n, S, S, 3)``, clips ``(n, frames, S, S, 3)``,
            patches ``(n, 96, 64)``. Posts with n = 0 are left out.
        targets: float32 ``(posts, classes)``.
        options: Of `MediaDataset`.
    """

    def __init__(
        self,
        kind: Kind,
        items: Sequence[npt.NDArray[Any]],
        targets: npt.NDArray[np.float32],
        **options: Any,
    ) -> None:
        rows = [row for row in range(len(items)) if len(items[row])]
        super().__init__([(str(row), items[row]) for row in rows], targets[rows], **options)
        self._kind = kind

    def item(self, medium: npt.NDArray[Any], chance: Chance | None) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = medium
        if chance is not None:
            array = augment(medium, self._kind, chance)
        if self._kind == "clip":
            return array
        return array[None, ..., None] if self._kind == "patch" else array[None]


def augment(item: npt.NDArray[Any], kind: Kind, chance: Chance) -> npt.NDArray[Any]:
    """Shift an item a little and change light or loudness; one draw for all frames of a clip.

    Nothing is mirrored: which way things point or move may be what the label is about.

    Args:
        item: Pixels uint8 ``(..., S, S, 3)``, or a log-mel patch float32 ``(96, 64)``.
        kind: What the item is.
        chance: Source of chance.

    Returns:
        Of the same shape and dtype.
    """
    if kind == "patch":
        louder = np.float32(chance.uniform(-0.7, 0.7))  # log amplitude
        shifted: npt.NDArray[np.float32] = np.roll(item, int(chance.integers(-10, 11)), 0) + louder
        band = int(chance.integers(0, 60))
        shifted[:, band : band + int(chance.integers(0, 5))] = shifted.mean()
        return shifted
    size = item.shape[-2]
    reach = max(1, size // 16)
    down, right = (int(v) for v in chance.integers(-reach, reach + 1, 2))
    # Shifted by index, the border repeated: no black edges that a model could read.
    ys = np.clip(np.arange(size) + down, 0, size - 1)
    xs = np.clip(np.arange(size) + right, 0, size - 1)
    moved = item[..., ys[:, None], xs[None, :], :]
    # A table of the 256 levels: far less work than arithmetic on every pixel.
    levels = np.arange(256, dtype=np.float32) - 127.5
    lit = levels * np.float32(chance.uniform(0.8, 1.2)) + 127.5 + chance.uniform(-20, 20)
    table: npt.NDArray[np.uint8] = np.rint(np.clip(lit, 0, 255)).astype(np.uint8)
    changed: npt.NDArray[np.uint8] = table[moved]
    return changed


def _media_of(posts: Sequence[MediaPost]) -> list[tuple[str, Any]]:
    return [(post.post_id, post.paths) for post in posts]


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
