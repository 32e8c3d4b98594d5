"""Stages of long work, each skipped when it was done from the same inputs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from common.files import write_whole


def run_stage(
    stamp: Path, inputs: str, outputs: tuple[Path, ...], work: Callable[[], None]
) -> None:
    """Run a stage, unless its stamp says that the outputs were made from these inputs.

    The stamp is written last, so that half an output has none.
    """
    done = all(path.exists() for path in (stamp, *outputs))
    if done and stamp.read_text(encoding="utf-8") == f"{inputs}\n":
        sys.stderr.write(f"{stamp.name}: there already\n")
        return
    sys.stderr.write(f"{stamp.name}\n")
    stamp.unlink(missing_ok=True)
    started = time.monotonic()
    work()
    write_whole(stamp, inputs)
    sys.stderr.write(f"  {time.monotonic() - started:.0f} s\n")
