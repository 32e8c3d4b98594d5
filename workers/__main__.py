"""A worker process: ``python -m workers DESCRIPTOR KING_PID``; only the pool starts it."""

from __future__ import annotations

import os
import sys

from workers.roles.loop import main

status = main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
# Not sys.exit: taking torch and the codecs apart takes seconds, and a drain would wait for it.
os._exit(status)
