"""Pictures of every format, orientation, depth and transparency, against Pillow by value."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.errors import MediaError
from config.features import FeatureSettings
from config.settings import DecodeSettings
from extractors.media import sniff
from extractors.media.decode import decode_media
from extractors.media.pictures import picture_size, read_pictures
from extractors.models.ocr import OcrExtractor
from tests.support import media
from tests.support.heif import heic

QUADRANTS = media.quadrants(96, 64)
TRANSPARENT = 40  # alpha below it, in the pictures of these tests


def read(path: Path, max_frames: int = 1) -> list[np.ndarray]:
    return list(read_pictures(path, max_pixels=10**7, max_frames=max_frames))


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean difference of values of pictures of one size."""
    assert one.shape == other.shape
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


SAVERS: dict[str, dict[str, Any]] = {
    "a.jpg": {"quality": 95},
    "progressive.jpg": {"quality": 95, "progressive": True},
    "a.png": {},
    "a.webp": {"quality": 95},
    "lossless.webp": {"lossless": True},
    "a.tif": {},
    "lzw.tif": {"compression": "tiff_lzw"},
    "big.tif": {"big_tiff": True},
    "a.avif": {"quality": 95},
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", [*SAVERS, "16.png", "a.heic"])
def test_orientations(tmp_path: Path, name: str, orientation: int) -> None:
    path, exif = tmp_path / name, Image.Exif()
    exif[0x0112] = orientation
    plain = Image.fromarray(QUADRANTS)
    plain.info["exif"] = exif.tobytes()
    upright = np.asarray(ImageOps.exif_transpose(plain))
    if name == "a.heic":
        path.write_bytes(heic(orientation))
    elif name == "16.png":
        media.write_png(path, QUADRANTS.astype(np.uint16) * 257)
        add_chunk(path, b"eXIf" + exif.tobytes()[6:])  # without its own header
    else:
        Image.fromarray(QUADRANTS).save(path, exif=exif, **SAVERS[name])
    (pixels,) = read(path)
    assert difference(pixels, upright) < 3
    assert picture_size(path) == upright.shape[1::-1]


def add_chunk(path: Path, chunk: bytes) -> None:
    data = path.read_bytes()
    whole = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(data[:33] + whole + data[33:])


@pytest.mark.parametrize("name", ["a.gif", "a.bmp", "a.jp2", "a.j2k"])
def test_formats_without_orientation(tmp_path: Path, name: str) -> None:
    Image.fromarray(QUADRANTS).save(tmp_path / name)
    (pixels,) = read(tmp_path / name)
    assert difference(pixels, QUADRANTS) < 3


def grey(bits: int) -> Image.Image:
    image = Image.fromarray(np.linspace(0, 255, 96).astype(np.uint8)[None].repeat(64, 0))
    return image.convert("1") if bits == 1 else image


def wide_avif(path: Path, bits: int) -> None:
    with av.open(str(path), "w", format="avif") as container:
        stream: Any = container.add_stream(
            "libsvtav1", rate=1, options={"crf": "10", "svtav1-params": "lp=1:avif=1"}
        )
        stream.width, stream.height = 96, 64
        stream.pix_fmt = "yuv420p10le" if bits == 10 else "yuv420p"
        frame = av.VideoFrame.from_ndarray(QUADRANTS, format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode(None)])


def packed_bmp(path: Path, masks: tuple[int, int, int]) -> None:
    """A BMP of 16 bits a pixel, by its masks: 5 or 6 bits a colour."""
    values = np.zeros(QUADRANTS.shape[:2], np.uint16)
    for i, mask in enumerate(masks):
        shift = (mask & -mask).bit_length() - 1
        top = mask >> shift
        values |= ((QUADRANTS[:, :, i].astype(int) * top + 127) // 255 << shift).astype(np.uint16)
    body = values[::-1].astype("<u2").tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, 96, 64, 1, 16, 3, len(body), 2835, 2835, 0, 0)
    start = 14 + 40 + 12
    head = struct.pack("<2sIHHI", b"BM", start + len(body), 0, 0, start)
    path.write_bytes(head + header + struct.pack("<3I", *masks) + body)


DEPTHS: dict[str, Callable[[Path], object]] = {
    "1.png": lambda p: grey(1).save(p),
    "2.png": lambda p: grey(8).quantize(4).save(p, bits=2),
    "8.png": lambda p: grey(8).save(p),
    "8.jpg": lambda p: grey(8).save(p, quality=95),
    "16.png": lambda p: media.write_png(p, np.asarray(grey(8)).astype(np.uint16) * 257),
    "rgb16.png": lambda p: media.write_png(p, QUADRANTS.astype(np.uint16) * 257),
    "8.tif": lambda p: grey(8).save(p),
    "16.tif": lambda p: cv2.imwrite(str(p), np.asarray(grey(8)).astype(np.uint16) * 257),
    "float.tif": lambda p: cv2.imwrite(str(p), np.asarray(grey(8)).astype(np.float32) / 255),
    "8.avif": lambda p: wide_avif(p, 8),
    "10.avif": lambda p: wide_avif(p, 10),
    "16.jp2": lambda p: Image.fromarray(np.asarray(grey(8)).astype(np.uint16) * 257).save(p),
    "565.bmp": lambda p: packed_bmp(p, (0xF800, 0x07E0, 0x001F)),
    "555.bmp": lambda p: packed_bmp(p, (0x7C00, 0x03E0, 0x001F)),
    "8.bmp": lambda p: Image.fromarray(QUADRANTS).quantize(8).save(p),
    "1.bmp": lambda p: grey(1).save(p),
    "32.bmp": lambda p: Image.fromarray(QUADRANTS).convert("RGBA").save(p),
    "cmyk.tif": lambda p: Image.fromarray(QUADRANTS).convert("CMYK").save(p),
    "cmyk.jpg": lambda p: Image.fromarray(QUADRANTS).convert("CMYK").save(p, quality=95),
    "palette.tif": lambda p: Image.fromarray(QUADRANTS).quantize(8).save(p),
    "bits.tif": lambda p: grey(1).save(p, compression="group4"),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_depths(tmp_path: Path, name: str) -> None:
    """All values are scaled to 8 bits; what was written is the measure."""
    path = tmp_path / name
    DEPTHS[name](path)
    (pixels,) = read(path)
    colour = any(word in name for word in ("rgb", "avif", "bmp", "cmyk", "palette"))
    expected = QUADRANTS if colour and name != "1.bmp" else None
    if expected is None:
        expected = np.asarray(
            grey(1 if name in ("1.png", "1.bmp", "bits.tif") else 8).convert("RGB")
        )
    assert difference(pixels, expected) < (25 if name == "2.png" else 6)


def see_through() -> Image.Image:
    """A red page with a hole and a veil."""
    pixels = np.zeros((64, 96, 4), np.uint8)
    pixels[:, :] = (*media.RED, 255)
    pixels[16:48, 16:40, 3] = 0
    pixels[16:48, 56:80] = (*media.BLUE, 128)
    return Image.fromarray(pixels)


def hard() -> Image.Image:
    """The same with a hole only."""
    image = np.asarray(see_through()).copy()
    image[:, :, 3] = np.where(image[:, :, 3] < TRANSPARENT, 0, 255)
    return Image.fromarray(image)


def one_value(mode: str, path: Path) -> None:
    """One value that stands for transparency (tRNS)."""
    solid = Image.new("RGB", (96, 64), (40, 60, 80)).convert(mode)
    hole = (9, 8, 7) if mode == "RGB" else 9
    solid.paste(hole, (16, 16, 40, 48))
    solid.save(path, transparency=hole)


def one_value_16(path: Path) -> None:
    values = np.full((64, 96), 20_000, np.uint16)
    values[16:48, 16:40] = 900
    media.write_png(path, values)
    add_chunk(path, b"tRNS" + struct.pack(">H", 900))


def one_grey(bits: int, path: Path) -> None:
    """A grey of few bits that stands for transparency."""
    values = np.full((64, 96), 2 ** (bits - 1), np.uint8)
    values[16:48, 16:40] = 1
    bit = (values[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1  # (rows, width, bits)
    rows = np.packbits(bit.reshape(64, -1), axis=1)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in (
        b"IHDR" + struct.pack(">IIBBBBB", 96, 64, bits, 0, 0, 0, 0),
        b"tRNS\0\1",
        b"IDAT" + body,
        b"IEND",
    ):
        data += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(data)


ALPHAS: dict[str, Callable[[Path], object]] = {
    "rgba.png": lambda p: see_through().save(p),
    "la.png": lambda p: see_through().convert("LA").save(p),
    "palette.png": lambda p: hard().quantize(8).save(p),
    "rgba16.png": lambda p: media.write_png(p, np.asarray(see_through()).astype(np.uint16) * 257),
    "grey.png": lambda p: one_value("L", p),
    "grey2.png": lambda p: one_grey(2, p),
    "grey4.png": lambda p: one_grey(4, p),
    "palette2.png": lambda p: hard().quantize(4).save(p, bits=2),
    "rgb.png": lambda p: one_value("RGB", p),
    "grey16.png": one_value_16,
    "rgba.webp": lambda p: see_through().save(p, lossless=True),
    "rgba.avif": lambda p: see_through().save(p, quality=95),
    "rgba.tif": lambda p: see_through().save(p),
    "rgba.jp2": lambda p: see_through().save(p),
    "a.gif": lambda p: hard().save(p),
}


@pytest.mark.parametrize("name", ALPHAS)
def test_transparency_is_laid_on_white(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    ALPHAS[name](path)
    (pixels,) = read(path)
    assert pixels[32, 28].min() > 250
    assert pixels[4, 4].max() < 240
    if name not in ("grey2.png", "grey4.png", "grey16.png"):  # Pillow takes it wrong there
        page = Image.new("RGBA", (96, 64), "white")
        with Image.open(path) as image:
            page.alpha_composite(image.convert("RGBA"))
        assert difference(pixels, np.asarray(page.convert("RGB"))) < 2


@pytest.mark.parametrize("colour", [(255, 255, 255), (255, 255, 180), (235, 235, 235)])
@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.avif"])
def test_white_on_nothing_is_seen(tmp_path: Path, name: str, colour: tuple[int, int, int]) -> None:
    image = Image.new("RGBA", (240, 80), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((10, 10), "HELLO", (*colour, 255), ImageFont.load_default(48))
    image.save(tmp_path / name)
    (pixels,) = read(tmp_path / name)
    assert np.ptp(pixels[:, :, 0].astype(int)) > 200
    assert pixels[0, 0].max() < 20


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.avif"])
def test_animations_give_max_frames(tmp_path: Path, name: str) -> None:
    first, *rest = [Image.fromarray(frame) for frame in media.grey_steps(9)]
    first.save(tmp_path / name, save_all=True, append_images=rest, duration=100)
    for most, indices in ((3, (1, 4, 7)), (99, range(9)), (1, (0,))):
        levels = [int(frame[20, 20, 0]) for frame in read(tmp_path / name, most)]
        expected = [int(media.grey_steps(9)[i][0, 0, 0]) for i in indices]
        assert np.abs(np.array(levels) - expected).max() <= 4


def jpeg(**options: Any) -> bytes:
    from io import BytesIO

    file = BytesIO()
    Image.fromarray(QUADRANTS).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def stray(data: bytes) -> bytes:
    at = data.index(b"\xff\xdb")
    return data[:at] + b"\0\x12\xff\xff\0" + data[at:]


ODD: dict[str, Callable[[], bytes]] = {
    "no end": lambda: jpeg()[:-2],
    "progressive, no end": lambda: jpeg(progressive=True)[:-2],
    "half an end": lambda: jpeg()[:-1],
    "film behind": lambda: jpeg() + b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\x08" * 5000,
    "pictures behind": lambda: jpeg() + jpeg() + jpeg(),
    "stray bytes": lambda: stray(jpeg()),
    "line before": lambda: b"\r\n" + jpeg(),
    "restarts": lambda: jpeg(restart_marker_blocks=2),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_jpegs(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(ODD[name]())
    (pixels,) = read(path)
    assert difference(pixels, QUADRANTS) < 3


def riff(size: Callable[[bytes], int], tail: bytes = b"") -> Callable[[Path], None]:
    """A WebP whose header tells a size of its own."""

    def write(path: Path) -> None:
        Image.fromarray(QUADRANTS).save(path, "WEBP", quality=95)
        data = path.read_bytes()
        path.write_bytes(
            data[:4] + (size(data) & 0xFFFFFFFF).to_bytes(4, "little") + data[8:] + tail
        )

    return write


def unpadded(path: Path) -> None:
    """A WebP whose last chunk has an odd size, without the byte that pads it."""
    Image.fromarray(QUADRANTS).save(path, "WEBP", quality=95)
    data = path.read_bytes()
    data += b"EXIF" + (5).to_bytes(4, "little") + bytes(5)
    path.write_bytes(data[:4] + (len(data) - 7).to_bytes(4, "little") + data[8:])


def bad_chunk(*chunks: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        Image.fromarray(QUADRANTS).save(path, "PNG")
        data, at = path.read_bytes(), 33
        for chunk in chunks:
            body = struct.pack(">I", len(chunk) - 4) + chunk + b"\1\2\3\4"
            data = data[:at] + body + data[at:]
            at = data.index(b"IDAT") - 4
        path.write_bytes(data)

    return write


def bad_end(path: Path) -> None:
    Image.fromarray(QUADRANTS).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


def bmp(path: Path, *, reserved: bytes = bytes(4), alpha: bool = False) -> None:
    Image.fromarray(QUADRANTS).save(path, "BMP")
    data = path.read_bytes()
    if alpha:  # 32 bits with masks, and an alpha that nobody has set
        body = np.dstack([QUADRANTS[::-1, :, ::-1], np.zeros((64, 96), np.uint8)]).tobytes()
        masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        head = struct.pack("<IiiHHIIiiII", 124, 96, 64, 1, 32, 3, len(body), 0, 0, 0, 0)
        data = struct.pack("<2sIHHI", b"BM", 138 + len(body), 0, 0, 138)
        data += (head + masks).ljust(124, b"\0") + body
    path.write_bytes(data[:6] + reserved + data[10:])


CARELESS: dict[str, Callable[[Path], None]] = {
    "webp, size 0": riff(lambda data: 0),
    "webp, size of pipes": riff(lambda data: -1),
    "webp, size with its header": riff(len),
    "webp, size larger than the file": riff(lambda data: 3 * len(data)),
    "webp, size smaller than the picture": riff(lambda data: len(data) // 2),
    "webp, more behind its end": riff(lambda data: len(data) - 8, b"\0\x99more" * 9),
    "webp, no padding": unpadded,
    "png, text": bad_chunk(b"tEXtname\0value"),
    "png, profile and gamma": bad_chunk(b"iCCPa\0\0bad", b"gAMA\0\0\1\0"),
    "png, end": bad_end,
    "bmp, reserved bytes": lambda p: bmp(p, reserved=b"made"),
    "bmp, alpha of 0": lambda p: bmp(p, alpha=True),
}


@pytest.mark.parametrize("name", CARELESS)
def test_careless_writers(tmp_path: Path, name: str) -> None:
    """Parts that viewers pass over make no file broken, and leaves no note."""
    path, notes = tmp_path / "a", list[str]()
    CARELESS[name](path)
    (pixels,) = read_pictures(path, max_pixels=10**7, notes=notes)
    assert difference(pixels, QUADRANTS) < 4
    assert notes == []


@pytest.mark.parametrize("chunk", [b"PLTE\0\0\0", b"fcTL" + bytes(26)])
def test_damaged_chunks_that_pixels_depend_on(tmp_path: Path, chunk: bytes) -> None:
    bad_chunk(chunk)(tmp_path / "a.png")
    with pytest.raises(MediaError, match=r"^broken PNG"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("front", [b"\n", b"\r\n\r\n", b"\xef\xbb\xbf", bytes(3), bytes(65_534)])
@pytest.mark.parametrize("name", [*SAVERS, "a.gif", "a.bmp", "a.jp2", "a.heic"])
def test_padding_before_a_picture(tmp_path: Path, name: str, front: bytes) -> None:
    """Padding is not taken together with zeros that the file itself begins with."""
    path = tmp_path / name
    if name == "a.heic":
        path.write_bytes(heic(1))
    else:
        Image.fromarray(QUADRANTS).save(path, **SAVERS.get(name, {}))
    (plain,) = read(path)
    path.write_bytes(front + path.read_bytes())
    (pixels,) = read(path)
    assert difference(pixels, plain) == 0


def test_a_gif_without_a_screen(tmp_path: Path) -> None:
    Image.fromarray(QUADRANTS).save(tmp_path / "a.gif")
    data = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(data[:6] + bytes(4) + data[10:])
    (pixels,) = read(tmp_path / "a.gif")
    assert difference(pixels, QUADRANTS) < 3


def test_formats_that_are_only_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.heic").write_bytes(heic())
    monkeypatch.setitem(__import__("sys").modules, "pi_heif", None)
    with pytest.raises(MediaError, match=r"^HEIC picture cannot be decoded here: pip install"):
        read(tmp_path / "a.heic")
    (tmp_path / "a.jxl").write_bytes(b"\xff\x0a" + bytes(60))
    with pytest.raises(MediaError, match="JPEG XL picture, which cannot be decoded"):
        read(tmp_path / "a.jxl")
    assert sniff.sniff(b"II\xbc\1") is not None


@pytest.mark.slow
def test_tall_screenshots_are_read(tmp_path: Path) -> None:
    """Every line of a chat of ten screens is read, once and in order."""
    image = Image.new("RGB", (1080, 9000), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(56)
    words = ["apple", "river", "stone", "cloud", "music", "tiger", "bread", "glass", "horse"]
    for i in range(30):
        draw.text((60, 60 + 300 * i), f"{words[i % 9]} {words[i // 9]} {100 + i}", "black", font)
    image.save(tmp_path / "a.png")
    features = FeatureSettings.model_validate({"image": {"image_size": 32}})
    decoded = decode_media("image", tmp_path / "a.png", features, DecodeSettings())
    assert decoded.pictures[0].nbytes <= 4 * 960 * 960 * 3
    ocr = OcrExtractor(features.ocr)
    ocr.load()
    [text] = ocr.forward([ocr.preprocess(decoded.pictures)])
    ocr.close()
    numbers = [int("".join(filter(str.isdigit, line))) for line in text.splitlines()]
    assert numbers == list(range(100, 130))
