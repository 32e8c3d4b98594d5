"""The shared-memory arena: equal slots in one anonymous memory file.

The King makes the file and owns the slots; it never maps them. Decoders write a slot in place,
extractors read it as arrays without a copy. The file has no name, so that nothing is left behind
when every process that held its descriptor is gone, however it went.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os

import numpy as np
import numpy.typing as npt

from common.errors import FeatureError, MediaError
from extractors.parts import ALIGNMENT
from workers.protocol import ArrayRef

_DTYPES = frozenset({"uint8", "float32", "float16"})

AnyArray = npt.NDArray[np.generic]


def create_arena(size_bytes: int) -> int:
    """Make the memory file and give its descriptor; its size is sealed.

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
        if len(mapping) < slots * slot_bytes:
            raise ValueError(f"{len(mapping)} bytes are not {slots} slots of {slot_bytes}")
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._mapping = mapping
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(mapping, dtype=np.uint8)

    @classmethod
    def map(cls, descriptor: int, slots: int, slot_bytes: int) -> Arena:
        """Map the memory file that the King passed."""
        return cls(mmap.mmap(descriptor, slots * slot_bytes), slots, slot_bytes)

    @classmethod
    def private(cls, slots: int, slot_bytes: int) -> Arena:
        """Slots of this process alone; pages that are never written cost nothing."""
        return cls(mmap.mmap(-1, slots * slot_bytes), slots, slot_bytes)

    def view(self, ref: ArrayRef) -> AnyArray:
        """The array that a reference names, read-only and without a copy.

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
        """An allocator of arrays inside one slot.

        Raises:
            ValueError: There is no such slot.
        """
        if not 0 <= slot < self.slots:
            raise ValueError(f"there is no slot {slot}")
        start = slot * self.slot_bytes
        return SlotWriter(slot, self._bytes[start : start + self.slot_bytes])

    def close(self) -> None:
        """Unmap, as far as no array still looks into it."""
        self._bytes = np.empty(0, dtype=np.uint8)
        with contextlib.suppress(BufferError):
            self._mapping.close()


class SlotWriter:
    """Hands out arrays of one slot, one after the other (`extractors.media.decode.Allocate`)."""

    def __init__(self, slot: int, room: npt.NDArray[np.uint8]) -> None:
        self.slot = slot
        self._room = room
        self._base = room.__array_interface__["data"][0]
        self._used = 0

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> AnyArray:
        """A writable array in the slot.

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
        """Name an array: in place when it lies whole in the slot, else it is copied in.

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
