"""A stalled King's Python stacks, written down before it is killed."""

from __future__ import annotations

import os
import time
from datetime import datetime, timezone
from pathlib import Path

import psutil
import structlog

from king.stacks import DUMP_SIGNAL, stack_file

# The King sets the file aside at 4 MiB when it starts; a King that never starts stops here.
_MAX_BYTES = 8 * 2**20
# Stacks come within milliseconds; a shorter step only burns CPU, a longer one delays the restart.
_STEP_S = 0.05

log = structlog.get_logger()


def catches(pid: int, number: int) -> bool:
    """Tell whether a process handles a signal; without a handler the signal would end it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def send_signal(pid: int, number: int) -> None:
    """Send a signal to a process that may just have ended."""
    try:
        os.kill(pid, number)
    except OSError as error:
        log.warning("watchdog.signal_failed", pid=pid, reason=error.strerror)


def write_stacks(pid: int, health_file: Path, reason: str, wait_s: float) -> Path | None:
    """Let the King append its Python stacks to the stack file; never raises.

    Args:
        pid: Process ID of the King.
        health_file: The King's; the stack file lies next to it.
        reason: One line for the head of the entry.
        wait_s: Time for the King to write; a stopped process writes nothing, and is not waited for.

    Returns:
        The file; None when it cannot be written.
    """
    path = stack_file(health_file)
    try:
        status = str(psutil.Process(pid).status())
    except psutil.Error:
        status = "gone"
    moment = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        if not path.exists() or path.stat().st_size < _MAX_BYTES:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"==== {moment} pid {pid} ({status}): {reason}\n")
        size = path.stat().st_size
        if status != psutil.STATUS_STOPPED and catches(pid, DUMP_SIGNAL):
            os.kill(pid, DUMP_SIGNAL)
            end = time.monotonic() + wait_s
            while time.monotonic() < end and path.stat().st_size == size:
                time.sleep(_STEP_S)
            time.sleep(_STEP_S)  # the rest of the stacks, once the first have come
    except OSError:
        return path if path.exists() else None
    return path
