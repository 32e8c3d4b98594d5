"""Pictures: every way that a picture can be stored gives the same upright RGB."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from common.errors import MediaError
from extractors.media.pictures import (
    centres,
    fitted_size,
    picture_size,
    read_pictures,
    reading_size,
    squash,
)
from tests.support import media

LIMIT = 100_000_000


def read(path: Path, **more: Any) -> list[np.ndarray]:
    return list(read_pictures(path, **{"max_pixels": LIMIT, **more}))


def one(path: Path) -> np.ndarray:
    (pixels,) = read(path)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    return pixels


def near(pixels: np.ndarray, expected: np.ndarray, tolerance: int = 8) -> bool:
    return (
        pixels.shape == expected.shape
        and int(np.abs(pixels.astype(int) - expected.astype(int)).max()) <= tolerance
    )


def middle(pixels: np.ndarray) -> list[int]:
    return [int(v) for v in pixels[pixels.shape[0] // 2, pixels.shape[1] // 2]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "avif"])
def test_exif_orientation(tmp_path: Path, orientation: int, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(media.quadrants(96, 64)).save(path, lossless=True, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    assert near(one(path), upright, 60 if kind == "jpg" else 0)
    assert picture_size(path) == upright.shape[1::-1]


def test_orientation_of_our_own_exif(tmp_path: Path) -> None:
    """Orientation 6, a phone held upright: the left side of what is stored is the top."""
    path = media.write_jpeg(tmp_path / "a.jpg", media.halves(96, 64), orientation=6)
    pixels = one(path)
    assert pixels.shape == (96, 64, 3)
    assert near(pixels[10:20], media.solid(64, 10), 12)


def test_broken_exif_is_ignored(tmp_path: Path) -> None:
    """A picture whose EXIF is cut or nonsense is read as if it had none."""
    path = media.write_jpeg(tmp_path / "a.jpg", media.solid(32, 24), orientation=6)
    data = bytearray(path.read_bytes())
    at = data.index(b"MM\x00*")
    data[at + 4 : at + 8] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(data))
    assert one(path).shape == (24, 32, 3)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "1", "I;16"])
def test_png_modes(tmp_path: Path, mode: str) -> None:
    """Grey, alpha, palettes, one bit and 16 bits give what Pillow gives, alpha laid on white."""
    path = tmp_path / "a.png"
    picture = Image.new("RGBA", (16, 12), (200, 100, 50, 0))
    picture.paste((10, 20, 230, 255), (4, 0, 8, 12))
    picture.paste((10, 220, 30, 128), (8, 0, 12, 12))
    if mode == "I;16":
        ramp = np.linspace(0, 65535, 16 * 12).astype(np.uint16).reshape(12, 16)
        Image.fromarray(ramp).save(path)
        expected = np.repeat((ramp / 257).round().astype(np.uint8)[:, :, None], 3, 2)
    else:
        (picture.quantize(8) if mode == "P" else picture.convert(mode)).save(path)
        page = Image.new("RGBA", (16, 12), "white")
        page.alpha_composite(Image.open(path).convert("RGBA"))
        expected = np.asarray(page.convert("RGB"))
    assert near(one(path), expected, 1)


def test_16_bit_colour_with_alpha(tmp_path: Path) -> None:
    """A PNG of four channels of 16 bits: colours are scaled, alpha is laid on white."""
    deep = np.full((8, 8, 4), 0, np.uint16)
    deep[:, :, 0], deep[:, :, 3] = 65535, 65535
    deep[:4, :, 3] = 0
    pixels = one(media.write_png(tmp_path / "a.png", deep))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[7, 7].tolist() == [255, 0, 0]


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_jpeg(tmp_path: Path, adobe: bool) -> None:
    """CMYK keeps its colours, in Adobe's inverted form and without Adobe's marker."""
    path = media.write_cmyk_jpeg(tmp_path / "a.jpg", media.quadrants(96, 64))
    if not adobe:
        data = path.read_bytes()
        at = data.index(b"\xff\xee")
        (length,) = struct.unpack(">H", data[at + 2 : at + 4])
        path.write_bytes(data[:at] + data[at + 2 + length :])
    assert near(one(path), np.asarray(Image.open(path).convert("RGB")), 30)
    assert np.abs(one(path)[10, 10].astype(int) - media.RED).max() < 10


def test_grey_jpeg(tmp_path: Path) -> None:
    pixels = one(media.write_jpeg(tmp_path / "a.jpg", np.full((24, 32), 90, np.uint8)))
    assert pixels.shape == (24, 32, 3)
    assert set(middle(pixels)) == {90}


@pytest.mark.parametrize("name", ["a.bmp", "a.webp", "a.avif", "a.tif"])
def test_other_formats(tmp_path: Path, name: str) -> None:
    Image.fromarray(media.quadrants(96, 64)).save(tmp_path / name)
    assert near(one(tmp_path / name)[::63, ::95], media.quadrants(96, 64)[::63, ::95], 25)


def test_floating_point_tiff(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.tif"), np.full((8, 8, 3), 0.5, np.float32))
    assert np.unique(one(tmp_path / "a.tif")).tolist() == [127]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animations(tmp_path: Path, name: str) -> None:
    """Frames are taken from the centres of equal parts of an animation; one is its first."""
    path = media.write_animation(tmp_path / name, media.grey_steps(9))
    whole = [middle(frame)[0] for frame in read(path, max_frames=99)]
    assert len(whole) == 9
    assert whole == sorted(whole)
    assert [middle(f)[0] for f in read(path, max_frames=3)] == [whole[1], whole[4], whole[7]]
    assert [middle(f)[0] for f in read(path)] == [whole[0]]


def test_gif_frames_that_build_on_each_other(tmp_path: Path) -> None:
    """A GIF whose frames hold only what changed is composed, and its holes are white."""
    first = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    second = first.copy()
    first.paste((255, 0, 0, 255), (0, 0, 8, 8))
    second.paste((0, 255, 0, 255), (16, 16, 24, 24))
    path = tmp_path / "a.gif"
    first.save(path, save_all=True, append_images=[second], duration=100, disposal=1)
    _, composed = read(path, max_frames=2)
    assert composed[2, 2].tolist() == [255, 0, 0]
    assert composed[20, 20].tolist() == [0, 255, 0]
    assert composed[30, 2].tolist() == [255, 255, 255]


PICTURES = ["a.jpg", "p.jpg", "a.png", "a.gif", "a.webp", "a.bmp", "a.tif", "a.avif"]


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.7, 0.98, 0.9999])
def test_truncated_pictures(
    tmp_path: Path, name: str, keep: float, capfd: pytest.CaptureFixture[str]
) -> None:
    """What decodes to 90% is used and said; with less there is no picture. Nothing is printed."""
    Image.fromarray(media.noise(200, 160)).save(tmp_path / name, progressive=name == "p.jpg")
    whole = one(tmp_path / name)
    cut = media.truncate(tmp_path / name, tmp_path / "cut", keep)
    notes: list[str] = []
    if keep > 0.9 and name not in ("a.webp", "a.avif"):  # their decoders give all or nothing
        (pixels,) = read(cut, notes=notes)
        assert (pixels == whole).all(axis=2).mean() > 0.9
        assert all(note.startswith("truncated ") for note in notes)
        assert bool(notes) == (keep < 0.99)
    else:
        with pytest.raises(MediaError) as caught:
            read(cut, notes=notes)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_the_thumbnails_end_is_not_the_pictures(tmp_path: Path) -> None:
    """A whole JPEG in the EXIF does not hide that the picture around it is cut."""
    thumbnail = media.write_jpeg(tmp_path / "t.jpg", media.solid(16, 16)).read_bytes()
    data = media.write_jpeg(tmp_path / "a.jpg", media.noise(200, 160)).read_bytes()
    body = b"Exif\0\0" + thumbnail
    whole = data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
    (tmp_path / "a.jpg").write_bytes(whole)
    assert one(tmp_path / "a.jpg").shape == (160, 200, 3)
    (tmp_path / "a.jpg").write_bytes(whole[: -len(data) // 2])
    with pytest.raises(MediaError, match="truncated"):
        read(tmp_path / "a.jpg")


def test_data_behind_a_jpeg_is_tolerated(tmp_path: Path) -> None:
    """Phones append films and depth maps of megabytes to their JPEGs."""
    path = media.write_jpeg(tmp_path / "a.jpg", media.quadrants(96, 64))
    path.write_bytes(path.read_bytes() + b"\0" * (3 << 20))
    assert one(path).shape == (64, 96, 3)


def png_of(width: int, height: int) -> bytes:
    """A PNG of any size without its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]:
        checksum = struct.pack(">I", zlib.crc32(name + body))
        data += struct.pack(">I", len(body)) + name + body + checksum
    return data


def encoded(extension: str, pixels: np.ndarray) -> bytearray:
    return bytearray(cv2.imencode(extension, pixels)[1].tobytes())


def flipped_bit() -> bytes:
    data = encoded(".png", media.noise(64, 64))
    data[len(data) // 2] ^= 1
    return bytes(data)


def no_width() -> bytes:
    data = encoded(".jpg", media.solid(32, 24))
    at = data.index(b"\xff\xc0") + 7
    data[at : at + 2] = b"\0\0"
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            bytes(encoded(".jpg", media.noise(200, 160))[:-9000]),
            "truncated JPEG picture: 76 of 100 percent of its pixels",
        ),
        (flipped_bit(), "broken PNG picture"),
        (no_width(), "broken JPEG picture"),
        # A small file of a gigantic picture is refused by its header, without its memory.
        (png_of(60000, 60000), f"60000×60000 pixels are more than decode.max_pixels: {LIMIT}"),
    ],
)
def test_the_reason_is_one_plain_line(
    tmp_path: Path, content: bytes, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(MediaError, match=f"^{said}$"):
        read(tmp_path / "a")
    assert capfd.readouterr().err == ""


def test_large_jpegs_are_decoded_smaller(tmp_path: Path) -> None:
    """A JPEG of camera size is decoded at half its size, and looks the same when scaled down."""
    large = cv2.resize(media.noise(150, 100), (3200, 2100), interpolation=cv2.INTER_CUBIC)
    path = media.write_jpeg(tmp_path / "a.jpg", large)
    pixels = one(path)
    assert pixels.shape == (1050, 1600, 3)
    full = np.asarray(Image.open(path))
    assert near(squash(pixels, 224, 224), squash(full, 224, 224), 6)


def test_squash_averages_and_keeps_everything() -> None:
    """Shrinking averages whole areas, on an axis that shrinks while the other grows too."""
    stripes = np.zeros((40, 4000, 3), np.uint8)
    stripes[:, ::2] = 200  # finer than the result: 100 everywhere, or aliasing
    pixels = squash(stripes, 224, 224)
    assert pixels.shape == (224, 224, 3)
    assert int(np.abs(pixels.astype(int) - 100).max()) <= 6
    corner = np.zeros((100, 100, 3), np.uint8)
    corner[:10, :10] = 255
    assert squash(corner, 10, 10)[0, 0].tolist() == [255, 255, 255]
    assert squash(corner, 100, 100) is not None


def test_sizes() -> None:
    """Proportions are kept, nothing is enlarged, no side vanishes."""
    assert fitted_size(1920, 1080, 960) == (960, 540)
    assert fitted_size(100, 50, 960) == (100, 50)
    assert fitted_size(5000, 1, 960) == (960, 1)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1080, 2340), (443, 960)),
        ((2340, 1080), (960, 443)),
        ((1080, 3240), (960, 2880)),
        ((1080, 12000), (576, 6400)),
        ((400, 3000), (400, 3000)),
        ((300, 900), (300, 900)),
        ((1, 100_000), (1, 960)),
    ],
)
def test_tall_pictures_stay_readable(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """They are shrunk to a width of at most 960, and to the area of four squares of it."""
    assert reading_size(*size, 960) == expected
    assert expected[0] * expected[1] <= 4 * 960 * 960
    assert centres(9, 3) == [1, 4, 7]
    assert centres(2, 2) == [0, 1]


def test_no_picture_at_all(tmp_path: Path) -> None:
    path = media.write_video(tmp_path / "a.mp4", media.grey_steps(3)).rename(tmp_path / "a.jpg")
    with pytest.raises(MediaError, match=r"^is not a picture: MP4 video$"):
        read(path)


@pytest.mark.parametrize("name", PICTURES)
def test_damaged_headers_never_raise_anything_else(tmp_path: Path, name: str) -> None:
    """Bytes overwritten anywhere in the first kilobyte give a header or a MediaError."""
    Image.fromarray(media.quadrants(64, 48)).save(tmp_path / name)
    path = tmp_path / name
    data = path.read_bytes()
    random = np.random.default_rng(7)
    for _ in range(300):
        broken = bytearray(data)
        for at in random.integers(8, min(len(data), 1024), 4):
            broken[at] = random.integers(256)
        path.write_bytes(bytes(broken))
        try:
            assert min(picture_size(path)) > 0
        except MediaError:
            continue


def test_damage_inside_a_jpeg(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = media.write_jpeg(tmp_path / "a.jpg", media.noise(200, 160)).read_bytes()
    random = np.random.default_rng(1)
    for _ in range(30):
        broken = bytearray(data)
        for at in random.integers(700, len(data) - 2, 5):
            broken[at] = random.integers(256)
        (tmp_path / "a.jpg").write_bytes(bytes(broken))
        try:
            assert one(tmp_path / "a.jpg").shape == (160, 200, 3)
        except MediaError:
            continue
    assert capfd.readouterr().err == ""
