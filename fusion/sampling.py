"""In which order posts are learned from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochBatches(Sampler[list[int]]):
    """Shuffled batches of indices; the order depends on seed and epoch alone.

    Every process of a distributed run gets its own equal share. A last batch of one post joins
    the batch before it: batch normalisation cannot learn from one.
    """

    def __init__(self, count: int, batch_size: int, seed: int, *, rank: int, world: int) -> None:
        super().__init__()
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self._rank, self._world = rank, world
        self.epoch = 0

    def __len__(self) -> int:
        """Batches of this process in one epoch."""
        share = -(-self._count // self._world)
        whole, rest = divmod(share, self._batch_size)
        return max(1, whole + (rest > 1 or (rest == 1 and self._batch_size == 1)))

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of the current `epoch`."""
        chance = torch.Generator().manual_seed(epoch_seed(self._seed, self.epoch))
        order = torch.randperm(self._count, generator=chance).tolist()
        order += order[: -self._count % self._world]  # so that all have the same number of steps
        mine = order[self._rank :: self._world]
        steps = len(self)
        for step in range(steps):
            end = (step + 1) * self._batch_size if step + 1 < steps else len(mine)
            yield mine[step * self._batch_size : end]


def epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """A seed for one epoch in one process."""
    return (seed * 1_000_003 + epoch * 1_009 + rank) % (1 << 63)
