"""Batches of posts in each epoch's order, ready before they are wanted."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fusion.models.base import Batch, Sample

# Batches that are ready before they are wanted: they hide one that is slow to read. Each one more
# only takes memory; with 1, every slow one makes the model wait.
_AHEAD = 4
# Processes that read for one GPU, at most: each holds Python, torch and its batches in memory.
_MOST_LOADERS = 8
_END = object()
Item = TypeVar("Item")
Batches: TypeAlias = Generator[Batch, None, None]
"""To be closed by a caller that stops early."""


class Loading:
    """A reader of batches ahead, in ``loaders`` processes for each data set, or with 0 in a thread.

    The processes of a data set live until `close`, so that they start only once.
    """

    def __init__(
        self, collate: Callable[[Sequence[Any]], Batch], loaders: int, device: torch.device
    ) -> None:
        self._collate, self._loaders, self._device = collate, loaders, device
        self._open: dict[int, tuple[DataLoader[Batch], _Plan]] = {}

    def batches(self, posts: Dataset[Sample], rows: Iterable[list[int]]) -> Batches:
        """Yield the batches of these rows, in their order."""
        if id(posts) not in self._open:
            self._open[id(posts)] = self._loader(posts)
        loader, plan = self._open[id(posts)]
        plan.rows = rows
        yield from loader if self._loaders else ahead(loader)

    def close(self) -> None:
        self._open.clear()  # the loaders end theirs when they are collected

    def _loader(self, posts: Dataset[Sample]) -> tuple[DataLoader[Batch], _Plan]:
        plan = _Plan()
        loader: DataLoader[Batch] = DataLoader(
            posts,  # type: ignore[arg-type]
            batch_sampler=plan,
            collate_fn=self._collate,
            num_workers=self._loaders,
            # Spawned: forking a process that runs torch's threads can hang.
            multiprocessing_context="spawn" if self._loaders else None,
            persistent_workers=self._loaders > 0,
            pin_memory=self._device.type == "cuda",
            # Its own: a thread that drew from torch's would change what the model draws.
            generator=torch.Generator(),
        )
        return loader, plan


class _Plan:
    """Rows of the batches to come, as the batch sampler of a `DataLoader`."""

    def __init__(self) -> None:
        self.rows: Iterable[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.rows)


def default_loaders(device_type: str, processes: int) -> int:
    """Return a number of loader processes: none on a CPU, whose cores training needs."""
    if device_type == "cpu":
        return 0
    return max(1, min(_MOST_LOADERS, (os.cpu_count() or 1) // processes - 1))


def ahead(items: Iterable[Item], depth: int = _AHEAD) -> Iterator[Item]:
    """Yield the same items, made in a thread up to ``depth`` before they are wanted.

    Errors of the thread are raised here. A caller that stops early should close the iterator.
    """
    source = iter(items)
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        ready = deque(thread.submit(next, source, _END) for _ in range(depth))
        try:
            while (item := ready.popleft().result()) is not _END:
                ready.append(thread.submit(next, source, _END))
                yield cast("Item", item)
        finally:
            thread.shutdown(cancel_futures=True)


class DataWait:
    """A clock of the time that training steps wait for batches."""

    def __init__(self) -> None:
        self.waited_s = self.total_s = 0.0

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the same items; time until the next is waiting, time between two is the step's."""
        started = time.perf_counter()
        for item in items:
            waited = time.perf_counter() - started
            yield item
            self.waited_s += waited
            self.total_s += time.perf_counter() - started
            started = time.perf_counter()

    def add(self, other: DataWait) -> None:
        self.waited_s += other.waited_s
        self.total_s += other.total_s

    @property
    def share(self) -> float:
        """Return waiting / all, in [0, 1]; 0 before the first step."""
        return self.waited_s / self.total_s if self.total_s else 0.0


class EpochBatches(Sampler[list[int]]):
    """Shuffled batches of rows; the order depends on seed and epoch alone.

    Batches are those of the whole run, whatever the number of its processes: each takes every
    ``world``-th post of every batch, so that together they see what one process would. A last batch
    with less than two posts for each process joins the batch before it: batch normalisation cannot
    train on one. `__iter__` leaves out ``start`` batches of the ``epoch``.
    """

    def __init__(self, count: int, batch_size: int, seed: int, *, rank: int, world: int) -> None:
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
