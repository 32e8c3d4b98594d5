"""Batches ready before they are wanted, and how long training waited for them all the same."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from typing import TypeAlias, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from fusion.data.collate import Batch, Collate, Sample

# Batches that are ready before they are wanted: they hide one that is slow to read. Each one more
# only takes memory; with 1, every slow one makes the model wait.
_AHEAD = 4
# Processes that read for one GPU, at most: each holds Python, torch and its batches in memory.
_MOST_LOADERS = 8
# How late the thread notices that its caller stops early, and so how long the caller waits then. At
# half, a full queue wakes the thread up twice as often.
_POLL_S = 0.2
Item = TypeVar("Item")
Batches: TypeAlias = Generator[Batch, None, None]
"""To be closed by a caller that stops early."""


class Loading:
    """A reader of batches ahead, in processes or in a thread.

    The processes of a data set live until `close`, so that they start only once.
    """

    def __init__(self, collate: Collate, loaders: int, device: torch.device) -> None:
        """Make one; nothing starts yet.

        Args:
            collate: Makes batches.
            loaders: Processes for each data set; 0 reads in a thread of this one.
            device: Where batches will go.
        """
        self._collate, self._loaders, self._device = collate, loaders, device
        self._open: dict[int, tuple[DataLoader[Batch], _Plan]] = {}

    def batches(self, posts: Dataset[Sample], rows: Iterable[list[int]]) -> Batches:
        """Yield the batches of these rows, in their order.

        Raises:
            FeatureError: Features cannot be read.
        """
        if id(posts) not in self._open:
            self._open[id(posts)] = self._loader(posts)
        loader, plan = self._open[id(posts)]
        plan.rows = rows
        yield from loader if self._loaders else ahead(loader)

    def close(self) -> None:
        """End the processes."""
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
    """Return a sensible number of loader processes: none on a CPU, whose cores training needs.

    Args:
        device_type: ``cpu`` or ``cuda``.
        processes: Training processes on this host.
    """
    if device_type == "cpu":
        return 0
    return max(1, min(_MOST_LOADERS, (os.cpu_count() or 1) // processes - 1))


def ahead(items: Iterable[Item], depth: int = _AHEAD) -> Iterator[Item]:
    """Yield the same items, made in a thread up to ``depth`` before they are wanted.

    Errors of the thread are raised here. A caller that stops early should close the iterator.
    """
    ready: queue.Queue[tuple[bool, Item | BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(more: bool, value: Item | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put((more, value), timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(True, item):
                    return
        except BaseException as error:  # noqa: BLE001  raised by the thread that waits
            put(False, error)
        else:
            put(False, None)

    thread = threading.Thread(target=make, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            more, value = ready.get()
            if more:
                yield value  # type: ignore[misc]
            elif isinstance(value, BaseException):
                raise value
            else:
                return
    finally:
        stopped.set()
        thread.join()


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
        """Count another one's time as well."""
        self.waited_s += other.waited_s
        self.total_s += other.total_s

    @property
    def share(self) -> float:
        """Waiting / all, in [0, 1]; 0 before the first step."""
        return self.waited_s / self.total_s if self.total_s else 0.0
