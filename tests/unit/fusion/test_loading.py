"""Batches: their order, shared by processes; read ahead; and how long training waits for them."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fusion.data.dataset import FeatureFiles, PostDataset
from fusion.data.loading import DataWait, EpochBatches, ahead, default_loaders
from fusion.data.posts import PostList
from tests.support.fusion import support


def test_items_come_in_order_and_are_made_ahead() -> None:
    """While the first is used the next ones are made, up to the depth and no further."""
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    ready = ahead(items(), depth=3)
    assert next(ready) == 0
    deadline = time.monotonic() + 60
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4, "one used, three ready"
    assert list(ready) == list(range(1, 20))


def test_a_mistake_in_the_thread_is_raised_where_the_item_was_wanted() -> None:
    """After the items that were made before it."""

    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    ready = ahead(items())
    assert next(ready) == 1
    with pytest.raises(ValueError, match="broken"):
        next(ready)


def test_a_caller_that_stops_early_ends_the_thread() -> None:
    before = set(threading.enumerate())
    ready = ahead(iter(int, 1), depth=1)
    next(ready)
    (made,) = set(threading.enumerate()) - before
    ready.close()  # type: ignore[attr-defined]
    assert not made.is_alive()


def test_waiting_is_told_from_working(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items that take 20 ms to make and 60 ms to use: a quarter of the time is waiting."""
    now = [7.0]
    monkeypatch.setattr("fusion.data.loading.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def items() -> Iterator[int]:
        for i in range(5):
            now[0] += 0.02
            yield i

    wait = DataWait()
    for _ in wait.watch(items()):
        now[0] += 0.06
    assert wait.share == pytest.approx(0.25)
    assert wait.total_s == pytest.approx(0.4)
    both = DataWait()
    both.add(wait)
    both.add(wait)
    assert both.share == pytest.approx(wait.share)
    assert DataWait().share == 0


def test_loaders_fit_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's cores are for training; GPUs share the cores, and get eight processes at most."""
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert default_loaders("cpu", 4) == 0
    assert [default_loaders("cuda", n) for n in (1, 2, 8, 16)] == [8, 7, 1, 1]


def test_kept_features_stay_within_their_budget(few_posts: Path) -> None:
    """A post that does not fit is read anew each time; what comes is the same."""

    class Counting(FeatureFiles):
        reads = 0

        def features(self, *arguments: Any) -> Any:
            Counting.reads += 1
            return super().features(*arguments)

    posts = PostList.read(few_posts / "train.json", support.LABELS)
    for cache_mb, reads in ((0, 74), (1, 37)):
        Counting.reads = 0
        build = PostDataset(
            posts, Counting(), support.manifest(), support.schema(), cache_mb=cache_mb
        )
        first, again = ([build[i] for i in range(37)] for _ in range(2))
        assert Counting.reads == reads
        for one, other in zip(first, again, strict=True):
            assert one.post_id == other.post_id
            assert one.arrays.keys() == other.arrays.keys()
            assert all(np.array_equal(one.arrays[s], other.arrays[s]) for s in one.arrays)


def test_every_post_once_an_epoch_in_a_new_order() -> None:
    batches = EpochBatches(33, 8, 5, rank=0, world=1)
    seen = []
    for epoch in (1, 2, 1):
        batches.epoch = epoch
        seen.append(list(batches))
    assert seen[0] == seen[2] != seen[1]
    assert sorted(i for batch in seen[0] for i in batch) == list(range(33))
    assert [len(b) for b in seen[0]] == [8, 8, 8, 9]
    assert len(batches) == 4


@pytest.mark.parametrize(("count", "size"), [(5, 8), (2, 1), (16, 8), (17, 8), (18, 8), (3, 2)])
def test_batches_know_their_number(count: int, size: int) -> None:
    batches = EpochBatches(count, size, 0, rank=0, world=1)
    dealt = list(batches)
    assert len(dealt) == len(batches)
    assert sorted(i for batch in dealt for i in batch) == list(range(count))


def test_processes_share_an_epoch() -> None:
    both = [list(EpochBatches(21, 4, 0, rank=r, world=2)) for r in range(2)]
    alone = list(EpochBatches(21, 4, 0, rank=0, world=1))
    assert len(both[0]) == len(both[1]) == len(alone)
