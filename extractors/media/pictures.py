"""Picture files -> upright RGB pixels.

Pillow reads the header and decodes nearly everything; simplejpeg (libjpeg-turbo) decodes whole
JPEGs; OpenCV decodes stills of GIF, TIFF, and PNG of 16 bits, and scales. The structure of JPEG,
PNG and GIF is walked here, to their end and no further.

Transparency is laid on white, or on black where it would vanish. Refused with the reason: files of
which too much is missing, more pixels than allowed, what is no picture.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image
from PIL.ExifTags import Base as Tag

from common.errors import MediaError
from extractors.media.sniff import MAX_PARTS, FileType, check_share, read_file
from extractors.parts import centres, reading_size

Pixels: TypeAlias = npt.NDArray[np.uint8]

Image.MAX_IMAGE_PIXELS = None  # decode.max_pixels is the limit, checked before a pixel is decoded

READ_SIDE, _SHORTER_SIDE = 960, 512
"""JPEGs are decoded at 1/2, 1/4 or 1/8 size as long as OCR can read them at the one, its default
`max_side`, and the shorter side keeps the other, for encoders of 512 pixels.

At half of them small print is lost, and encoders get pictures that are enlarged again; at double,
most photographs would be decoded whole, at up to four times the cost. Not a setting: features must
not depend on what else (OCR) a picture is decoded for.
"""

_MAX_SCANS = 500
"""Scans of a JPEG: progressive ones have about ten, and each may cost a pass over all pixels.

Half would still be 25 times what encoders write; double lets a file of 100 megapixels take minutes.
"""

_ANIMATED = ("png", "webp", "avif")
"""Formats whose number of frames Pillow knows; those of a GIF are counted here."""

_VANISHING = 208
"""Brightness, of 255, that does not stand out from a white page: white and pale text. At 192, light
grey stickers would get a black page; at 224, cream-coloured text would vanish."""

_VISIBLE_SHARE = 0.02
"""Share of the visible pixels that must stand out from white: of white letters hardly any do, the
outlines of a pale drawing are more."""

_PNG_DEPTH_AT = 24
"""Offset of the bits of one colour in a PNG; Pillow would cut 16 to 8 without rounding."""

_GREY_STEPS = {2: 85, 4: 17}  # bits of grey -> steps of 8 bits between two of its values

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


def read_pictures(
    path: Path,
    *,
    max_pixels: int,
    max_frames: int = 1,
    notes: list[str] | None = None,
    side: int = READ_SIDE,
) -> Iterator[Pixels]:
    """Decode a picture file, one uint8 RGB ``(height, width, 3)`` at a time.

    A still gives one picture. An animation gives the centre frames of at most `max_frames` equal
    parts, or its first frame where `max_frames` is 1: viewers show that one as the still.

    Args:
        path: The file; MediaError when it is no picture, broken, or too much of it is missing.
        max_pixels: Larger pictures are refused.
        max_frames: Most pictures of an animation.
        notes: Gets what is missing of a picture that is cut but used.
        side: JPEGs keep the size at which OCR reads them with this `max_side`, or more.
    """
    picture = _open(path, side)
    _check_size(picture.width, picture.height, max_pixels)
    note = picture.file_type.note
    if picture.frames == 1 or max_frames == 1:
        pixels, share = _still(picture)
        note = _check(share, "pixels", picture) or note
        yield pixels
    else:
        note = _check(picture.share, "frames", picture) or note
        image = picture.image
        for index in centres(picture.frames, min(max_frames, picture.frames)):
            with _reading(picture.file_type):
                image.seek(index)
                # A frame of a GIF may lie outside its canvas, which grows then.
                _check_size(image.width, image.height, max_pixels)
                pixels = _rgb(image)
            yield pixels
    if note and notes is not None:
        notes.append(note)


def _check(share: float, unit: str, picture: _Picture) -> str:
    return check_share(round(100 * share), 100, f"percent of its {unit}", picture.file_type)


def picture_size(path: Path) -> tuple[int, int]:
    """Return the width and height of a picture, upright, without decoding it."""
    picture = _open(path)
    return picture.width, picture.height


class _Source(io.BytesIO):
    """A file as Pillow reads it: every segment, chunk or block by one or more calls."""

    _reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > 2 * MAX_PARTS:
            raise ValueError("too many parts")
        return super().read(size)


@dataclass(frozen=True)
class _Picture:
    """A picture file, its pixels not decoded yet.

    Attributes:
        content: Of the file, up to the picture's end.
        width: Of the picture turned upright.
        height: Of the picture turned upright.
        orientation: By its EXIF; that of a PNG may stand behind the pixels.
        frames: Pictures of an animation; 1 for a still.
        share: Of its frames that are whole, in (0, 1].
        cut: Its end is missing.
        image: What Pillow opened; None for TIFF.
        side: As in `read_pictures`.
    """

    file_type: FileType
    content: bytes
    width: int
    height: int
    orientation: Any
    frames: int
    share: float
    cut: bool
    image: Any
    side: int


def _open(path: Path, side: int = READ_SIDE) -> _Picture:
    file_type, content = read_file(path, "image")
    family, frames, whole, cut = file_type.family, 1, 0, False
    image: Any = None
    with _reading(file_type):
        content = content[file_type.start :]
        if family == "tiff":
            exif = _tiff_tags(content)
            width, height = exif[Tag.ImageWidth], exif[Tag.ImageLength]
        else:
            if family == "heif":
                _know_heif(file_type)
            content, frames, whole, cut = _walked(content, family)
            image = _header(content, family)
            if family in _ANIMATED:
                frames = getattr(image, "n_frames", 1)
            width, height = image.size
            exif = _exif(image)
        if width < 1 or height < 1:
            raise ValueError("no pixels")
        orientation = exif.get(Tag.Orientation, 1)  # decoded only now, with warnings of its own
    if orientation in (5, 6, 7, 8):
        width, height = height, width
    share = whole / frames if cut and frames > 1 else 1.0
    return _Picture(file_type, content, width, height, orientation, frames, share, cut, image, side)


def _walked(content: bytes, family: str) -> tuple[bytes, int, int, bool]:
    """Return a picture as Pillow can read it, its frames, the whole ones, and True if it is cut."""
    match family:
        case "jpeg":
            content, cut = _jpeg(content)
            return content, 1, 0, cut
        case "png":
            content, cut, whole = _png(content)
            return content, 1, whole, cut
        case "gif":
            return _gif(content)
        case "webp":
            return _webp(content), 1, 0, False
    return content, 1, 0, False


def _header(content: bytes, family: str) -> Any:
    image = Image.open(_Source(content), formats=[family])
    clear = image.info.get("transparency")
    if family == "png" and image.mode == "L" and clear is not None:
        # Pillow spreads grey of 2 and 4 bits over 8, but not the grey that is transparent.
        image.info["transparency"] = clear * _GREY_STEPS.get(content[_PNG_DEPTH_AT], 1)
    return image


def _tiff_tags(content: bytes) -> Any:
    if b"+" in content[2:4]:  # BigTIFF, of which Pillow's `Exif` knows nothing
        return cast("Any", Image.open(_Source(content), formats=["tiff"])).tag_v2
    exif = Image.Exif()
    exif.load_from_fp(_Source(content))
    return exif


def _know_heif(file_type: FileType) -> None:
    try:
        from pi_heif import register_heif_opener
    except ImportError as error:
        raise MediaError(
            f"{file_type.name} cannot be decoded here: pip install '.[heic]'"
        ) from error
    register_heif_opener()


class _Cut(MediaError):
    """Raised where the pixels of a JPEG end before the file does."""


@contextlib.contextmanager
def _reading(file_type: FileType) -> Iterator[None]:
    """Turn what Pillow and OpenCV raise at a bad file into one line."""
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


_END_OF_JPEG = b"\xff\xd9"
_SEGMENT = re.compile(rb"\xff[\x01-\xfe]")
_BEHIND_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # neither a stuffed byte nor a restart
_METADATA = (*range(0xE0, 0xF0), 0xFE)
_NEEDED = (b"JFIF\0", b"Adobe", b"Exif\0")  # for the colours and the orientation
_NEEDED_BYTES = 12  # libjpeg ignores shorter ones, and Pillow refuses the picture

_BLANK_BYTES = 512
"""A block of a disk that was allocated and never written, at the end of a file that is cut. Half
could be the code of a large even area; double would hide that small pictures are cut."""


def _jpeg(data: bytes) -> tuple[bytes, bool]:
    """Return a JPEG up to its end without stray bytes between segments, and True where it is cut.

    Phones append films and further pictures, which are not among its scans. Metadata that no pixel
    depends on is left out: Pillow refuses a picture if some of it is damaged, and follows the list
    of further pictures (MPF). ValueError for one that is nothing but segments, scans or stray
    bytes, or a progressive one of which scans are missing altogether.
    """
    view = memoryview(data)  # copied once, when its pieces are joined
    pieces, position, parts, scans, cut = [view[:2]], 2, 0, 0, True
    missing: set[tuple[int, int]] = set()  # component and coefficient of a progressive JPEG
    while cut and (segment := _SEGMENT.search(data, position)):
        start, mark, body = segment.start(), data[segment.start() + 1], segment.end()
        parts += 1 + start - position
        position, cut = body, mark != 0xD9
        if not cut or mark == 1 or 0xD0 <= mark <= 0xD8:
            continue  # the end, or marks without a body
        end = body + int.from_bytes(data[body : body + 2], "big")
        head = data[body + 2 : end]
        if end > len(data) or end < body + 2:
            break
        if mark == 0xC2:
            missing = {(component, k) for component in head[6::3] for k in range(64)}
        elif mark == 0xDA:
            scans += 1
            if missing and len(head) > 3 and not head[-1] & 15:  # its last bits
                band = range(head[-3], head[-2] + 1)
                missing -= {(component, k) for component in head[1:-3:2] for k in band}
            behind = _BEHIND_SCAN.search(data, end)
            end = behind.start() if behind else _written_bytes(data)
        needed = head.startswith(_NEEDED) and len(head) >= _NEEDED_BYTES
        if needed or mark not in _METADATA:
            pieces.append(view[start:end])
        position = end
        if parts > MAX_PARTS or scans > _MAX_SCANS:
            raise ValueError("too many parts")
    if not scans or (cut and missing):
        raise ValueError("truncated")
    return b"".join([*pieces, _END_OF_JPEG]), cut


def _written_bytes(data: bytes) -> int:
    """Return the length of a JPEG that is cut, without what was never written at its end."""
    end = len(data.rstrip(b"\0\xff"))
    return end if len(data) - end >= _BLANK_BYTES else len(data.rstrip(b"\xff"))


_FRAME_CHUNKS = (b"fcTL", b"fdAT")


def _png(data: bytes) -> tuple[bytes, bool, int]:
    """Return a PNG, True where its end is missing, and its whole frames if it is an animation.

    Damaged chunks that no pixel depends on (text, profiles, times) are left out, as browsers do.
    ValueError when another one does not have its checksum, or there is nothing but chunks.
    """
    pieces: list[bytes] = []
    begun, position, controls = 0, 8, 0
    for _ in range(MAX_PARTS):
        length = int.from_bytes(data[position : position + 4], "big")
        end = position + 8 + length
        kind = data[position + 4 : position + 8]
        cut = end + 4 > len(data)
        if cut or kind == b"IEND":
            if pieces:
                data = b"".join([*pieces, data[begun:]])
            return data, cut, max(0, controls - cut)
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            if kind[:1].isupper() or kind in _FRAME_CHUNKS or not kind.isalpha():
                raise ValueError("a wrong checksum")
            pieces.append(data[begun:position])
            begun = end + 4
        controls += kind == b"fcTL"
        position = end + 4
    raise ValueError("too many chunks")


def _webp(data: bytes) -> bytes:
    """Return a WebP whose header tells the size that its chunks have.

    Writers that cannot seek back leave 0 or the largest number there, others count the header, or
    leave out the last byte, which pads. ValueError where a chunk is cut.
    """
    told = 8 + int.from_bytes(data[4:8], "little")
    position = 12
    for _ in range(MAX_PARTS):
        kind, size = data[position : position + 4], data[position + 4 : position + 8]
        behind = position >= told > 12
        if behind or len(size) < 4 or not kind.strip(b" ").isalnum():
            break
        position += 8 + int.from_bytes(size, "little")
        if position > len(data):
            raise ValueError("truncated")
        position += position & 1
    if position == told <= len(data):
        return data
    body = data[8:position].ljust(position - 8, b"\0")
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def _gif(data: bytes) -> tuple[bytes, int, int, bool]:
    """Return a GIF, its frames, those of them that are whole, and True where it is cut.

    Pillow would take a truncated animation for a shorter one. A screen of no size, which some
    programs write, gets that of the frames. ValueError without a frame, or for nothing but blocks.
    """

    def colour_table_bytes(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    frames = whole = blocks = width = height = 0
    cut = True
    with contextlib.suppress(IndexError):
        position = 13 + colour_table_bytes(data[10])
        while (mark := data[position]) != ord(";"):
            if mark == ord(","):  # a frame; everything else is an extension
                frames += 1
                left, top, columns, rows = (
                    int.from_bytes(data[position + i : position + i + 2], "little")
                    for i in (1, 3, 5, 7)
                )
                width, height = max(width, left + columns), max(height, top + rows)
                position += 9 + colour_table_bytes(data[position + 9])
            position += 2
            while length := data[position]:
                position += 1 + length
                blocks += 1
                if blocks > MAX_PARTS:
                    raise ValueError("too many blocks")
            position += 1
            whole = frames
        cut = False
    if not frames:
        raise ValueError("truncated")
    if data[6:8] == b"\0\0" or data[8:10] == b"\0\0":
        screen = width.to_bytes(2, "little") + height.to_bytes(2, "little")
        data = data[:6] + screen + data[10:]
    return data, frames, whole, cut


def _exif(image: Any) -> Image.Exif:
    """Return a picture's EXIF; an empty one where it is absent or broken."""
    exif = Image.Exif()
    with contextlib.suppress(Exception):  # as in `_reading`
        exif.load(image.info.get("exif", b""))
    return exif


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise MediaError(f"{width}×{height} pixels are more than decode.max_pixels: {max_pixels}")


def _still(picture: _Picture) -> tuple[Pixels, float]:
    """Decode a still, or the first frame; return it and the share of it that is there."""
    if not picture.cut or picture.frames > 1:
        try:
            return _decode_still(picture), picture.share
        except _Cut:
            pass
        except MediaError:
            if picture.file_type.family not in ("bmp", "tiff"):  # their length is not checked
                raise
    with _reading(picture.file_type):
        return _salvage(picture)


def _decode_still(picture: _Picture) -> Pixels:
    image, family = picture.image, picture.file_type.family
    with _reading(picture.file_type):
        if family == "tiff":
            with contextlib.suppress(Exception):  # Pillow does not know all that OpenCV does
                image = Image.open(_Source(picture.content), formats=["tiff"])
            # OpenCV darkens what shines through.
            if image is None or not image.has_transparency_data:
                return _decode_by_opencv(picture.content)
        if family == "jpeg":
            pixels = _decode_jpeg(picture)
            if pixels is not None:
                return pixels
            _draft(image, picture.side)
        if family != "gif":
            image.load()
        if family == "gif" or (family == "png" and picture.content[_PNG_DEPTH_AT] == 16):
            decoded = _decode_by_opencv(picture.content)
            clear = image.info.get("transparency")
            if isinstance(clear, int) and image.mode.startswith("I"):  # OpenCV leaves it opaque
                alpha = np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8)
                decoded = on_page(np.dstack([decoded, alpha]))
            return np.asarray(_upright(Image.fromarray(decoded), image))
        return _rgb(image)


def _decode_jpeg(picture: _Picture) -> Pixels | None:
    """Decode a JPEG as Pillow would, without its four copies of the pixels.

    None where Pillow must: it knows other colours, and what damage makes a picture useless.
    """
    image = picture.image
    if image.mode not in ("RGB", "L"):
        return None
    factor = _reduction(image.size, picture.side)
    # 0 is the whole: a tiny picture is as wide at 7/8 of its size.
    width = -(-image.width // factor) if factor > 1 else 0
    try:
        pixels: Any = simplejpeg.decode_jpeg(picture.content, "RGB", min_width=width)
    except ValueError as error:  # also for what libjpeg only warns of
        if "premature end" in str(error):  # libjpeg fills up with grey
            raise _Cut("its pixels end early") from error
        return None
    if picture.orientation not in _TRANSPOSED:
        return cast("Pixels", pixels)
    return np.asarray(_upright(Image.fromarray(pixels), image))


def _draft(image: Any, side: int) -> int:
    """Let a large JPEG be decoded at a fraction of its size, 1/n; return n."""
    factor = _reduction(image.size, side)
    image.draft(None, (image.width // factor, image.height // factor))
    return factor


def _reduction(size: tuple[int, int], side: int) -> int:
    """Return the part of its size, as 1/n, at which a JPEG is decoded."""
    width, height = size
    for factor in (8, 4, 2):
        small = width // factor, height // factor
        least = reading_size(width, height, side)
        if min(small) >= _SHORTER_SIDE and small[0] >= least[0] and small[1] >= least[1]:
            return factor
    return 1


_NOISE = bytes(range(1, 255)) * 400 + b"".join(bytes([0xFF, 0xD0 + i, *range(9)]) for i in range(8))
"""With all restart markers: a JPEG that is cut in front of one goes on with that one only."""


def _salvage(picture: _Picture) -> tuple[Pixels, float]:
    """Decode what there is of a cut still; return it and its share of the pixels.

    It is decoded twice, with other content where some is missing: pixels that are equal were there.
    In a JPEG that is not progressive, everything behind the first difference is missing, also where
    libjpeg makes it grey both times.
    """
    jpeg, factor = picture.file_type.family == "jpeg", 1
    images = []
    for other in (False, True):
        content = picture.content
        if jpeg:
            end = (_NOISE if other else b"") + _END_OF_JPEG
            content = content[: -len(_END_OF_JPEG)] + end
        image: Any = Image.open(_Source(content), formats=[picture.file_type.family])
        if jpeg:
            factor = _draft(image, picture.side)
        else:
            image.load_prepare()
            ink = 255 * other
            image.im.paste(ink if len(image.getbands()) == 1 else (ink,) * 4, (0, 0, *image.size))
        try:
            image.load()
        except (OSError, ValueError, SyntaxError, EOFError):
            image.tile = []  # what was decoded stays
        images.append(image)
    same = np.asarray(images[0]) == np.asarray(images[1])
    same = same if same.ndim == 2 else same.all(axis=2)
    if jpeg and not images[0].info.get("progressive"):
        rows = 8 * max(v for _, _, v, _ in images[0].layer) // factor
        return _rgb(images[0]), _share_before(same, rows)
    return _rgb(images[0]), float(same.mean())


def _share_before(same: Any, rows: int) -> float:
    """Return the share of pixels in front of the first difference, in strips of `rows`.

    Colours are smoothed across strips: one row above a strip that differs may differ too.
    """
    other = np.flatnonzero(~same.all(axis=1))
    if not other.size:
        return 1.0
    top = (int(other[0]) + 1) // rows * rows
    left = int((~same[top : top + max(1, rows // 2)].all(axis=0)).argmax())
    before = top * same.shape[1] + min(rows, len(same) - top) * left
    return float(before / same.size)


def _rgb(image: Any) -> Pixels:
    """Decode the current frame of a picture: upright, on its page."""
    image.load()  # EXIF of a PNG may stand behind the pixels
    upright = _upright(image, image)
    if image.mode == "CMYK":
        return _from_cmyk(np.asarray(upright))
    if image.mode[0] in "IF":  # grey of more than 8 bits
        return np.asarray(cv2.cvtColor(_eight_bits(np.asarray(upright)), cv2.COLOR_GRAY2RGB))
    if image.has_transparency_data:
        pixels = np.asarray(upright.convert("RGBA"))
        if image.format != "BMP" or pixels[:, :, 3].any():  # many BMPs leave their alpha at 0
            return on_page(pixels)
    return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))


def _upright(pixels: Any, image: Any) -> Any:
    turn = _TRANSPOSED.get(_exif(image).get(Tag.Orientation, 1))
    return pixels if turn is None else pixels.transpose(turn)


def _from_cmyk(pixels: Pixels) -> Pixels:
    """Convert ``(height, width, 4)`` to RGB, rounded as libraries of print pictures round it."""
    inks = 255 - pixels.astype(np.uint16)
    black = inks[:, :, 3:]
    return np.asarray(black - ((255 - inks[:, :, :3]) * black >> 8), np.uint8)


def _decode_by_opencv(content: bytes) -> Pixels:
    """Decode a still of any depth to RGB of 8 bits; only a TIFF comes upright."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it raises what matters
    pixels: Any = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("OpenCV cannot decode it")
    pixels = _eight_bits(pixels)
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB), np.uint8)
    if pixels.shape[2] == 4:
        return on_page(np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA), np.uint8))
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)


def _eight_bits(pixels: Any) -> Any:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.uint16:
        return cv2.convertScaleAbs(pixels, alpha=1 / 257)  # 65535 -> 255
    if pixels.dtype.kind == "i":  # Pillow's 32 bits for 16
        return cv2.convertScaleAbs(np.clip(pixels, 0, 65535).astype(np.uint16), alpha=1 / 257)
    return (np.clip(np.nan_to_num(pixels), 0, 1) * 255).astype(np.uint8)  # floating point, 0 to 1


def on_page(pixels: Pixels) -> Pixels:
    """Lay RGBA ``(height, width, 4)`` on a white page, or on black what white would hide: RGB."""
    alpha = pixels[:, :, 3]
    if alpha.min() == 255:
        return np.ascontiguousarray(pixels[:, :, :3])
    colours = _laid_on(pixels, 255)
    shown = cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY)[alpha >= 16]
    if shown.size and float((shown < _VANISHING).mean()) < _VISIBLE_SHARE:
        return _laid_on(pixels, 0)
    return colours


def _laid_on(pixels: Pixels, page: int) -> Pixels:
    """Lay RGBA on a page of one grey, a band of rows at a time."""
    colours, alpha = np.ascontiguousarray(pixels[:, :, :3]), pixels[:, :, 3:]
    rows = 256  # whole pictures as uint16 would need three times their memory
    for top in range(0, len(colours), rows):
        band = colours[top : top + rows].astype(np.uint16)  # (rows, width, 3)
        cover = alpha[top : top + rows].astype(np.uint16)  # (rows, width, 1)
        colours[top : top + rows] = (band * cover + page * (255 - cover) + 127) // 255
    return colours


_FEW_PIXELS = 1 << 18
"""Up to here a picture is averaged exactly, in 1 ms. Half would save 0.4 ms of small pictures,
double takes 1 ms more of those of 700 pixels."""


def squash(pixels: Pixels, width: int, height: int) -> Pixels:
    """Scale a whole picture to a size; nothing is cropped.

    Large ones are brought to twice the size first, by halves and linear interpolation: averages
    over parts of pixels take six times as long, and are 0.4 of 255 apart on photographs.
    """
    rows, columns = pixels.shape[:2]
    twice = (2 * width, 2 * height)
    if rows * columns > _FEW_PIXELS and columns >= twice[0] and rows >= twice[1]:
        pixels = shrink(pixels, *twice)
    return average(pixels, width, height)


def average(pixels: Pixels, width: int, height: int) -> Pixels:
    """Scale a whole picture to a size, shrinking by exact averages of areas.

    An axis that grows while the other shrinks is scaled after it: OpenCV averages only where both
    shrink, and would alias otherwise.
    """
    rows, columns = pixels.shape[:2]
    averaged = _resized(pixels, min(width, columns), min(height, rows), cv2.INTER_AREA)
    return _resized(averaged, width, height, cv2.INTER_LINEAR)


def shrink(pixels: Pixels, width: int, height: int, out: Pixels | None = None) -> Pixels:
    """Scale a picture down by halves, and linearly from less than twice the size, into `out`."""
    halved = _halved(pixels, width, height)
    if out is None:
        return _resized(halved, width, height, cv2.INTER_LINEAR)
    return np.asarray(cv2.resize(halved, (width, height), dst=out), np.uint8)


def _halved(pixels: Pixels, width: int, height: int) -> Pixels:
    """Halve the sides of a picture, as long as they stay at least these."""
    while True:
        rows, columns = pixels.shape[:2]
        columns = columns // 2 if columns >= 2 * width else columns
        rows = rows // 2 if rows >= 2 * height else rows
        if (rows, columns) == pixels.shape[:2]:
            return pixels
        # The mean of each two pixels of a side; of an odd one almost so, and none is left out.
        pixels = _resized(pixels, columns, rows, cv2.INTER_LINEAR)


def _resized(pixels: Any, width: int, height: int, interpolation: int) -> Pixels:
    if pixels.shape[:2] != (height, width):
        pixels = cv2.resize(pixels, (width, height), interpolation=interpolation)
    return np.asarray(pixels, np.uint8)


def padded(pixels: Pixels, side: int) -> Pixels:
    """Scale a whole picture in its proportions to a square, centred on white."""
    rows, columns = pixels.shape[:2]
    height, width = (max(1, round(each * side / max(rows, columns))) for each in (rows, columns))
    square = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = squash(pixels, width, height)
    return square
