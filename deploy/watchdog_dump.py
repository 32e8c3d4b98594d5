"""Where a stalled King hangs, written down before it is killed.

Two views in one file beside the health file: the King's own Python stacks, asked for by a signal
(`king.stacks`), and what the kernel says of its threads, for one that cannot answer.
"""

from __future__ import annotations

import os
import time
from datetime import datetime, timezone
from pathlib import Path

import psutil

from king.stacks import DUMP_SIGNAL, stack_file

_STEP_S = 0.05
_LIMIT_BYTES = 8 * 2**20


def write_dump(pid: int, health_file: Path, reason: str, wait_s: float) -> Path | None:
    """Append both views; never an exception, for the kill must not fail by it.

    Args:
        pid: Of the King.
        health_file: Of the King.
        reason: One line for the head of the entry.
        wait_s: How long the King is given to answer.

    Returns:
        The file; None when it cannot be written.
    """
    path = stack_file(health_file)
    moment = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        _append(path, f"==== {moment} pid {pid}: {reason}\n")
        if not _stopped(pid) and catches(pid, DUMP_SIGNAL):
            before = path.stat().st_size
            os.kill(pid, DUMP_SIGNAL)
            _wait_for_answer(path, before, wait_s)
        _append(path, f"-- threads of {pid}, as the kernel sees them\n{threads(pid)}\n")
    except OSError:
        return path if path.exists() else None
    return path


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; without one the signal would end it."""
    caught = _status(Path(f"/proc/{pid}")).get("SigCgt", "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def threads(pid: int) -> str:
    """State, name, wait channel, system call and kernel stack of each thread, as far as allowed."""
    lines: list[str] = []
    try:
        tasks = sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda task: int(task.name))
    except OSError:
        return "no such process"
    for task in tasks:
        status = _status(task)
        # The kernel's stack needs privileges that the watchdog seldom has.
        facts = {name: _read(task / name).strip() for name in ("wchan", "syscall", "stack")}
        shown = [f"{name} {' < '.join(text.splitlines())}" for name, text in facts.items() if text]
        shown.insert(0, status.get("State", "?"))
        lines.append(f"{task.name} {status.get('Name', '?')}: {', '.join(shown)}")
    return "\n".join(lines)


def _status(process: Path) -> dict[str, str]:
    pairs = (line.partition(":") for line in _read(process / "status").splitlines())
    return {name: value.strip() for name, _, value in pairs}


def _stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False


def _wait_for_answer(path: Path, before: int, wait_s: float) -> None:
    """Wait until the file has grown, and then stands still."""
    end = time.monotonic() + wait_s
    size = before
    while time.monotonic() < end:
        time.sleep(_STEP_S)
        now = path.stat().st_size
        if now > before and now == size:
            return
        size = now


def _append(path: Path, text: str) -> None:
    if path.exists() and path.stat().st_size > _LIMIT_BYTES:
        return  # the King sets a long file aside when it starts
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
