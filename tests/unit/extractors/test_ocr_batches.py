"""Networks that threads share run what waits in one shape as one pass."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from extractors.models.ocr_torch import Batches


class Doubler:
    """A network that doubles its rows; its first pass lasts until it is told to end.

    It says that memory is full where a pass has more rows than it holds.
    """

    device = "cpu"

    def __init__(self, holds: int = 1000) -> None:
        self.passes: list[tuple[int, ...]] = []
        self.began, self.end = threading.Event(), threading.Event()
        self.holds = holds

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        self.passes.append(tuple(rows.shape))
        self.began.set()
        assert self.end.wait(60)
        if len(rows) > self.holds:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        if bool((rows < 0).any()):
            raise ValueError("negative")
        return 2 * rows


@pytest.fixture
def doubler() -> Doubler:
    return Doubler()


def started(network: Any, most_pixels: int = 10_000) -> Iterator[Batches]:
    batches = Batches(network, lambda doubler, rows: doubler(rows), most_pixels)
    yield batches
    network.end.set()
    batches.close()


@pytest.fixture
def batches(doubler: Doubler) -> Iterator[Batches]:
    yield from started(doubler)


def rows(first: int, number: int, width: int = 4) -> np.ndarray:
    """Rows ``(number, 3, 1, width)`` of numbers that begin with `first`."""
    size = number * 3 * width
    return np.arange(first, first + size, dtype=np.float32).reshape(number, 3, 1, width)


def test_a_thread_that_is_alone_has_its_own_pass(doubler: Doubler, batches: Batches) -> None:
    doubler.end.set()
    for number in (1, 2):
        np.testing.assert_array_equal(batches(rows(5, number)), 2 * rows(5, number))
    assert [shape[0] for shape in doubler.passes] == [1, 2]


def test_what_waits_in_one_shape_is_one_pass(doubler: Doubler, batches: Batches) -> None:
    """Each caller gets its own rows, whatever else was in the pass."""
    calls = [rows(0, 1), rows(10, 2), rows(20, 1, width=8), rows(30, 3), rows(40, 1, width=8)]
    first = batches.begin(rows(99, 1))
    assert doubler.began.wait(60)
    waiting = [batches.begin(each) for each in calls]
    doubler.end.set()
    np.testing.assert_array_equal(first(), 2 * rows(99, 1))
    for each, result in zip(calls, waiting, strict=True):
        np.testing.assert_array_equal(result(), 2 * each)
    assert doubler.passes == [(1, 3, 1, 4), (6, 3, 1, 4), (2, 3, 1, 8)]


@pytest.mark.parametrize(
    ("most_pixels", "passes"), [(16, [1, 4, 2]), (8, [1, 2, 2, 2]), (2, [1, 2, 1, 2, 1])]
)
def test_a_pass_is_bounded(most_pixels: int, passes: list[int]) -> None:
    """In pixels; rows that come together stay together."""
    network = Doubler()
    for batches in started(network, most_pixels):
        calls = [batches.begin(rows(0, 1))]
        assert network.began.wait(60)
        calls += [batches.begin(rows(7 * i, number)) for i, number in enumerate((2, 1, 2, 1))]
        network.end.set()
        for call in calls:
            call()
    assert [shape[0] for shape in network.passes] == passes


def test_a_full_memory_halves_the_pass() -> None:
    network = Doubler(holds=2)
    network.end.set()
    for batches in started(network):
        np.testing.assert_array_equal(batches(rows(3, 5)), 2 * rows(3, 5))
        network.holds = 0
        with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
            batches(rows(3, 1))
    assert [shape[0] for shape in network.passes] == [5, 2, 3, 1, 2, 1]


def test_a_failed_pass_is_its_callers_alone(doubler: Doubler, batches: Batches) -> None:
    doubler.end.set()
    with pytest.raises(ValueError, match="negative"):
        batches(rows(-5, 1))
    np.testing.assert_array_equal(batches(rows(5, 1)), 2 * rows(5, 1))


def test_many_threads_get_their_own_rows(doubler: Doubler, batches: Batches) -> None:
    doubler.end.set()
    wrong: list[int] = []

    def ask(thread: int) -> None:
        for i in range(50):
            own = rows(1000 * thread + i, 1 + i % 3, width=4 * (1 + i % 2))
            if not np.array_equal(batches(own), 2 * own):
                wrong.append(thread)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(doubler.passes) <= 400
