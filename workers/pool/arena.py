"""The shared-memory arena: equal slots in one anonymous memory file.

The King makes the file and owns the slots; it never maps them. Decoders write a slot in place,
extractors read it as arrays without a copy. The file has no name, so that nothing is left behind
when every process that held its descriptor is gone, however it went.

The King counts who uses which slot (`SlotTable`):

    free -acquire-> written to by a decoder -hand_over-> owned by the caller -release-> free
                            |                                 |    ^                      ^
                            +-abandon-> free           retain-+----+-drop (last one) -----+

A slot is free again once its owner has released it and no task refers to it any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from common.errors import FeatureError, MediaError
from extractors.parts import ALIGNMENT
from workers.protocol import ArrayRef

_DTYPES = frozenset({"uint8", "float32", "float16"})

AnyArray = npt.NDArray[np.generic]


def create_arena(size_bytes: int) -> int:
    """Make the memory file and return its descriptor; its size is sealed.

    Without the seal a worker could shrink it, and every other worker would die of SIGBUS.
    """
    descriptor = os.memfd_create("insighttag-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size_bytes)
    fcntl.fcntl(
        descriptor,
        fcntl.F_ADD_SEALS,
        fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
    )
    return descriptor


class Arena:
    """A worker's mapping of all slots."""

    def __init__(self, mapping: mmap.mmap, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._mapping = mapping
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(mapping, dtype=np.uint8)

    @classmethod
    def map(cls, descriptor: int, slots: int, slot_bytes: int) -> Arena:
        return cls(mmap.mmap(descriptor, slots * slot_bytes), slots, slot_bytes)

    @classmethod
    def private(cls, slots: int, slot_bytes: int) -> Arena:
        """Return slots of this process alone; pages that are never written cost nothing."""
        return cls(mmap.mmap(-1, slots * slot_bytes), slots, slot_bytes)

    def view(self, ref: ArrayRef) -> AnyArray:
        """Return the array that a reference names, read-only and without a copy.

        Raises:
            FeatureError: The reference does not lie inside its slot.
        """
        if ref.dtype not in _DTYPES or any(n < 0 for n in ref.shape):
            raise FeatureError(f"slot {ref.slot}: no array of {ref.dtype} {ref.shape}")
        inside = 0 <= ref.slot < self.slots and ref.offset >= 0 and ref.offset % ALIGNMENT == 0
        if not inside or ref.offset + ref.nbytes > self.slot_bytes:
            raise FeatureError(f"slot {ref.slot}: {ref.shape} at {ref.offset} is out of bounds")
        start = ref.slot * self.slot_bytes + ref.offset
        flat = self._bytes[start : start + ref.nbytes]
        view = flat.view(np.dtype(ref.dtype)).reshape(ref.shape)  # (nbytes,) -> ref.shape
        view.flags.writeable = False
        return view

    def writer(self, slot: int) -> SlotWriter:
        if not 0 <= slot < self.slots:
            raise ValueError(f"there is no slot {slot}")
        start = slot * self.slot_bytes
        return SlotWriter(slot, self._bytes[start : start + self.slot_bytes])

    def close(self) -> None:
        """Unmap, unless an array still looks into it."""
        self._bytes = np.empty(0, dtype=np.uint8)
        with contextlib.suppress(BufferError):
            self._mapping.close()


class SlotWriter:
    """A writer of arrays into one slot, in turn (`extractors.media.decode.Allocate`)."""

    def __init__(self, slot: int, room: npt.NDArray[np.uint8]) -> None:
        self.slot = slot
        self._room = room
        self._base = room.__array_interface__["data"][0]
        self._used = 0

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> AnyArray:
        """Return a writable array in the slot.

        Raises:
            MediaError: The slot is full: the file gives more than the settings allow for.
        """
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        if start + size > len(self._room):
            raise MediaError(f"decoded to more than a slot holds ({len(self._room)} bytes)")
        self._used = start + size
        return self._room[start : start + size].view(dtype).reshape(shape)  # (size,) -> shape

    def ref(self, array: AnyArray) -> ArrayRef:
        """Return a reference to an array; one that does not lie in the slot is copied in.

        Raises:
            MediaError: It must be copied and the slot is full.
        """
        offset = array.__array_interface__["data"][0] - self._base
        in_place = (
            array.flags.c_contiguous
            and offset >= 0
            and offset + array.nbytes <= len(self._room)
            and offset % ALIGNMENT == 0
        )
        if not in_place:
            copy = self(array.shape, array.dtype)
            copy[...] = array
            return self.ref(copy)
        return ArrayRef(self.slot, offset, tuple(array.shape), array.dtype.name)


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
    """States and reference counts of all slots; `ValueError` for a step that is not allowed."""

    def __init__(self, count: int) -> None:
        self._slots = [_Slot() for _ in range(count)]
        self._free = list(range(count))[::-1]

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def free(self) -> int:
        return len(self._free)

    def acquire(self) -> int | None:
        """Return a free slot for a decoder to write, or None.

        The one that was freed last comes first: its pages are warm, and pages of slots that the
        load never needs are never touched.
        """
        if not self._free:
            return None
        slot = self._free.pop()
        self._slots[slot].state = _State.WRITING
        return slot

    def hand_over(self, slot: int) -> None:
        self._expect(slot, _State.WRITING).state = _State.OWNED

    def abandon(self, slot: int) -> None:
        """Free a slot whose decoder failed or died."""
        self._make_free(slot, self._expect(slot, _State.WRITING))

    def retain(self, slot: int) -> None:
        self._expect(slot, _State.OWNED).refs += 1

    def drop(self, slot: int) -> None:
        """Discount a task that referred to the slot and has ended."""
        entry = self._slots[slot]
        if entry.refs < 1:
            raise ValueError(f"slot {slot}: no task refers to it")
        entry.refs -= 1
        if entry.refs == 0 and entry.state is _State.RELEASED:
            self._make_free(slot, entry)

    def release(self, slot: int) -> None:
        """Free the slot once no task refers to it: the caller submits no more of them."""
        entry = self._expect(slot, _State.OWNED)
        entry.state = _State.RELEASED
        if entry.refs == 0:
            self._make_free(slot, entry)

    def _expect(self, slot: int, state: _State) -> _Slot:
        if not 0 <= slot < len(self._slots):
            raise ValueError(f"there is no slot {slot}")
        entry = self._slots[slot]
        if entry.state is not state:
            raise ValueError(f"slot {slot} is {entry.state.value}, not {state.value}")
        return entry

    def _make_free(self, slot: int, entry: _Slot) -> None:
        entry.state, entry.refs = _State.FREE, 0
        self._free.append(slot)
