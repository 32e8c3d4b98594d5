"""The training data of backbones: posts with their pictures or videos, decoded when needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch.utils.data import Dataset

from common.errors import ConfigError, MediaError, told
from common.post import Stream
from common.progress import notice
from config.labels import LabelMap
from config.settings import DecodeSettings
from config.train import BackboneTrainSettings
from extractors.media.decode import read_frames
from extractors.media.pictures import read_pictures, squash
from extractors.models.visual import segments
from extractors.parts import FrameChoice, centres
from fusion.data.data_file import MEDIA_KEYS, entries, parse_post, relative_to_file
from fusion.models.base import Batch, Sample, batch_of, padded
from fusion.train.distributed import all_ranks, same_everywhere
from fusion.train.prepare import Skipped, reasons

Kind: TypeAlias = Literal["picture", "clip", "patch"]
MediaName: TypeAlias = Literal["images", "videos"]
Pixels: TypeAlias = npt.NDArray[np.uint8]
Chance: TypeAlias = np.random.Generator
Item: TypeAlias = Callable[[Any, Chance | None], npt.NDArray[Any]]
STREAM: Stream = "video"
"""The stream of a batch that holds its items: one name for pictures, clips and features."""


@dataclass(frozen=True)
class MediaItems:
    """Media files as the extractors would see them; pickles, for loader processes."""

    limits: DecodeSettings = field(default_factory=DecodeSettings)

    def picture(self, path: Path, size: int) -> npt.NDArray[np.uint8]:
        """Return a picture as the image extractor sees it, uint8 RGB ``(size, size, 3)``."""
        pixels = next(iter(read_pictures(path, max_pixels=self.limits.max_pixels, max_frames=1)))
        return squash(pixels, size, size)

    def frames(
        self, path: Path, size: int, count: int, random: np.random.Generator | None
    ) -> npt.NDArray[np.uint8]:
        """Return a frame of each of ``count`` segments, uint8 RGB ``(count, size, size, 3)``.

        The centre one, or with ``random`` one at a random time; those of a short clip repeat.
        """
        clip = read_frames(
            path, choice=FrameChoice(count), side=size, limits=self.limits, random=random
        )
        return clip[segments(len(clip), count)]


@dataclass(frozen=True)
class MediaPost:
    """One post with at least one picture or video, and the indices of its true tags."""

    post_id: str
    paths: tuple[Path, ...]
    labels: tuple[int, ...]


def read_posts(path: Path, labels: LabelMap, kind: MediaName) -> tuple[MediaPost, ...]:
    """Return the posts of a data file that have media of a kind; the others are left out."""
    media_posts: list[MediaPost] = []
    for entry in entries(path):
        post = parse_post(entry.value, entry.where).post
        known = labels.encode(post.labels, where=f"{path}: post {post.post_id}")
        media = tuple(
            relative_to_file(each.source, path)
            for each in post.media
            if MEDIA_KEYS[each.kind] == kind
        )
        if media:
            media_posts.append(MediaPost(post.post_id, media, tuple(known)))
    if not media_posts:
        raise ConfigError(f"{path}: no post has {kind}")
    return tuple(media_posts)


def targets_of(tags: Sequence[Sequence[int]], classes: int) -> npt.NDArray[np.float32]:
    """Return the indices of posts' true tags as float32 ``(posts, classes)`` of 0 and 1."""
    targets = np.zeros((len(tags), classes), np.float32)
    for row, indices in zip(targets, tags, strict=True):
        row[list(indices)] = 1
    return targets


@dataclass(frozen=True)
class Posts:
    """The posts of a run; ``valid`` is None without validation."""

    labels: LabelMap
    train: tuple[MediaPost, ...]
    valid: tuple[MediaPost, ...] | None


def all_media(posts: Sequence[MediaPost]) -> Iterator[tuple[str, Path]]:
    """Yield post ID and path of every medium, each path once."""
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
    """Read labels and data files, and with ``data.skip_bad`` every medium."""
    data = settings.data

    def read() -> Posts:
        labels = LabelMap.load(data.labels)
        train = read_posts(data.train, labels, kind)
        valid = read_posts(data.valid, labels, kind) if data.valid is not None else None
        return Posts(labels, train, valid)

    posts = all_ranks(fabric, read)
    if data.skip_bad:
        posts = _readable(settings, reader, kind, posts, folder=folder, fabric=fabric)
    if len(posts.train) < 2:
        raise same_everywhere(
            ConfigError(f"{data.train}: training takes at least two posts with {kind}")
        )
    return posts


def _readable(
    settings: BackboneTrainSettings,
    reader: MediaItems,
    kind: MediaName,
    posts: Posts,
    *,
    folder: Path,
    fabric: Fabric,
) -> Posts:
    """Return the posts without media that cannot be decoded, which are listed in a file."""
    data, first, size = settings.data, fabric.is_global_zero, settings.backbone.image_size
    count = None if kind == "images" else settings.tsn.test_segments
    skipped = Skipped(folder / "log" / "skipped.jsonl", enabled=first)
    bad: set[Path] = set()

    def decode(medium: tuple[str, Path]) -> object:
        return pixels(medium[1], None, reader=reader, size=size, segments=count)

    def check(posts: Sequence[MediaPost], file: Path) -> tuple[MediaPost, ...]:
        shown = settings.trainer.progress and first
        broken = reasons(
            fabric, list(all_media(posts)), decode, f"check {file.name}", progress=shown
        )
        for (post_id, path), why in broken:
            skipped.add(path, post_id, "media", why)
            bad.add(path)
        rest = (replace(post, paths=tuple(p for p in post.paths if p not in bad)) for post in posts)
        usable = tuple(post for post in rest if post.paths)
        if not usable:
            raise ConfigError(
                f"{file}: none of its {kind} can be decoded; the first: {broken[0][1]}"
            )
        return usable

    with skipped:
        train = check(posts.train, data.train)
        valid = posts.valid and data.valid and check(posts.valid, data.valid)
    if bad:
        notice(
            f"warning: left out {len(bad)} files that cannot be decoded; listed in {skipped.path}",
            enabled=first,
        )
    return Posts(posts.labels, train, valid or None)


class MediaDataset(Dataset[Sample]):
    """Posts whose media are made ready when they are asked for.

    Args:
        posts: ID of each post, and a sequence of its media; at least one.
        targets: The true tags, float32 ``(posts, classes)`` of 0 and 1.
        item: Makes one medium ready; draws from a source of chance in training. Pickles.
        max_items: Media of one post: random ones in training, else evenly spaced ones.
        seed: Of what is drawn in training; None draws nothing.
    """

    def __init__(
        self,
        posts: Sequence[tuple[str, Any]],
        targets: npt.NDArray[np.float32],
        item: Item,
        *,
        max_items: int,
        seed: int | None = None,
    ) -> None:
        self._posts, self.targets, self._item = tuple(posts), targets, item
        self._max_items, self._seed = max_items, seed

    @classmethod
    def of_files(
        cls, posts: Sequence[MediaPost], classes: int, item: Item, **options: Any
    ) -> MediaDataset:
        """Return posts whose media are files; ``options`` are those of the class."""
        media = [(post.post_id, post.paths) for post in posts]
        targets = targets_of([post.labels for post in posts], classes)
        return cls(media, targets, item, **options)

    @classmethod
    def of_arrays(
        cls,
        kind: Kind,
        items: Sequence[npt.NDArray[Any]],
        targets: npt.NDArray[np.float32],
        ids: Sequence[str] = (),
        **options: Any,
    ) -> MediaDataset:
        """Return posts in memory, as their extractor takes them; changed a little in training.

        Args:
            kind: What the items are.
            items: One array of each post: pictures ``(n, S, S, 3)``, clips ``(n, frames, S, S,
                3)``, patches ``(n, 96, 64)``. Posts with n = 0 are left out.
            targets: float32 ``(posts, classes)``.
            ids: Of the posts; without them they are numbered.
            options: Those of the class.
        """
        rows = [row for row in range(len(items)) if len(items[row])]
        posts = [(ids[row] if ids else str(row), items[row]) for row in rows]
        return cls(posts, targets[rows], partial(_array_item, kind), **options)

    def __len__(self) -> int:
        return len(self._posts)

    @property
    def post_ids(self) -> tuple[str, ...]:
        return tuple(post_id for post_id, _ in self._posts)

    def __getitem__(self, row: int) -> Sample:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[Sample]:
        """Return the posts of a batch; their array of media is `STREAM`.

        What is drawn depends on the batch's posts and their order alone. An epoch's order is one of
        its own, so each epoch draws others, and a resumed one the same as the interrupted one, in
        whichever process it is read.
        """
        chance = None if self._seed is None else np.random.default_rng([self._seed, *rows])
        return [self._sample(row, chance) for row in rows]

    def _sample(self, row: int, chance: Chance | None) -> Sample:
        post_id, media = self._posts[row]
        items: list[npt.NDArray[Any]] = []
        for index in _chosen(len(media), self._max_items, chance):
            with told(f"post {post_id}: {media[index]}", MediaError, as_=MediaError):
                items.append(self._item(media[index], chance))
        return Sample(post_id, {STREAM: np.stack(items)}, self.targets[row])


def pixels(
    path: Path,
    chance: Chance | None,
    *,
    reader: MediaItems,
    size: int,
    segments: int | None,
    augmented: bool = False,
    flip: bool = False,
    crop: float = 0.0,
) -> Pixels:
    """Return a file as the model takes it, uint8.

    A picture ``(1, S, S, 3)`` without ``segments``, else a frame of each segment of a clip
    ``(segments, S, S, 3)``; ``augmented`` changes them in training, as `augment` does.
    """
    if segments is None:
        pixels = reader.picture(path, size)[None]
    else:
        pixels = reader.frames(path, size, segments, chance)
    if not augmented or chance is None:
        return pixels
    return augment(pixels, "clip", chance, flip=flip, crop=crop)


def _array_item(kind: Kind, medium: npt.NDArray[Any], chance: Chance | None) -> npt.NDArray[Any]:
    """Return a picture ``(1, S, S, 3)``, a clip ``(frames, S, S, 3)`` or a patch (1, 96, 64, 1)."""
    array = medium if chance is None else augment(medium, kind, chance)
    if kind == "clip":
        return array
    return array[None, ..., None] if kind == "patch" else array[None]


def augment(
    item: npt.NDArray[Any], kind: Kind, chance: Chance, *, flip: bool = False, crop: float = 0.0
) -> npt.NDArray[Any]:
    """Shift an item a little and change light or loudness; one draw for all frames of a clip.

    Nothing is mirrored without `flip`: which way things point or move may be what the label is
    about. `crop` is the largest share that pictures lose of each side. Items are pixels uint8
    ``(..., S, S, 3)`` or log-mel patches float32 ``(96, 64)``, before and after.
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
    rows = columns = np.arange(size)
    if crop:
        side = max(1, round(size * (1 - crop * chance.uniform())))
        top, left = (int(v) for v in chance.integers(0, size - side + 1, 2))
        enlarged = ((np.arange(size) + 0.5) * side / size).astype(np.intp)
        rows, columns = top + enlarged, left + enlarged
    if flip and chance.random() < 0.5:
        columns = columns[::-1]
    ys = np.clip(rows + down, 0, size - 1)
    xs = np.clip(columns + right, 0, size - 1)
    moved = item[..., ys[:, None], xs[None, :], :]
    # A table of the 256 levels: far less work than arithmetic on every pixel.
    levels = np.arange(256, dtype=np.float32) - 127.5
    lit = levels * np.float32(chance.uniform(0.8, 1.2)) + 127.5 + chance.uniform(-20, 20)
    table: npt.NDArray[np.uint8] = np.rint(np.clip(lit, 0, 255)).astype(np.uint8)
    changed: npt.NDArray[np.uint8] = table[moved]
    return changed


def collate_media(samples: Sequence[Sample]) -> Batch:
    """Pad to the most media of one post: tokens ``(posts, n, ...)``, masks ``(posts, n)``."""
    arrays = [sample.arrays[STREAM] for sample in samples]
    tokens, mask = padded(arrays, arrays[0].shape[1:], arrays[0].dtype)
    return batch_of(samples, {STREAM: tokens}, {STREAM: mask})


def best_of_post(scores: torch.Tensor, mask: torch.Tensor, none: torch.Tensor) -> torch.Tensor:
    """Return the highest score of each class among a post's media: labels belong to posts.

    Scores are ``(media, classes)`` of all posts in order, the mask ``(posts, n)`` is True where a
    post has a medium; posts without any get ``none`` ``(classes,)``.
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
        return centres(count, most)
    return sorted(chance.choice(count, most, replace=False).tolist())
