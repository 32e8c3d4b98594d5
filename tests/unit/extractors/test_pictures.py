"""Pictures: every way that a picture can be stored gives the same upright RGB."""

import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from common.errors import MediaError
from extractors.media.pictures import average, picture_size, read_pictures, shrink, squash
from extractors.parts import centres, fitted_size, reading_size
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


def test_broken_exif_is_ignored(tmp_path: Path) -> None:
    path = media.write_jpeg(tmp_path / "a.jpg", media.solid(32, 24), orientation=6)
    data = bytearray(path.read_bytes())
    at = data.index(b"MM\x00*")
    data[at + 4 : at + 8] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(data))
    assert one(path).shape == (24, 32, 3)


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


def with_segments(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG with further segments behind its beginning."""
    heads = ((struct.pack(">BBH", 0xFF, mark, len(body) + 2), body) for mark, body in segments)
    return data[:2] + b"".join(head + body for head, body in heads) + data[2:]


@pytest.mark.parametrize(
    "segment",
    [
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"ICC_PROFILE\0\x02\x05" + bytes(100)),
        (0xE2, b"MPF\0MM\0*\0\0"),
        (0xE0, b"JFIF\0"),
        (0xEE, b"Adobe"),
        (0xED, b"Photoshop 3.0\x008BIM\x04\x04"),
        (0xE1, b"Exif\0"),
        (0xFE, b""),
    ],
)
def test_broken_metadata_is_ignored(tmp_path: Path, segment: tuple[int, bytes]) -> None:
    """A profile, a preview or a comment that is cut does not cost the picture."""
    path = media.write_jpeg(tmp_path / "a.jpg", media.quadrants(96, 64))
    whole, data = one(path), path.read_bytes()
    path.write_bytes(with_segments(data, segment, (0xE0 + segment[0] % 16, bytes(40))))
    assert np.array_equal(one(path), whole)


def test_an_orientation_of_two_numbers(tmp_path: Path) -> None:
    """Counts, without the warning of Pillow, which would fail this test."""
    path = media.write_jpeg(tmp_path / "a.jpg", media.solid(32, 24), orientation=6)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x01\x12\0\x03\0\0\0\x01", b"\x01\x12\0\x03\0\0\0\x02"))
    assert path.read_bytes() != data
    assert picture_size(path) == (24, 32)
    assert one(path).shape == (32, 24, 3)


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
    """A picture that decodes to 90% is used, with a note; below that it is an error; no output."""
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


def jpeg_of(width: int, height: int, mode: str = "RGB", **options: Any) -> bytes:
    """A JPEG with equally much in each of its parts."""
    even: Any = cv2.resize(
        media.noise(width // 8, height // 8), (width, height), interpolation=cv2.INTER_CUBIC
    )
    file = io.BytesIO()
    Image.fromarray(even).convert(mode).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def percent(path: Path) -> int:
    """Of a JPEG's pixels, as its note or error says; 100 without one."""
    notes: list[str] = []
    try:
        read(path, notes=notes)
    except MediaError as error:
        notes = [str(error)]
    if not notes:
        return 100
    said = re.match(r"truncated JPEG picture: (\d+) of 100 percent of its pixels", notes[0])
    assert said, notes
    return int(said[1])


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("restarts", [0, 1, 40])
@pytest.mark.parametrize("size", [(320, 240), (1200, 900)])
def test_what_is_missing_of_a_cut_jpeg(
    tmp_path: Path, size: tuple[int, int], restarts: int, mode: str
) -> None:
    """Measured for large ones, with restart markers, and where disk blocks were never written."""
    data = jpeg_of(*size, mode, restart_marker_blocks=restarts)
    path = tmp_path / "a.jpg"
    for keep in (10, 50, 85, 95):
        cut = data[: len(data) * keep // 100]
        for blank in (b"", bytes(8192), b"\xff" * 8192, b"\xff"):
            path.write_bytes(cut + blank)
            assert abs(percent(path) - keep) <= 2
    for blank in (b"", bytes(8192), b"\xff" * 8192):
        path.write_bytes(data[:-2] + blank)
        assert percent(path) == 100


def test_a_webp_that_ends_in_zeros(tmp_path: Path) -> None:
    """Is whole: libwebp writes them for a large plain area, so they tell nothing of a cut."""
    path = tmp_path / "a.webp"
    Image.new("RGB", (2000, 1500), "white").save(path, quality=100, method=0)
    assert path.read_bytes().endswith(bytes(1000))
    assert one(path).shape == (1500, 2000, 3)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("lost", [2, 5, 30])
def test_what_is_missing_inside_a_jpeg(tmp_path: Path, lost: int, mode: str) -> None:
    """Measured though the file has its end: libjpeg fills up with grey."""
    data = jpeg_of(640, 480, mode)
    path, half = tmp_path / "a.jpg", len(data) // 2
    path.write_bytes(data[:half] + data[half + len(data) * lost // 100 :])
    assert abs(percent(path) - (100 - lost)) <= 2


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


def unknown_marker() -> bytes:
    """A JPEG whose pixels are interrupted by a marker that the format does not have."""
    data = encoded(".jpg", media.noise(200, 160))
    at = data.index(b"\xff\xda") + 1000
    data[at : at + 4] = b"\xff\xf1\x10\x00"
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
        (unknown_marker(), "broken JPEG picture"),
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


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ((1280, 960), (1280, 960)),
        ((1920, 1080), (960, 540)),
        ((4032, 3024), (1008, 756)),
        ((8000, 1000), (8000, 1000)),  # encoders of 512 pixels need its height
        ((1080, 8000), (1080, 8000)),  # text of a tall screenshot is read at full width
    ],
)
def test_jpegs_keep_what_is_read_of_them(
    tmp_path: Path, size: tuple[int, int], decoded: tuple[int, int]
) -> None:
    """Decoded sizes are enough for OCR and for encoders; with a larger side for OCR, larger."""
    width, height = size
    path = media.write_jpeg(tmp_path / "a.jpg", media.solid(width, height))
    assert one(path).shape[1::-1] == decoded
    assert read(path, side=2 * max(size))[0].shape[1::-1] == size


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpegs_are_what_pillow_decodes(tmp_path: Path, orientation: int, mode: str) -> None:
    """To the last bit, turned upright, grey or in colours."""
    pixels = cv2.resize(media.noise(15, 10), (301, 203), interpolation=cv2.INTER_CUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels).convert(mode).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(one(path), expected)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:4:0", "4:1:1"])
@pytest.mark.parametrize(("size", "factor"), [((3, 2), 1), ((1281, 1027), 2)])
def test_jpegs_of_any_colours_are_what_pillow_decodes(
    tmp_path: Path, size: tuple[int, int], factor: int, subsampling: str, progressive: bool
) -> None:
    """To the last bit at whole and reduced size, whatever the resolution of colours."""
    pixels = cv2.resize(media.noise(15, 10), size, interpolation=cv2.INTER_CUBIC)
    path = tmp_path / "a.jpg"
    cv2.imwrite(
        str(path),
        pixels,
        (
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
            getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{subsampling.replace(':', '')}"),
            cv2.IMWRITE_JPEG_PROGRESSIVE,
            int(progressive),
        ),
    )
    with Image.open(path) as image:
        image.draft(None, (size[0] // factor, size[1] // factor))
        expected = np.asarray(image)
    (decoded,) = read(path, side=size[0] // factor)
    assert np.array_equal(decoded, expected)


def test_large_pictures_are_scaled_nearly_as_by_averages() -> None:
    """At most 2 of 255 apart on smooth ones of any size, by halves and linearly for OCR too."""
    for width, height in ((1280, 960), (1921, 1081), (901, 3000)):
        noise = media.noise(9, 7)
        smooth: Any = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        for scale, side in ((squash, (224, 224)), (shrink, (width // 3, height // 3))):
            assert near(scale(smooth, *side), average(smooth, *side), 2)


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
