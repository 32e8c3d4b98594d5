"""Who holds which shared-memory slot: pure counting, no memory is touched here.

    free ─acquire─► written to by a decoder ─hand_over─► owned by the caller ─release─► free
                            │                                 │    ▲                      ▲
                            └─abandon─► free          retain ─┴────┴─ drop (last one) ────┘

A slot is free again once its owner has released it and no task refers to it any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class _State(Enum):
    FREE = "free"
    WRITING = "being written"
    OWNED = "owned"
    RELEASED = "released"


@dataclass(slots=True)
class _Slot:
    state: _State = _State.FREE
    refs: int = 0


class SlotTable:
    """States and reference counts of all slots."""

    def __init__(self, count: int) -> None:
        self._slots = [_Slot() for _ in range(count)]
        self._free = list(range(count))[::-1]

    def __len__(self) -> int:
        """Number of slots."""
        return len(self._slots)

    @property
    def free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def acquire(self) -> int | None:
        """A free slot for a decoder to write, or None.

        The one that was freed last comes first: its pages are warm, and pages of slots that the
        load never needs are never touched.
        """
        if not self._free:
            return None
        slot = self._free.pop()
        self._slots[slot].state = _State.WRITING
        return slot

    def hand_over(self, slot: int) -> None:
        """The decoder is done: the slot belongs to the caller until it is released."""
        self._expect(slot, _State.WRITING).state = _State.OWNED

    def abandon(self, slot: int) -> None:
        """The decoder failed or died: the slot is free."""
        self._expect(slot, _State.WRITING)
        self._make_free(slot)

    def retain(self, slot: int) -> None:
        """A task refers to the slot.

        Raises:
            ValueError: The slot is not owned by the caller (any more).
        """
        self._expect(slot, _State.OWNED).refs += 1

    def drop(self, slot: int) -> None:
        """A task that referred to the slot has ended.

        Raises:
            ValueError: No task refers to the slot.
        """
        entry = self._slots[slot]
        if entry.refs < 1:
            raise ValueError(f"slot {slot}: no task refers to it")
        entry.refs -= 1
        if entry.refs == 0 and entry.state is _State.RELEASED:
            self._make_free(slot)

    def release(self, slot: int) -> None:
        """The caller submits no more tasks that refer to the slot.

        Raises:
            ValueError: The slot is not owned by the caller, so it was released before.
        """
        entry = self._expect(slot, _State.OWNED)
        entry.state = _State.RELEASED
        if entry.refs == 0:
            self._make_free(slot)

    def _expect(self, slot: int, state: _State) -> _Slot:
        if not 0 <= slot < len(self._slots):
            raise ValueError(f"there is no slot {slot}")
        entry = self._slots[slot]
        if entry.state is not state:
            raise ValueError(f"slot {slot} is {entry.state.value}, not {state.value}")
        return entry

    def _make_free(self, slot: int) -> None:
        entry = self._slots[slot]
        entry.state, entry.refs = _State.FREE, 0
        self._free.append(slot)
