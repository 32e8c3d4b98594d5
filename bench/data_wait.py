"""Measure how long training waits for data, and how memory grows, with 100,000 posts on disk.

Feature files of synthetic posts are written once (a few tokens of scheme 1's sizes each), then
`train_net.py`'s trainer learns one epoch of the first 1,000, 10,000 and 100,000 of them with the
default fusion model, each in a process of its own. Files are put out of the system's cache before,
so that they are read from the disk.

Run: ``python bench/data_wait.py [--posts 1000 10000 100000] [--folder DIR]``; needs about 3 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from results_file import write_results

from common.post import MODALITIES, Features, Modality, Stream
from common.progress import progress_bar
from config.labels import LabelMap
from config.load import validate
from config.presets import merge
from config.train import TrainSettings
from extractors.feature_file import feature_path, features_bytes

DIMS: dict[Stream, int] = {"video": 1024, "image": 1024, "audio": 128, "text": 768, "ocr": 768}
TOKENS: dict[Stream, int] = {"video": 2, "image": 1, "audio": 4, "text": 8, "ocr": 2}
CLASSES, VALID = 24, 500
LABELS = LabelMap(tuple(f"tag{i}" for i in range(CLASSES)))
_KINDS = 64  # posts that differ; the others repeat them under IDs of their own


def write_posts(folder: Path, count: int) -> None:
    """Write feature files and the data files that name them; keep those that exist."""
    if (folder / "done").exists() and int((folder / "done").read_text()) >= count:
        return
    (folder / "labels.json").write_text(json.dumps(LABELS.as_json()))
    fingerprints = {stream: f"{stream}-bench" for stream in DIMS}
    chance = np.random.default_rng(0)
    kinds = [_arrays(chance) for _ in range(_KINDS)]
    entries: list[str] = []
    with progress_bar("write features", count + VALID) as bar:
        for i in range(count + VALID):
            arrays, tags = kinds[i % _KINDS]
            statuses: dict[Modality, Any] = {
                m: "ok" if m in arrays else "missing" for m in MODALITIES
            }
            features = Features(f"post{i:07}", arrays, statuses)
            path = feature_path(folder / "features", features.post_id)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(features_bytes(features, fingerprints))
            labels = [LABELS.names[tag] for tag in tags]
            at = str(path.relative_to(folder))
            entries.append(
                json.dumps({"post_id": features.post_id, "labels": labels, "features": at})
            )
            bar.advance()
    (folder / "valid.json").write_text("[" + ",\n".join(entries[count:]) + "]")
    (folder / "all.jsonl").write_text("\n".join(entries[:count]))
    (folder / "done").write_text(str(count))


def _arrays(chance: np.random.Generator) -> tuple[dict[Stream, Any], list[int]]:
    tags = [int(t) for t in chance.choice(CLASSES, chance.integers(1, 4), replace=False)]
    arrays = {}
    for stream, dim in DIMS.items():
        if chance.random() < 0.15 and stream != "text":
            continue
        values = chance.normal(0, 1, (TOKENS[stream], dim))
        values[:, tags] += 3
        arrays[stream] = values.astype(np.float16)
    return arrays, tags


def subset(folder: Path, count: int) -> Path:
    """Return a data file of the first posts."""
    file = folder / f"train{count}.json"
    with (folder / "all.jsonl").open() as lines:
        entries = [line.rstrip("\n") for line, _ in zip(lines, range(count), strict=False)]
    file.write_text("[" + ",\n".join(entries) + "]")
    return file


def forget(folder: Path) -> None:
    """Put the feature files out of the system's cache."""
    os.sync()
    for path in _files(folder / "features"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _files(root: Path) -> Iterator[str]:
    for part in os.scandir(root):
        for entry in os.scandir(part.path):
            yield entry.path


def measure(folder: Path, count: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Train one epoch in this process: waiting, speed, and the highest memory."""
    from fusion.data.dataset import FeatureFiles
    from fusion.train.training import train

    values = {
        "data": {
            "train": folder / f"train{count}.json",
            "valid": folder / "valid.json",
            "labels": folder / "labels.json",
        },
        "trainer": {
            "epochs": 1,
            "n_gpu": 0,
            "threads": 1,
            "fix_random_seed": True,
            "save_dir": folder / f"run{count}",
            "log_interval": 1000,
            "tensorboard": False,
        },
        "report": {"enabled": False},
        "bundle": {"name": "bench", "out": folder / "bundle"},
    }
    settings = validate(TrainSettings, merge(values, changes), "bench")
    report = train(settings, FeatureFiles())
    events = (report.run / "log" / "train.jsonl").read_text().splitlines()
    epoch = next(e for e in map(json.loads, reversed(events)) if e["event"] == "epoch")
    return {
        "posts": count,
        "cache_mb": settings.data.cache_mb,
        "loaders": settings.data.loaders,
        "data_wait": round(report.data_wait, 4),
        "posts_per_s": round(count / epoch["seconds"], 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def run(folder: Path, count: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Run `measure` in a process of its own, with nothing in the system's cache."""
    subset(folder, count)
    forget(folder)
    command = [sys.executable, __file__, "--measure", str(count), "--folder", str(folder)]
    done = subprocess.run(
        [*command, "--set", json.dumps(changes)], stdout=subprocess.PIPE, text=True, check=True
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> int:
    """Measure every size without a cache of our own, and the smallest with the default one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--posts", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument(
        "--folder", type=Path, help="kept, and used again; default: a temporary one"
    )
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--set", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder, options.measure, options.set)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        write_posts(folder, max(options.posts))
        results = [
            run(folder, n, merge({"data": {"cache_mb": 0}}, options.set)) for n in options.posts
        ]
        results.append(run(folder, min(options.posts), options.set))
    for row in results:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(f"results in {write_results('data_wait', 1, results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
