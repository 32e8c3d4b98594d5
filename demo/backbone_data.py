"""Items of posts -> batches for a backbone, with light augmentation.

An item is one picture ``(S, S, 3)``, one clip ``(m, S, S, 3)`` or one patch ``(96, 64)``; a post
has several. Nothing is mirrored: which way things point or move may be what the label is about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from fusion.backbones.augment import Kind, augment, channels_first

ItemArray: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.float32]

# Dimensions of one item, without the leading count.
ITEM_DIMS: dict[Kind, int] = {"picture": 3, "clip": 4, "patch": 2}


@dataclass(frozen=True)
class ItemBatch:
    """A batch of posts, flattened to their items.

    Attributes:
        items: float32, pictures ``(items, 3, S, S)``, clips ``(items, m, 3, S, S)``, patches
            ``(items, 1, 96, 64)``; pixels in [0, 255].
        owners: int64 ``(items,)``, the post within the batch that each item belongs to.
        targets: float32 ``(posts, classes)``.
        rows: Which posts of the set these are.
    """

    items: torch.Tensor
    owners: torch.Tensor
    targets: torch.Tensor
    rows: npt.NDArray[np.intp]


@dataclass(frozen=True)
class ItemSet:
    """Posts with at least one item, checked.

    Attributes:
        items: One array ``(n, ...)`` per post, n at least 1.
        targets: float32 ``(posts, classes)``.
    """

    kind: Kind
    items: tuple[ItemArray, ...]
    targets: npt.NDArray[np.float32]

    @classmethod
    def build(
        cls, kind: Kind, items: Sequence[ItemArray], targets: npt.ArrayLike, name: str
    ) -> ItemSet:
        """Check the arrays and drop posts without items.

        Raises:
            ValueError: Shapes are not what the kind needs, or nothing is left.
        """
        wanted = np.asarray(targets, dtype=np.float32)
        if wanted.ndim != 2 or len(wanted) != len(items):
            raise ValueError(f"{name}: {len(items)} posts need targets (posts, classes)")
        kept = [i for i, array in enumerate(items) if len(array)]
        if not kept:
            raise ValueError(f"{name}: no post has a {kind}")
        shapes = {items[i].shape[1:] for i in kept}
        if len(shapes) != 1 or len(next(iter(shapes))) != ITEM_DIMS[kind]:
            raise ValueError(f"{name}: {kind} items must all have one shape, not {sorted(shapes)}")
        return cls(kind, tuple(items[i] for i in kept), wanted[kept])

    def __len__(self) -> int:
        """Number of posts."""
        return len(self.items)

    def batches(
        self, batch_size: int, max_items: int, random: np.random.Generator | None
    ) -> Iterator[ItemBatch]:
        """Yield all posts in batches; shuffled, sampled and augmented when ``random`` is given.

        Args:
            batch_size: Posts in a batch.
            max_items: Items of one post: random ones in training, evenly spaced ones otherwise.
            random: Source of chance of a training pass; None for validation.
        """
        order = np.arange(len(self)) if random is None else random.permutation(len(self))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            chosen: list[npt.NDArray[np.float32]] = []
            owners: list[int] = []
            for owner, row in enumerate(rows):
                array = self.items[row]
                for index in _choose(len(array), max_items, random):
                    item = array[index].astype(np.float32)
                    chosen.append(item if random is None else augment(item, self.kind, random))
                    owners.append(owner)
            yield ItemBatch(
                items=channels_first(np.stack(chosen), self.kind),
                owners=torch.tensor(owners),
                targets=torch.from_numpy(self.targets[rows]),
                rows=rows,
            )


def _choose(count: int, most: int, random: np.random.Generator | None) -> npt.NDArray[np.intp]:
    if count <= most:
        return np.arange(count)
    if random is None:
        spaced: npt.NDArray[np.intp] = np.linspace(0, count - 1, most).round().astype(np.intp)
        return spaced
    return np.sort(random.choice(count, most, replace=False))
