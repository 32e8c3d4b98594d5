"""A worker process: ``python -m workers DESCRIPTOR KING_PID``; only the pool starts it."""

from __future__ import annotations

import sys

from workers.child import main

sys.exit(main(sys.argv[1:]))
