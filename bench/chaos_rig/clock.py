"""A clock that can be stepped under running processes, without the right to set the real one.

The daemon's interpreters import `follow` at their start (`Site.start_daemon`), which puts a clock
that is some seconds ahead in the place of `time.time`; how many stands in a file that they all
share. Log lines keep the true time, so that what happened when can be told.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

VARIABLE = "CHAOS_CLOCK"
_SECONDS = struct.Struct("d")


class Clock:
    """The file of the offset.

    Attributes:
        ahead_s: Seconds by which the daemon's clock is ahead of the true one.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.ahead_s = 0.0
        self.step(0)

    def step(self, seconds: float) -> None:
        """Move the daemon's clock."""
        self.ahead_s += seconds
        with self._file.open("r+b" if self._file.exists() else "w+b") as file:
            file.write(_SECONDS.pack(self.ahead_s))  # in place: it is mapped


def follow() -> None:
    """Step the clock of this process as the file in the environment says."""
    with Path(os.environ[VARIABLE]).open("rb") as file:
        offset = mmap.mmap(file.fileno(), _SECONDS.size, access=mmap.ACCESS_READ)
    true_time = time.time
    time.time = lambda: true_time() + _SECONDS.unpack_from(offset)[0]
