"""Slots: who holds which, and when it is free."""

from __future__ import annotations

import pytest

from workers.pool.slots import SlotTable


def test_slot_is_free_after_release_and_last_task() -> None:
    """A slot outlives its release as long as a task refers to it, and no longer."""
    table = SlotTable(1)
    slot = table.acquire()
    assert slot == 0
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
    """Releasing twice, referring to a released slot, or to none, is an error and not a leak."""
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
