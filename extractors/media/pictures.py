"""Picture files ─► RGB pixels, by OpenCV.

Handled: EXIF orientation, alpha (laid on white), grey, palettes, 16 bits, CMYK, animations.
Refused with the reason: truncated files, more pixels than allowed, what is no picture.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from common.errors import MediaError
from extractors.media.picture_header import PictureHeader, read_header
from extractors.media.sniff import check_type

Pixels: TypeAlias = npt.NDArray[np.uint8]

_FULL_SIDE = 1024
"""JPEGs are decoded at 1/2, 1/4 or 1/8 size as long as the shorter side keeps this many pixels.

Not a setting: features must not depend on what else (OCR) a picture is decoded for.
"""
_REDUCED = {
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_TURNS = {
    3: cv2.ROTATE_180,
    4: cv2.ROTATE_180,
    5: cv2.ROTATE_90_CLOCKWISE,
    6: cv2.ROTATE_90_CLOCKWISE,
    7: cv2.ROTATE_90_COUNTERCLOCKWISE,
    8: cv2.ROTATE_90_COUNTERCLOCKWISE,
}
_MIRRORED = (2, 4, 5, 7)


def read_pictures(path: Path, *, max_pixels: int, max_frames: int = 1) -> Iterator[Pixels]:
    """Decode a picture file, one uint8 RGB ``(height, width, 3)`` at a time.

    A still gives one picture. An animation gives the centre frames of at most `max_frames` equal
    parts, its first frame where only one is asked for: that is what viewers show as the still.

    Raises:
        MediaError: The file is no picture, truncated, broken, or has more than `max_pixels`.
    """
    found = check_type(path, "image")
    try:
        buffer = np.asarray(np.memmap(path, np.uint8, "r"))
    except OSError as error:
        raise MediaError(f"cannot be read: {error.strerror}") from error
    header = read_header(buffer.data, found.family)
    if header.width * header.height > max_pixels:
        size = f"{header.width}×{header.height}"
        raise MediaError(f"{size} pixels are more than decode.max_pixels: {max_pixels}")
    try:
        yield from _decode(buffer, header, found.family, max_frames)
    except cv2.error as error:
        raise MediaError(f"{found.name} cannot be decoded: {error.err}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep libjpeg, libpng and OpenCV from writing to standard error, where the log goes.

    What they say comes as a `MediaError` or is harmless. libjpeg prints past OpenCV's log level,
    so that the descriptor itself is turned away for the milliseconds of one picture.
    """
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        kept = os.dup(2)
    except OSError:  # a process without standard error
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a device, not a path
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _decode(
    buffer: Pixels, header: PictureHeader, family: str, max_frames: int
) -> Iterator[Pixels]:
    if header.frames > 1 and max_frames > 1:
        count = min(max_frames, header.frames)
        for index in centres(header.frames, count):
            # One frame at a time: an animation whole may be a hundred times its file.
            with _quiet():
                done, animation = cv2.imdecodeanimation(buffer, start=index, count=1)
            if not done or not len(animation.frames):
                raise MediaError(f"frame {index} of {header.frames} cannot be decoded")
            yield _finish(animation.frames[0], header.orientation)
        return
    if family == "jpeg":
        flags = _REDUCED.get(_reduction(header), cv2.IMREAD_COLOR) | cv2.IMREAD_IGNORE_ORIENTATION
    else:
        flags = cv2.IMREAD_UNCHANGED
    with _quiet():
        pixels = cv2.imdecode(buffer, flags)
    if pixels is None:
        raise MediaError(f"broken {family.upper()} picture")
    yield _finish(pixels, header.orientation)


def centres(total: int, parts: int) -> list[int]:
    """Index of the centre item of each of `parts` equal parts of `total` items."""
    return [(2 * i + 1) * total // (2 * parts) for i in range(parts)]


def _reduction(header: PictureHeader) -> int:
    shorter = min(header.width, header.height)
    return next((factor for factor in (8, 4, 2) if shorter // factor >= _FULL_SIDE), 1)


def _finish(pixels: npt.NDArray[Any], orientation: int) -> Pixels:
    """Grey, BGR or BGRA of any depth ─► upright RGB of 8 bits."""
    if pixels.dtype == np.uint16:
        pixels = cv2.convertScaleAbs(pixels, alpha=1 / 257)  # 65535 ─► 255
    elif pixels.dtype != np.uint8:  # floating-point TIFF, 0 to 1
        pixels = (np.clip(np.nan_to_num(pixels), 0, 1) * 255).astype(np.uint8)
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    elif pixels.shape[2] == 4:
        pixels = _on_white(pixels)
    else:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    if orientation in _TURNS:
        pixels = cv2.rotate(pixels, _TURNS[orientation])
    if orientation in _MIRRORED:
        pixels = cv2.flip(pixels, 1)
    return np.asarray(pixels, np.uint8)


def _on_white(pixels: Pixels) -> Pixels:
    """Lay BGRA on a white page, a band of rows at a time: RGB."""
    colours = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB), np.uint8)
    alpha = pixels[:, :, 3]
    if alpha.min() == 255:
        return colours
    for top in range(0, len(colours), 256):
        band = colours[top : top + 256].astype(np.uint16)  # (rows, width, 3)
        cover = alpha[top : top + 256, :, None].astype(np.uint16)  # (rows, width, 1)
        colours[top : top + 256] = (band * cover + 255 * (255 - cover) + 127) // 255
    return colours


def squash(pixels: Pixels, width: int, height: int) -> Pixels:
    """Scale a whole picture to a size; nothing is cropped.

    Shrinking averages areas. An axis that grows while the other shrinks is scaled after it:
    OpenCV averages only where both shrink, and would alias otherwise.
    """
    rows, columns = pixels.shape[:2]
    small = (min(width, columns), min(height, rows))
    scaled: Any = pixels
    if small != (columns, rows):
        scaled = cv2.resize(scaled, small, interpolation=cv2.INTER_AREA)
    if small != (width, height):
        scaled = cv2.resize(scaled, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(scaled, np.uint8)


def fitted_size(width: int, height: int, max_side: int) -> tuple[int, int]:
    """Width and height, shrunk in proportion so that the longer side is at most `max_side`."""
    longer = max(width, height)
    if longer <= max_side:
        return width, height
    return max(1, round(width * max_side / longer)), max(1, round(height * max_side / longer))
