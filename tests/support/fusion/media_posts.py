"""Posts with small real pictures and videos, whose colours tell their tags."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import media

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


def write_labels(folder: Path) -> Path:
    path = folder / "labels.json"
    path.write_text(json.dumps({str(i): name for i, name in enumerate(COLOURS)}), encoding="utf-8")
    return path


def write_pictures(folder: Path, name: str, count: int, *, seed: int = 0) -> Path:
    """Posts with one or two pictures of one colour, and their data file."""
    chance = np.random.default_rng(seed)
    entries: list[Any] = []
    (folder / name).mkdir(parents=True)
    for i in range(count):
        colour = list(COLOURS)[i % len(COLOURS)]
        paths = []
        for number in range(1 + i % 2):
            path = folder / name / f"{i}-{number}.jpg"
            media.write_jpeg(path, _noisy(COLOURS[colour], chance))
            paths.append(str(path.relative_to(folder)))
        entries.append({"post_id": f"{name}{i}", "labels": [colour], "images": paths})
    return _write(folder, name, entries)


def write_videos(folder: Path, name: str, count: int, *, seed: int = 0) -> Path:
    """Posts with a clip of one colour that fades in, and their data file."""
    chance = np.random.default_rng(seed)
    entries: list[Any] = []
    (folder / name).mkdir(parents=True)
    for i in range(count):
        colour = list(COLOURS)[i % len(COLOURS)]
        frames = [_noisy(COLOURS[colour], chance) for _ in range(12 + i % 3)]
        path = media.write_video(folder / name / f"{i}.mp4", frames)
        entry = {"post_id": f"{name}{i}", "labels": [colour]}
        entries.append({**entry, "videos": [str(path.relative_to(folder))]})
    return _write(folder, name, entries)


def _noisy(colour: tuple[int, int, int], chance: np.random.Generator) -> media.Pixels:
    noise = chance.integers(-25, 26, (48, 64, 3))
    return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)


def _write(folder: Path, name: str, entries: list[Any]) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path
