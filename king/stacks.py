"""On SIGUSR2 the King writes the Python stack of each of its threads into a file, and lives on.

The signal handler is C code that needs neither the interpreter lock nor the main thread, so it
shows where a King hangs. A King that is stopped, or hangs inside the kernel, cannot answer.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
from collections.abc import Iterator
from pathlib import Path

import structlog

DUMP_SIGNAL = signal.SIGUSR2
# The file is set aside at this size: some hundred dumps, and still quick to open.
_LIMIT_BYTES = 4 * 2**20

log = structlog.get_logger()


def stack_file(health_file: Path) -> Path:
    """Return the file of the stacks, which lies next to the health file."""
    return health_file.with_suffix(".stacks")


@contextlib.contextmanager
def dumped_on_signal(health_file: Path) -> Iterator[None]:
    """Answer `DUMP_SIGNAL` inside the block; only warn when the file cannot be opened."""
    path = stack_file(health_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _LIMIT_BYTES:
            path.replace(path.with_name(path.name + ".1"))
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        log.warning("king.stack_file_failed", file=str(path), error=error.strerror)
        yield
        return
    with file:
        faulthandler.register(DUMP_SIGNAL, file=file, all_threads=True)
        try:
            yield
        finally:
            # Ignored and not default: a late signal must not end a King that ends by itself.
            faulthandler.unregister(DUMP_SIGNAL)
            signal.signal(DUMP_SIGNAL, signal.SIG_IGN)
