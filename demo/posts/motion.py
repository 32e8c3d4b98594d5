"""Clips in which only the motion tells the tag.

The picture is a torus: what leaves it on one side comes back on the other, and every motion
starts at a place that is drawn uniformly. So the place of the object in any single frame is
uniform too, whatever the motion: a frame alone says nothing, and the order of frames says all.

The object is on a dark stage between a red lamp on the right and a blue one at the bottom: its
colour tells where it is, so that even a very small model can follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import numpy.typing as npt

from demo.posts.pictures import Colour, Picture, background, disturb

FRAMES = 16
FRAME_RATE_HZ = 8
CLIP_SIZES = ((128, 96), (96, 128), (112, 112))

Path = npt.NDArray[np.float64]


def _straight(dx: float, dy: float) -> Callable[[np.random.Generator, Path], Path]:
    def path(rng: np.random.Generator, time: Path) -> Path:
        length = rng.uniform(1.0, 1.5)
        return length * np.stack([dx * time, dy * time], axis=1)

    return path


def _shake(rng: np.random.Generator, time: Path) -> Path:
    return rng.uniform(-0.25, 0.25, (len(time), 2))


def _swing(rng: np.random.Generator, time: Path) -> Path:
    phase, turns = rng.uniform(0, 2 * np.pi), rng.uniform(1.0, 1.4)
    return np.stack([0.24 * np.sin(2 * np.pi * turns * time + phase), 0 * time], axis=1)


def _orbit(rng: np.random.Generator, time: Path) -> Path:
    angle = rng.uniform(0, 2 * np.pi) + 2 * np.pi * rng.uniform(1.0, 1.4) * time
    return 0.24 * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _still(rng: np.random.Generator, time: Path) -> Path:
    return np.zeros((len(time), 2))


PATHS: dict[str, Callable[[np.random.Generator, Path], Path]] = {
    "up": _straight(0, -1),
    "down": _straight(0, 1),
    "right": _straight(1, 0),
    "shake": _shake,
    "swing": _swing,
    "orbit": _orbit,
    "still": _still,
    "left": _straight(-1, 0),
}
NEUTRAL_PATHS = ("still", "left")


def clip(rng: np.random.Generator, keys: Sequence[str], noise: float = 0.0) -> list[Picture]:
    """Draw ``FRAMES`` frames, BGR uint8 ``(height, width, 3)``, of the first motion named."""
    key = keys[0] if keys else str(rng.choice(NEUTRAL_PATHS))
    width, height = CLIP_SIZES[int(rng.integers(len(CLIP_SIZES)))]
    ground = background(rng, width, height) // 6
    shape, radius = int(rng.integers(3)), rng.uniform(0.16, 0.22)
    green = int(rng.integers(60, 160))
    path = rng.random(2) + PATHS[key](rng, np.arange(FRAMES) / FRAMES)
    path += rng.normal(0, 0.1 * noise, path.shape)
    frames = []
    for x, y in path % 1.0:
        frame = ground.copy()
        colour = (int(20 + 235 * y), green, int(20 + 235 * x))
        for shift_x in (-1, 0, 1):
            for shift_y in (-1, 0, 1):
                place = (int((x + shift_x) * width), int((y + shift_y) * height))
                _body(frame, place, int(radius * min(width, height)), shape, colour)
        frames.append(disturb(rng, frame, noise * 0.5))
    return frames


def _body(frame: Picture, place: tuple[int, int], radius: int, shape: int, colour: Colour) -> None:
    x, y = place
    if shape == 0:
        cv2.circle(frame, place, radius, colour, -1, cv2.LINE_AA)
    elif shape == 1:
        side = int(radius * 0.88)
        cv2.rectangle(frame, (x - side, y - side), (x + side, y + side), colour, -1)
    else:
        points = [(x - radius, y), (x, y - radius), (x + radius, y), (x, y + radius)]
        cv2.fillPoly(frame, [np.asarray(points, np.int32)], colour, cv2.LINE_AA)
