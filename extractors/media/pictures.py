"""Picture files -> upright RGB pixels.

Pillow reads the header and checks the file to its end. It decodes JPEG, PNG, WebP and animations;
OpenCV decodes the rest, and what has more than 8 bits a colour, and scales.

Alpha is laid on white. Refused with the reason: truncated files, more pixels than allowed, what is
no picture.
"""

from __future__ import annotations

import contextlib
import mmap
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.ExifTags import Base as Tag

from common.errors import MediaError
from extractors.media.sniff import MAX_PARTS, FileType, check_type

Pixels: TypeAlias = npt.NDArray[np.uint8]

Image.MAX_IMAGE_PIXELS = None  # decode.max_pixels is the limit, checked before a pixel is decoded

_FULL_SIDE = 1024
"""JPEGs are decoded at 1/2, 1/4 or 1/8 size as long as the shorter side keeps this many pixels.

At half of it, encoders of 512 pixels would get pictures that are enlarged again; at double, most
photographs would be decoded whole, at four times the cost. Not a setting: features must not depend
on what else (OCR) a picture is decoded for.
"""

_MAX_SCANS = 500
"""Scans of a JPEG: progressive ones have about ten, and each may cost a pass over all pixels.

Half would still be 25 times what encoders write; double lets a file of 100 megapixels take minutes.
"""

_BY_PILLOW = ("jpeg", "png", "webp")
"""Formats whose pixels are Pillow's. The rest it only checks: it takes damage in their pixels."""

_PNG_DEPTH_AT = 24
"""Offset of the bits of one colour in a PNG; Pillow would cut 16 to 8 without rounding."""

_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the picture upright."""


def read_pictures(path: Path, *, max_pixels: int, max_frames: int = 1) -> Iterator[Pixels]:
    """Decode a picture file, one uint8 RGB ``(height, width, 3)`` at a time.

    A still gives one picture. An animation gives the centre frames of at most `max_frames` equal
    parts, or its first frame where `max_frames` is 1: viewers show that one as the still.

    Raises:
        MediaError: The file is no picture, truncated, broken, or has more than `max_pixels`.
    """
    picture = _open(path)
    _check_size(picture.width, picture.height, max_pixels)
    if picture.frames == 1 or max_frames == 1:
        yield _decode_still(picture)
        return
    image = picture.image
    for index in centres(picture.frames, min(max_frames, picture.frames)):
        with _reading(picture.file_type):
            image.seek(index)
            # A frame of a GIF may lie outside its canvas, which grows then.
            _check_size(image.width, image.height, max_pixels)
            pixels = _rgb(image)
        yield pixels


def picture_size(path: Path) -> tuple[int, int]:
    """Return the width and height of a picture, upright, without decoding it.

    Raises:
        MediaError: The file is no picture, truncated or broken.
    """
    picture = _open(path)
    return picture.width, picture.height


class _Source(mmap.mmap):
    """A file as Pillow reads it: every segment, chunk or block by one or more calls."""

    _reads = 0

    def read(self, n: int | None = None) -> bytes:
        self._reads += 1
        if self._reads > 2 * MAX_PARTS:
            raise ValueError("more parts than can be meant")
        return super().read(n)


@dataclass(frozen=True)
class _Picture:
    """A picture file, its pixels not decoded yet.

    Attributes:
        width: Of the picture turned upright.
        height: Of the picture turned upright.
        frames: Pictures of an animation; 1 for a still.
        image: What Pillow opened; None for TIFF.
    """

    file_type: FileType
    source: _Source
    width: int
    height: int
    frames: int
    image: Any


def _open(path: Path) -> _Picture:
    file_type = check_type(path, "image")
    try:
        with path.open("rb") as file:
            source = _Source(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise MediaError(f"cannot be read: {error.strerror}") from error
    image: Any = None
    frames, stream = 1, cast("IO[bytes]", source)
    with _reading(file_type):
        if file_type.family == "tiff":
            exif = Image.Exif()
            exif.load_from_fp(stream)
            width, height = exif[Tag.ImageWidth], exif[Tag.ImageLength]
        else:
            image = Image.open(stream, formats=[file_type.family])
            if file_type.family == "png":
                image.verify()  # checksums up to the last chunk's, whose own is left
                if len(source.read(4)) < 4:
                    raise ValueError("truncated")
                image = Image.open(stream, formats=["png"])  # `verify` leaves it unusable
            elif file_type.family == "jpeg":
                _check_scans(source)
            elif file_type.family == "gif":
                frames = _gif_frames(source)
            if file_type.family in ("png", "webp"):
                frames = image.n_frames
            width, height = image.size
            exif = _exif(image)
        if width < 1 or height < 1:
            raise ValueError("no pixels")
    if exif.get(Tag.Orientation) in (5, 6, 7, 8):
        width, height = height, width
    return _Picture(file_type, source, width, height, frames, image)


@contextlib.contextmanager
def _reading(file_type: FileType) -> Iterator[None]:
    """Turn what Pillow and OpenCV raise at a bad file into one line.

    Raises:
        MediaError: The file is truncated or broken.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata, which a picture does not need
        try:
            yield
        except MediaError:
            raise
        except MemoryError as error:
            reason = "needs more memory than decode.memory_mb allows"
            raise MediaError(f"{file_type.name} {reason}") from error
        except Exception as error:  # readers of broken bytes raise anything; no common base class
            verdict = "truncated" if "truncated" in str(error).lower() else "broken"
            raise MediaError(f"{verdict} {file_type.name}") from error


def _check_scans(source: _Source) -> None:
    scans = re.finditer(b"\xff\xda", source)
    if sum(1 for _ in islice(scans, _MAX_SCANS + 1)) > _MAX_SCANS:
        raise ValueError("more scans than can be meant")


def _gif_frames(source: _Source) -> int:
    """Count the frames of a GIF; Pillow would take a truncated animation for a shorter one.

    Raises:
        ValueError: The file ends before its trailer, or is nothing but blocks.
    """

    def colour_table_bytes(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    frames = blocks = 0
    try:
        position = 13 + colour_table_bytes(source[10])
        while (mark := source[position]) != ord(";"):
            if mark == ord(","):  # a frame; everything else is an extension
                frames += 1
                position += 9 + colour_table_bytes(source[position + 9])
            position += 2
            while length := source[position]:
                position += 1 + length
                blocks += 1
                if blocks > MAX_PARTS:
                    raise ValueError("more blocks than can be meant")
            position += 1
    except IndexError as error:
        raise ValueError("truncated") from error
    return frames


def _exif(image: Any) -> Image.Exif:
    """Return a picture's EXIF; an empty one where it is absent or broken."""
    exif = Image.Exif()
    with contextlib.suppress(Exception):  # as in `_reading`
        exif.load(image.info.get("exif", b""))
    return exif


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise MediaError(f"{width}×{height} pixels are more than decode.max_pixels: {max_pixels}")


def _decode_still(picture: _Picture) -> Pixels:
    image, family = picture.image, picture.file_type.family
    with _reading(picture.file_type):
        if family == "tiff":
            return _decode_by_opencv(picture.source)
        if family == "jpeg":
            factor = _reduction(*image.size)
            image.draft(None, (image.width // factor, image.height // factor))
        if family in _BY_PILLOW:
            image.load()
        if family not in _BY_PILLOW or (family == "png" and picture.source[_PNG_DEPTH_AT] == 16):
            pixels = Image.fromarray(_decode_by_opencv(picture.source))
            return np.asarray(_upright(pixels, image))
        return _rgb(image)


def centres(total: int, parts: int) -> list[int]:
    """Return the index of the centre item of each of `parts` equal parts of `total` items."""
    return [(2 * i + 1) * total // (2 * parts) for i in range(parts)]


def _reduction(width: int, height: int) -> int:
    shorter = min(width, height)
    return next((factor for factor in (8, 4, 2) if shorter // factor >= _FULL_SIDE), 1)


def _rgb(image: Any) -> Pixels:
    """Decode the current frame of a picture of 8 bits: upright, on white."""
    image.load()  # EXIF of a PNG may stand behind the pixels
    upright = _upright(image, image)
    if image.mode == "CMYK":
        return _from_cmyk(np.asarray(upright))
    if image.has_transparency_data:
        return _on_white(np.asarray(upright.convert("RGBA")))
    return np.asarray(upright.convert("RGB"))


def _upright(pixels: Any, image: Any) -> Any:
    turn = _TRANSPOSED.get(_exif(image).get(Tag.Orientation, 1))
    return pixels if turn is None else pixels.transpose(turn)


def _from_cmyk(pixels: Pixels) -> Pixels:
    """Convert ``(height, width, 4)`` to RGB, rounded as libraries of print pictures round it."""
    inks = 255 - pixels.astype(np.uint16)
    black = inks[:, :, 3:]
    return np.asarray(black - ((255 - inks[:, :, :3]) * black >> 8), np.uint8)


def _decode_by_opencv(source: _Source) -> Pixels:
    """Decode a still of any depth to RGB of 8 bits; only a TIFF comes upright."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it raises what matters
    pixels: Any = cv2.imdecode(np.frombuffer(source, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("OpenCV cannot decode it")
    if pixels.dtype == np.uint16:
        pixels = cv2.convertScaleAbs(pixels, alpha=1 / 257)  # 65535 -> 255
    elif pixels.dtype != np.uint8:  # floating-point TIFF, 0 to 1
        pixels = (np.clip(np.nan_to_num(pixels), 0, 1) * 255).astype(np.uint8)
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB), np.uint8)
    if pixels.shape[2] == 4:
        return _on_white(np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA), np.uint8))
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)


def _on_white(pixels: Pixels) -> Pixels:
    """Lay RGBA ``(height, width, 4)`` on a white page, a band of rows at a time: RGB."""
    colours, alpha = np.ascontiguousarray(pixels[:, :, :3]), pixels[:, :, 3:]
    if alpha.min() == 255:
        return colours
    rows = 256  # whole pictures as uint16 would need three times their memory
    for top in range(0, len(colours), rows):
        band = colours[top : top + rows].astype(np.uint16)  # (rows, width, 3)
        cover = alpha[top : top + rows].astype(np.uint16)  # (rows, width, 1)
        colours[top : top + rows] = (band * cover + 255 * (255 - cover) + 127) // 255
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
