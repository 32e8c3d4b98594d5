"""Pictures: drawn objects, and signs with words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

Picture: TypeAlias = npt.NDArray[np.uint8]
Colour: TypeAlias = tuple[int, int, int]

SCENE_SIZES = ((160, 120), (120, 160), (128, 128))
SIGN_SIZE = (192, 144)


def background(rng: np.random.Generator, width: int, height: int) -> Picture:
    """Return a colour gradient in a random direction, uint8 ``(height, width, 3)``."""
    first, second = rng.integers(40, 200, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    ramp = np.clip(0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle), 0, 1)
    ground: Picture = (first + ramp[..., None] * (second - first)).astype(np.uint8)
    return ground


def contrast(rng: np.random.Generator, below: Sequence[int]) -> Colour:
    """Return a random colour that stands out from another."""
    while True:
        colour = rng.integers(0, 256, 3)
        if int(np.abs(colour - np.asarray(below)).sum()) > 230:
            return (int(colour[0]), int(colour[1]), int(colour[2]))


HUES = {"sun": (15, 35), "house": (-12, 12), "tree": (45, 75), "fish": (95, 130), "cloud": None}
"""OpenCV's hue (0 to 180) of each object, as one would paint it; None is grey."""


def paint(rng: np.random.Generator, name: str, below: Sequence[int]) -> Colour:
    """Return a colour for an object, lighter or darker than what is below it."""
    hue = HUES[name]
    dark = sum(below) > 3 * 125
    value = rng.integers(60, 110) if dark and hue is not None else rng.integers(190, 256)
    if hue is None:
        return (int(value),) * 3
    hsv = np.array([[[rng.integers(*hue) % 180, rng.integers(170, 256), value]]], np.uint8)
    blue, green, red = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0]
    return (int(blue), int(green), int(red))


def _polygon(picture: Picture, points: npt.ArrayLike, colour: Colour) -> None:
    cv2.fillPoly(picture, [np.asarray(points, np.int32)], colour, cv2.LINE_AA)


def _sun(picture: Picture, x: int, y: int, r: int, colour: Colour) -> None:
    for angle in np.arange(0, 2 * np.pi, np.pi / 5):
        ray = (int(np.cos(angle) * r), int(np.sin(angle) * r))
        cv2.line(picture, (x, y), (x + ray[0], y + ray[1]), colour, max(2, r // 9), cv2.LINE_AA)
    cv2.circle(picture, (x, y), int(r * 0.55), colour, -1, cv2.LINE_AA)


def _house(picture: Picture, x: int, y: int, r: int, colour: Colour) -> None:
    wall, roof = int(r * 0.7), int(r * 0.15)
    dark = (colour[0] // 3, colour[1] // 3, colour[2] // 3)
    cv2.rectangle(picture, (x - wall, y - roof), (x + wall, y + r), colour, -1)
    _polygon(picture, [(x - r, y - roof), (x, y - r), (x + r, y - roof)], dark)
    cv2.rectangle(picture, (x - r // 6, y + r // 3), (x + r // 6, y + r), dark, -1)


def _tree(picture: Picture, x: int, y: int, r: int, colour: Colour) -> None:
    cv2.rectangle(picture, (x - r // 8, y), (x + r // 8, y + r), (40, 60, 90), -1)
    for level, half in ((-1.0, 0.4), (-0.55, 0.6), (-0.1, 0.8)):
        top, base = y + int(r * level), y + int(r * (level + 0.7))
        _polygon(picture, [(x - int(r * half), base), (x, top), (x + int(r * half), base)], colour)


def _fish(picture: Picture, x: int, y: int, r: int, colour: Colour) -> None:
    cv2.ellipse(picture, (x, y), (int(r * 0.75), int(r * 0.4)), 0, 0, 360, colour, -1, cv2.LINE_AA)
    tail = [(x - int(r * 0.5), y), (x - r, y - int(r * 0.45)), (x - r, y + int(r * 0.45))]
    _polygon(picture, tail, colour)
    cv2.circle(picture, (x + int(r * 0.45), y - r // 10), max(2, r // 10), (0, 0, 0), -1)


def _cloud(picture: Picture, x: int, y: int, r: int, colour: Colour) -> None:
    for dx, dy, size in ((-0.55, 0.1, 0.35), (0.0, -0.15, 0.5), (0.55, 0.1, 0.38)):
        centre = (x + int(dx * r), y + int(dy * r))
        cv2.circle(picture, centre, int(size * r), colour, -1, cv2.LINE_AA)
    cv2.rectangle(picture, (x - int(0.6 * r), y), (x + int(0.6 * r), y + int(0.42 * r)), colour, -1)


OBJECTS: dict[str, Callable[[Picture, int, int, int, Colour], None]] = {
    "sun": _sun,
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "cloud": _cloud,
}


def _clutter(rng: np.random.Generator, picture: Picture) -> None:
    height, width = picture.shape[:2]
    for _ in range(int(rng.integers(1, 4))):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        dx, dy = (int(v) for v in rng.integers(-14, 15, 2))
        shade = contrast(rng, picture[y, x].tolist())
        if rng.random() < 0.5:
            cv2.line(picture, (x, y), (x + dx, y + dy), shade, 2, cv2.LINE_AA)
        else:
            cv2.rectangle(picture, (x, y), (x + abs(dx) // 2, y + abs(dy) // 2), shade, -1)


def disturb(rng: np.random.Generator, picture: Picture, noise: float) -> Picture:
    """Add Gaussian pixel noise of ``60 × noise`` grey levels."""
    if noise <= 0:
        return picture
    grain = rng.normal(0, 60 * noise, picture.shape)
    return np.clip(picture + grain, 0, 255).astype(np.uint8)


def scene(rng: np.random.Generator, objects: Sequence[str], noise: float = 0.0) -> Picture:
    """Return a picture with up to two objects side by side, BGR uint8 ``(height, width, 3)``."""
    width, height = SCENE_SIZES[int(rng.integers(len(SCENE_SIZES)))]
    picture = background(rng, width, height)
    _clutter(rng, picture)
    places = max(1, len(objects))
    along = width >= height  # the side that two objects share
    room = min(width / places, height) if along else min(width, height / places)
    for i in range(len(objects)):
        radius = int(room * rng.uniform(0.38, 0.48))
        low = (width * i / places if along else 0, 0 if along else height * i / places)
        high = (
            width * (i + 1) / places if along else width,
            height if along else height * (i + 1) / places,
        )
        x = int(rng.uniform(low[0] + radius, max(low[0] + radius + 1, high[0] - radius)))
        y = int(rng.uniform(low[1] + radius, max(low[1] + radius + 1, high[1] - radius)))
        colour = paint(rng, objects[i], picture[y, x].tolist())
        OBJECTS[objects[i]](picture, x, y, radius, colour)
    return disturb(rng, picture, noise)


def sign(rng: np.random.Generator, words: Sequence[str], noise: float = 0.0) -> Picture:
    """Return a sign with one word a line, BGR uint8 ``(144, 192, 3)``; its look is random."""
    width, height = SIGN_SIZE
    light = bool(rng.random() < 0.5)
    shade = rng.integers(175, 256, 3) if light else rng.integers(0, 70, 3)
    picture = np.full((height, width, 3), shade, np.uint8)
    ink = (15, 15, 15) if light else (245, 245, 245)
    if rng.random() < 0.5:
        cv2.rectangle(picture, (3, 3), (width - 4, height - 4), ink, 2)
    font, step = cv2.FONT_HERSHEY_SIMPLEX, (height - 16) // max(1, len(words))
    for i in range(len(words)):
        (span, tall), _ = cv2.getTextSize(words[i], font, 1.0, 2)
        scale = min(0.95, (width - 28) / span)
        x = int(rng.integers(12, max(13, width - 12 - int(span * scale))))
        y = 8 + step * i + (step + int(tall * scale)) // 2
        cv2.putText(picture, words[i], (x, y), font, scale, ink, 2, cv2.LINE_AA)
    return disturb(rng, picture, noise * 0.5)
