"""Posts with their pictures or videos, decoded when they are needed: what backbones learn from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from common.errors import MediaError
from common.post import Stream
from fusion.backbones.augment import augment
from fusion.backbones.backbone_posts import MediaPost, MediaReader, targets_of
from fusion.data.collate import Batch

Pixels: TypeAlias = npt.NDArray[np.uint8]
Chance: TypeAlias = np.random.Generator
STREAM: Stream = "video"
"""Where a batch has its items: one name, whatever they are."""


@dataclass(frozen=True)
class MediaSample:
    """One post as a backbone takes it.

    Attributes:
        items: Its media ``(n, …)``; n is at least 1.
        target: float32 ``(classes,)``.
    """

    post_id: str
    items: npt.NDArray[Any]
    target: npt.NDArray[np.float32]


class MediaDataset(Dataset[Any], ABC):
    """Posts whose media are read when they are asked for; a subclass says how."""

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
        """One post.

        Raises:
            MediaError: One of its files cannot be decoded.
        """
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[MediaSample]:
        """The posts of a batch.

        What is drawn depends on the batch's posts and their order alone. An epoch's order is one
        of its own, so each epoch draws anew, and a resumed one what the interrupted one drew,
        in whichever process it is read.

        Raises:
            MediaError: A file cannot be decoded.
        """
        chance = None if self._seed is None else np.random.default_rng([self._seed, *rows])
        return [self._sample(row, chance) for row in rows]

    @abstractmethod
    def item(self, path: Path, chance: Chance | None) -> npt.NDArray[Any]:
        """One media file."""

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
        reader: MediaReader,
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
        """Pixels of one file, uint8 ``(segments or 1, S, S, 3)``."""
        if self._segments is None:
            pixels = self._reader.picture(path, self._size)[None]
        else:
            pixels = self._reader.frames(path, self._size, self._segments, chance)
        if chance is None or not self._augmented:
            return pixels
        changed = augment(pixels.astype(np.float32), "clip", chance)
        return np.rint(changed).astype(np.uint8)


class CollateMedia:
    """Makes batches out of `MediaSample`; pickles, for loader processes."""

    def __call__(self, samples: Sequence[MediaSample]) -> Batch:
        """Pad to the most media of one post: tokens ``(posts, n, …)``, masks ``(posts, n)``."""
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
    """The highest score of each class among a post's media: labels belong to posts.

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
