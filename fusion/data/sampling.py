"""In which order posts are learned from, and which process takes which of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochBatches(Sampler[list[int]]):
    """Shuffled batches of rows; the order depends on seed and epoch alone.

    Batches are those of the whole run, whatever the number of its processes: each takes every
    ``world``-th post of every batch, so that together they see what one process would. A last
    batch with less than two posts for each process joins the batch before it: batch normalisation
    cannot learn from one.

    Attributes:
        epoch: Whose order `__iter__` gives.
        start: Batches of it that are left out, because they were learned from already.
    """

    def __init__(self, count: int, batch_size: int, seed: int, *, rank: int, world: int) -> None:
        """Make one.

        Args:
            count: Posts.
            batch_size: Posts of one batch, over all processes together.
            seed: Of the run.
            rank: This process, from 0.
            world: Processes in all.

        Raises:
            ValueError: A batch, or the whole set, has no post for each process.
        """
        if min(count, batch_size) < world:
            raise ValueError(f"{min(count, batch_size)} posts do not make a batch for {world}")
        super().__init__()
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self._rank, self._world = rank, world
        whole, rest = divmod(count, batch_size)
        least = world * min(2, batch_size // world)
        self._steps = max(1, whole + (rest >= least))
        self.epoch = self.start = 0

    def __len__(self) -> int:
        """Return the number of batches in one epoch, those before `start` as well."""
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's part of the batches of the current `epoch` from `start`."""
        chance = torch.Generator().manual_seed(epoch_seed(self._seed, self.epoch))
        order = torch.randperm(self._count, generator=chance)
        for step in range(self.start, self._steps):
            first = step * self._batch_size
            yield order[first : first + self.posts(step)][self._rank :: self._world].tolist()

    def posts(self, step: int) -> int:
        """Return the number of posts of a batch in all processes; steps are counted from 0."""
        if step + 1 < self._steps:
            return self._batch_size
        return self._count - step * self._batch_size


def epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """Return a seed for one epoch in one process."""
    return (seed * 1_000_003 + epoch * 1_009 + rank) % (1 << 63)


def step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Return a seed for one step; its draws do not depend on an interruption of the run."""
    return (epoch_seed(seed, epoch, rank) * 1_000_033 + step * 65_537) % (1 << 63)
