"""Things that a run may leave behind: processes, shared memory, spool files.

This process makes itself the subreaper of its descendants: whatever loses its parent becomes a
child of this process, so that no orphan can hide, whatever it calls itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36
# Memory is held from a worker's start to its death, which are seconds apart; more often would load
# the machine that is measured: each look reads the maps of every process.
_LOOK_EVERY_S = 2.0
_ARENA = "memfd:insighttag-slots"


def become_subreaper() -> None:
    """Have the kernel hand all orphans to this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


class Watch:
    """A memory of everything that belongs to the run; tells at its end what is left."""

    def __init__(self) -> None:
        self._shm = _shm_files()
        self._arenas: set[int] = set()
        self._files: set[str] = set()

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Look all the time while the block runs: a process may be killed at any moment."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(_LOOK_EVERY_S):
                self.look()

        thread = threading.Thread(target=look, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def look(self) -> None:
        """Note the shared memory that the processes hold now."""
        for process in _descendants():
            arenas, files = _shared_memory(process.pid)
            self._arenas |= arenas
            self._files |= files

    def orphans(self, allowed: set[int], wait_s: float = 10.0) -> list[str]:
        """Return living descendants of this process but for those allowed; reap the dead."""
        end = time.monotonic() + wait_s
        while True:
            alive = []
            for process in _descendants():
                with contextlib.suppress(psutil.Error):
                    if process.status() == psutil.STATUS_ZOMBIE:
                        _reap(process.pid, allowed)
                    elif process.pid not in allowed:
                        alive.append(f"{process.pid} {process.name()}")
            if not alive or time.monotonic() > end:
                return alive
            time.sleep(0.2)

    def segments(self) -> list[str]:
        """Return arenas that a process of the run still holds, and its new files in ``/dev/shm``.

        Of the run is what one of its processes was seen to use: other programs on this machine
        make such files as well, and may be killed and leave them.
        """
        held = set[int]()
        for process in psutil.process_iter():
            held |= _shared_memory(process.pid)[0]
        arenas = [f"memfd {inode}" for inode in sorted(held & self._arenas)]
        return arenas + sorted((_shm_files() - self._shm) & self._files)

    @property
    def arenas(self) -> int:
        """Return the number of arenas that were seen."""
        return len(self._arenas)


def spool_files(folder: Path) -> list[str]:
    """Return files and folders under the spool; the lock file that all Kings share is none."""
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != ".lock"]


def _descendants() -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process().children(recursive=True)
    return []


def _reap(pid: int, allowed: set[int]) -> None:
    if pid not in allowed and psutil.Process(pid).ppid() == os.getpid():
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _shared_memory(pid: int) -> tuple[set[int], set[str]]:
    """Return what a process has open or mapped: inodes of slots' memory, files in ``/dev/shm``."""
    arenas, files = set[int](), set[str]()
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = str(link.readlink())
                if _ARENA in target:
                    arenas.add(link.stat().st_ino)
                files.add(target)
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if _ARENA in line:
                arenas.add(int(line.split()[4]))
            elif "/dev/shm/" in line:
                files.add(line[line.index("/dev/shm/") :])
    return arenas, files


def _shm_files() -> set[str]:
    """Return this user's files in ``/dev/shm``."""
    names = set[str]()
    with contextlib.suppress(OSError):
        for path in Path("/dev/shm").iterdir():
            with contextlib.suppress(OSError):
                if path.stat().st_uid == os.getuid():
                    names.add(str(path))
    return names
