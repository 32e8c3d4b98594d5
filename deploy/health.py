"""The King's health file as the watchdog and ``insighttag status`` read it: never an exception."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from king.health import read_health


@dataclass(frozen=True)
class Snapshot:
    """What stands in the health file.

    Attributes:
        updated_at: Unix time in seconds at which the King's loop wrote it.
        phase: ``starting``, ``loading``, ``serving``, ``draining``, ``store_down``, …
        content: Everything that stands in the file.
    """

    pid: int
    updated_at: float
    phase: str
    content: Mapping[str, Any]

    @property
    def process_exists(self) -> bool:
        """Whether a process with its pid is there."""
        return psutil.pid_exists(self.pid)


def read_snapshot(path: Path) -> Snapshot | None:
    """Read the health file; None when it is missing, half written, or holds something else."""
    content = read_health(path)
    if content is None:
        return None
    try:
        return Snapshot(
            pid=int(content["pid"]),
            updated_at=float(content["updated_at"]),
            phase=str(content.get("phase", "")),
            content=content,
        )
    except (ValueError, TypeError, KeyError):
        return None
