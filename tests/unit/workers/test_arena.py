"""Shared memory: arrays in slots, and who holds which slot."""

import os

import numpy as np
import pytest

from common.errors import FeatureError, MediaError
from workers.pool.channel import Arena, SlotTable, create_arena
from workers.protocol import ArrayRef


def test_what_a_decoder_writes_an_extractor_reads() -> None:
    """Two mappings of one memory file show the same array, without a copy, at its own slot."""
    fd = create_arena(4 * 8192)
    writing, reading = Arena.map(fd, 4, 8192), Arena.map(fd, 4, 8192)
    os.close(fd)
    writer = writing.writer(2)
    first = writer((3, 5), np.dtype(np.uint8))
    first[...] = 7
    second = writer((2, 96), np.dtype(np.float32))
    second[...] = 1.5
    refs = [writer.ref(first), writer.ref(second[:1])]
    assert [ref.offset for ref in refs] == [0, 64]
    assert refs[1].shape == (1, 96)
    views = [reading.view(ref) for ref in refs]
    assert (views[0] == 7).all()
    assert (views[1] == 1.5).all()
    first[0, 0] = 9
    assert views[0][0, 0] == 9
    with pytest.raises(ValueError, match="read-only"):
        views[0][...] = 0
    del views, first, second
    writing.close()
    reading.close()


def test_arrays_from_elsewhere_are_copied_in() -> None:
    arena = Arena.private(1, 8192)
    writer = arena.writer(0)
    mine = writer((4, 6), np.dtype(np.uint8))
    mine[...] = np.arange(24).reshape(4, 6)
    for array in (mine[:, ::2], mine[1:], np.arange(6, dtype=np.float32)):
        ref = writer.ref(array)
        assert ref.offset % 64 == 0
        assert ref.offset > 0
        assert np.array_equal(arena.view(ref), array)
    del array, mine
    arena.close()


def test_slot_has_an_end() -> None:
    arena = Arena.private(2, 4096)
    writer = arena.writer(0)
    writer((4000,), np.dtype(np.uint8))
    with pytest.raises(MediaError, match="4096 bytes"):
        writer((100,), np.dtype(np.uint8))
    with pytest.raises(ValueError, match="no slot 2"):
        arena.writer(2)


@pytest.mark.parametrize(
    "bad",
    [
        ArrayRef(2, 0, (1,), "uint8"),
        ArrayRef(-1, 0, (1,), "uint8"),
        ArrayRef(0, 64, (4096,), "uint8"),
        ArrayRef(0, -64, (1,), "uint8"),
        ArrayRef(0, 1, (1,), "float32"),
        ArrayRef(0, 0, (1 << 62, 4), "uint8"),
        ArrayRef(0, 0, (-1, -5), "uint8"),
        ArrayRef(0, 0, (1,), "object"),
    ],
)
def test_references_are_checked(bad: ArrayRef) -> None:
    """A reference from a decoder that was taken over reads nothing outside its slot."""
    arena = Arena.private(2, 4096)
    with pytest.raises(FeatureError, match="slot"):
        arena.view(bad)
    arena.close()


def test_memory_file_cannot_be_shrunk() -> None:
    """No worker can take the ground from under the others."""
    fd = create_arena(8192)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)
    os.close(fd)


def test_slot_is_free_after_release_and_last_task() -> None:
    table = SlotTable(1)
    assert table.acquire() == 0
    assert table.acquire() is None
    table.hand_over(0)
    table.retain(0)
    table.retain(0)
    table.release(0)
    table.drop(0)
    assert table.free == 0
    table.drop(0)
    assert table.free == 1


def test_slot_misuse_is_told() -> None:
    table = SlotTable(1)
    table.acquire()
    with pytest.raises(ValueError, match="being written"):
        table.release(0)
    table.hand_over(0)
    table.release(0)
    for misuse in (table.release, table.retain, table.drop, table.abandon, table.hand_over):
        with pytest.raises(ValueError, match="slot 0"):
            misuse(0)
    with pytest.raises(ValueError, match="no slot 7"):
        table.retain(7)
    assert table.free == 1
    assert len(table) == 1
