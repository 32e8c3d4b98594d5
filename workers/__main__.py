"""A worker process: ``python -m workers DESCRIPTOR KING_PID``; only the pool starts it."""

from __future__ import annotations

import contextlib
import gc
import os
import sys

# Imports make millions of objects that live to the end, and the collector would walk over them
# again and again: a fifth of the time of a start. On again when the worker is ready.
gc.disable()

from common.processes import keep_freed_memory  # noqa: E402 - after the line above
from workers.roles.loop import main  # noqa: E402

keep_freed_memory()
status = main(sys.argv[1:])
for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError):  # the disk of the log is full
        stream.flush()
# Not sys.exit: taking torch and the codecs apart takes seconds, and a drain would wait for it.
os._exit(status)
