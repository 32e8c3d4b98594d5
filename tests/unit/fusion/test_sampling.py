"""The order of posts, shared by one process or several."""

from __future__ import annotations

import pytest

from fusion.data.sampling import EpochBatches


def test_every_post_once_an_epoch_in_a_new_order() -> None:
    """The order depends on seed and epoch alone, and no batch is left with one post."""
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
    found = list(batches)
    assert len(found) == len(batches)
    assert sorted(i for batch in found for i in batch) == list(range(count))


def test_processes_share_an_epoch() -> None:
    """Two processes see every post together, in the same number of steps."""
    both = [list(EpochBatches(21, 4, 0, rank=r, world=2)) for r in range(2)]
    alone = list(EpochBatches(21, 4, 0, rank=0, world=1))
    assert len(both[0]) == len(both[1]) == len(alone)
