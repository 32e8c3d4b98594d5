"""The identity of processes, and a pool that is safe around torch, OpenCV and Ctrl-C."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from sysconfig import get_path
from typing import Any

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")

_MMAP_BYTES, _TRIM_BYTES = 32 << 20, 128 << 20
"""Blocks that malloc takes from its heap, and free memory that it keeps at the heap's end. The
first holds a picture of 11 megapixels; half would leave out those of 6, double is no more than
glibc takes. The second holds several of them at once; with half, a large file costs its pages anew,
with double each process keeps that much more from the others."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def cores(quota: Path = _CPU_QUOTA) -> int:
    """Count the CPU cores that this process may use: of its affinity, and of a container's quota.

    A quota is kept by pauses: processes for all cores of the machine would wait in turn.
    """
    allowed = len(os.sched_getaffinity(0))
    try:
        limit_us, period_us = quota.read_text(encoding="ascii").split()
        return max(1, min(allowed, math.ceil(int(limit_us) / int(period_us))))
    except (OSError, ValueError, ZeroDivisionError):  # no cgroups of version 2, or "max"
        return allowed


def python_path(environ: Mapping[str, str]) -> str:
    """Return a PYTHONPATH with which a new process imports the same packages of ours.

    Installed ones need none: site-packages would then come before the standard library.
    """
    root = str(Path(__file__).resolve().parents[__name__.count(".")])
    others = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    ours = [] if root == get_path("purelib") else [root]
    return os.pathsep.join(dict.fromkeys([*ours, *others]))


def keep_freed_memory() -> None:
    """Let malloc keep what is freed for the next task, instead of giving it back to the system.

    New pages are zeroed one at a time when they are first written: a quarter of a JPEG's CPU time
    in a decoder. Libraries of C other than glibc go on as they do.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)


def process_identity(pid: int) -> str | None:
    """Return an identity that no other process of this host has; None once it has ended.

    It is made of the boot and of the clock ticks from there to the process's start. Start times as
    dates (`psutil.Process.create_time`) move whenever the clock is set.

    Raises:
        OSError: The system cannot tell, for example because no descriptors are left.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # After the command, which may hold spaces and brackets: state (field 3), ..., start (field 22).
    fields = stat.rpartition(")")[2].split()
    if fields[0] in ("Z", "X"):
        return None
    return f"{_BOOT_ID.read_text(encoding='ascii').strip()}-{fields[19]}"


def running_s(pid: int) -> float | None:
    """Return how long a process has run, however the clock was set; None once it has ended."""
    identity = process_identity(pid)
    if identity is None:
        return None
    ticks = int(identity.rpartition("-")[2])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def process_pool(
    processes: int, prepare: Callable[..., object], *arguments: Any
) -> ProcessPoolExecutor:
    """Return a pool of spawned processes; shut it down, for example with ``with``.

    A fork would carry the parent's locks, threads and database connections along. Ctrl-C is left to
    the parent, and the processes end when the parent does. ``prepare`` is called with the arguments
    in every process before its first task; what it raises breaks the pool.
    """
    return ProcessPoolExecutor(
        processes,
        mp_context=get_context("spawn"),
        initializer=_begin,
        initargs=(prepare, arguments),
    )


def _begin(prepare: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*arguments)


def _end_with_parent() -> None:
    # A killed parent would leave its children waiting for tasks for ever.
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
