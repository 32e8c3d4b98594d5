"""Notes which of our modules run while a test asks, in this process and in real workers."""

import os
import pkgutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from workers.pool.supervisor import ROLES
from workers.protocol import WorkerRole
from workers.roles.loop import Context

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("common", "config", "extractors", "fusion", "king", "workers")
FOLDER = "TRACE_FOLDER"
"""Environment variable with the folder in which workers write what they noted."""

TRACED: dict[WorkerRole, str] = dict.fromkeys(ROLES, "tests.support.workers.tracing:run")


class Trace:
    """The files whose functions begin or end while it is on, in threads that start later.

    Args:
        threads: How the names of these threads begin.
    """

    def __init__(self, threads: tuple[str, ...] = ("",)) -> None:
        self.on = False
        self._threads = threads
        self._files: set[str] = set()
        threading.setprofile(self._note)

    def _note(self, frame: Any, event: str, _argument: object) -> None:
        if not self.on or event not in ("call", "return"):
            return
        if threading.current_thread().name.startswith(self._threads):
            self._files.add(frame.f_code.co_filename)

    def note_this_thread(self) -> None:
        """Note this thread too, from now on."""
        self.on = True
        sys.setprofile(self._note)

    def stop(self) -> None:
        """Stop noting, and leave this thread and new ones alone."""
        self.on = False
        sys.setprofile(None)
        threading.setprofile(None)

    @property
    def modules(self) -> set[str]:
        """The modules of ours, as ``workers/plan.py``."""
        inside = [Path(file) for file in self._files if file.startswith(str(ROOT))]
        names = {str(path.relative_to(ROOT)) for path in inside}
        return {name for name in names if name.partition("/")[0] in PACKAGES}


def run(context: Context) -> None:
    """Run the real role: SIGUSR1 begins to note, SIGUSR2 writes what was noted."""
    trace = Trace()

    def begin(_number: int, _frame: object) -> None:
        trace.note_this_thread()

    def write(_number: int, _frame: object) -> None:
        trace.stop()
        path = Path(os.environ[FOLDER]) / context.launch.name
        path.with_suffix(".part").write_text("\n".join(trace.modules))
        path.with_suffix(".part").rename(path)

    signal.signal(signal.SIGUSR1, begin)
    signal.signal(signal.SIGUSR2, write)
    pkgutil.resolve_name(ROLES[context.launch.role])(context)
