"""Batches are read ahead; how long training waits for them is measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusion.data.loading import DataWait, ahead, default_loaders
from tests.support.fusion import runs


def test_items_come_in_order_and_are_made_ahead() -> None:
    """While the first is used the next ones are made, up to the depth and no further."""
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    found = ahead(items(), depth=3)
    assert next(found) == 0
    deadline = time.monotonic() + 60
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 5, "one used, three ready, one in hand"
    assert list(found) == list(range(1, 20))


def test_a_mistake_in_the_thread_is_raised_where_the_item_was_wanted() -> None:
    """After the items that were made before it."""

    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="broken"):
        next(found)


def test_a_caller_that_stops_early_ends_the_thread() -> None:
    before = set(threading.enumerate())
    found = ahead(iter(int, 1), depth=1)
    next(found)
    (made,) = set(threading.enumerate()) - before
    found.close()  # type: ignore[attr-defined]
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


def test_a_training_says_how_long_it_waited(posts: Path) -> None:
    """In its report and in the log of every epoch; here reading is a small part."""
    report = runs.run(posts, trainer={"epochs": 2})
    shares = [e["data_wait"] for e in runs.events(posts) if e["event"] == "epoch"]
    assert len(shares) == 2
    assert all(0 <= share < 0.5 for share in shares)
    assert min(shares) <= report.data_wait <= max(shares)
