"""Swap the bundle of a fusion worker many times while it tags: resident memory, and time of a swap.

The worker is the daemon's own, in the real pool; the other roles are stand-ins, so that nothing but
swaps and fusion is measured. Two small bundles take turns, each time under a version of now, put in
place as ``insighttag bundle use`` does. The first swaps are a warm-up: allocators get their size.

Run: ``python bench/bundle_swaps.py [--small]``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

import numpy as np
import psutil
from floors import finish
from results_file import FOLDER

from common.post import Features
from fusion.bundle.folder import put_bundle
from tests.support.workers.driving import Driver, toy_settings
from tests.support.workers.small_bundle import write_bundle
from tests.support.workers.toys import ROLES as TOYS
from workers.pool.supervisor import ROLES
from workers.protocol import BundleLoaded, FuseTask

# The features that the stand-ins say they give.
_SUITE: Any = SimpleNamespace(
    dims={"text": 64},
    fingerprints={"text": "fp-text"},
    features=SimpleNamespace(ocr_mode="separate"),
)


def measure(folder: Path, swaps: int, warm: int) -> dict[str, Any]:
    """Swap ``warm`` and then ``swaps`` times; return the growth over the latter."""
    for seed in (0, 1):
        write_bundle(folder / f"b{seed}", _SUITE, seed=seed, name=f"b{seed}")
    served = folder / "served"
    put_bundle(folder / "b0", served, anew=False)
    settings = toy_settings(folder / "spool", fusion={"bundle": str(served), "reload_s": 0.001})
    driver = Driver(settings, {**TOYS, "fuse": ROLES["fuse"]}).start()
    post = Features("p", {"text": np.ones((2, 64), np.float16)}, {"text": "ok"})
    try:
        process = psutil.Process(driver.pid("fuse-0"))
        driver.run(FuseTask(post))
        took, sizes = [], []
        for number in range(warm + swaps):
            name = f"b{(number + 1) % 2}"
            done = put_bundle(folder / name, served, anew=True, keep=False)
            began = time.monotonic()
            loaded = BundleLoaded(name, done.version)
            driver.until(lambda loaded=loaded: loaded in driver.told)  # type: ignore[misc]
            took.append(time.monotonic() - began)
            driver.told.clear()
            tags = driver.run(FuseTask(post))
            if (tags.model, tags.version) != (name, done.version):
                raise RuntimeError(f"{tags.model} {tags.version}, not {name} {done.version}")
            driver.told.clear()
            if number >= warm - 1:
                sizes.append(process.memory_info().rss)
        if process.pid != driver.pid("fuse-0"):
            raise RuntimeError("the worker was replaced")
    finally:
        driver.stop()
    return {
        "swaps": swaps,
        "resident_mb": {
            "warm": round(sizes[0] / 2**20, 2),
            "most": round(max(sizes) / 2**20, 2),
            "last": round(sizes[-1] / 2**20, 2),
        },
        "growth": round(max(sizes) / sizes[0] - 1, 5),
        "swap_ms": {
            "median": round(1000 * statistics.median(took), 2),
            "worst": round(1000 * max(took), 2),
        },
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of bundle_swaps.json")
    parser.add_argument("--small", action="store_true", help="60 swaps")
    options = parser.parse_args(arguments)
    swaps = 60 if options.small else 500
    with tempfile.TemporaryDirectory(prefix="insighttag-bench-") as folder:
        row = measure(Path(folder), swaps, warm=50)
    return finish("bundle_swaps", 1, [row], options.out, check=not options.small)


if __name__ == "__main__":
    sys.exit(main())
