"""The file that every benchmark writes: ``bench/results/<name>.json``."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

from common.files import write_whole
from common.precision import cpu_has_bf16

FOLDER = Path(__file__).resolve().parent / "results"


def machine() -> str:
    """Return processor, arithmetic, cores and memory; nothing that names the host.

    One name of a processor may stand for several: those without bfloat16 take twice as long for
    text in pictures.
    """
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split("\n"):
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    memory_gib = round(psutil.virtual_memory().total / 2**30)
    arithmetic = "bf16" if cpu_has_bf16() else "no bf16"
    return f"{model} ({arithmetic}), {os.cpu_count()} cores, {memory_gib} GiB"


def commit() -> str:
    """Return the commit that was measured; ``+`` behind it when the tree differs from it.

    A tree that was packed (`bench/pack_gpu.py`) is no repository, and has it in the environment.
    """
    if packed := os.environ.get("PACKED_COMMIT"):
        return packed
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=FOLDER.parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip()


def write_results(name: str, runs: int, results: Any, folder: Path = FOLDER) -> Path:
    """Write a benchmark's results; gives the file."""
    file = folder / f"{name}.json"
    content = {
        "machine": machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "runs": runs,
        "results": results,
    }
    write_whole(file, json.dumps(content, indent=2, ensure_ascii=False))
    return file
