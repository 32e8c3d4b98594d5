"""Files that waste time or break decoders: found by fuzzing, and by thinking like it."""

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from common.errors import MediaError
from config.settings import DecodeSettings
from extractors.media import pictures, sniff
from extractors.media.decode import decode_media
from extractors.media.sound import log_mel_patches
from tests.support import media
from tests.support.tiny_models import tiny_features

LIMIT = 1000

PARTS = {
    "png": (b"IHDR", 21, b"\0\0\0\0aaAa" + struct.pack(">I", zlib.crc32(b"aaAa"))),
    "gif": (b"hello", 5, b"\1a"),
    "jpeg segments": (b"\xff\xd8", 2, b"\xff\xe0\0\2"),
    "jpeg fill bytes": (b"\xff\xd8", 2, b"\xff"),
}
"""Kind of picture -> what to look for, bytes from there to the place for parts, and a part."""


def of_parts(family: str, count: int) -> bytes:
    """A picture with a number of empty parts."""
    kind, content = family.split(maxsplit=1)[0], BytesIO()
    Image.fromarray(media.solid(8, 8)).save(content, kind, comment="hello")
    data = content.getvalue()
    mark, offset, part = PARTS[family]
    at = data.index(mark) + offset
    return data[:at] + part * count + data[at:]


@pytest.mark.parametrize("family", PARTS)
def test_picture_of_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str) -> None:
    """A picture of more parts than anybody means is broken, not walked to its end."""
    monkeypatch.setattr(pictures, "MAX_PARTS", LIMIT)
    path = tmp_path / "picture"
    path.write_bytes(of_parts(family, LIMIT // 10))
    assert len(list(pictures.read_pictures(path, max_pixels=1000))) == 1
    path.write_bytes(of_parts(family, 2 * LIMIT))
    kind = family.split(maxsplit=1)[0].upper()
    with pytest.raises(MediaError, match=rf"^broken {kind} picture$"):
        pictures.picture_size(path)


def test_mp4_of_boxes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An MP4 of empty boxes is refused before FFmpeg reads them once more."""
    monkeypatch.setattr(sniff, "MAX_PARTS", LIMIT)
    head = b"\0\0\0\x18ftypisom" + b"\0" * 12
    path = tmp_path / "a.mp4"
    path.write_bytes(head + b"\0\0\0\x08free" * (LIMIT - 10))
    assert sniff.check_type(path, "video").family == "mp4"
    path.write_bytes(head + b"\0\0\0\x08free" * LIMIT)
    with pytest.raises(MediaError, match="nothing but boxes"):
        sniff.check_type(path, "video")


def test_jpeg_of_scans(tmp_path: Path) -> None:
    """Every scan of a progressive JPEG may cost a pass over all pixels: hundreds are refused."""
    path = media.write_jpeg(tmp_path / "a.jpg", media.noise(64, 48))
    data, scan = path.read_bytes(), b"\xff\xda\0\x08\x01\x01\0\0\x3f\0\0\0"
    path.write_bytes(data[:-2] + scan * 100 + data[-2:])
    assert pictures.picture_size(path) == (64, 48)
    path.write_bytes(data[:-2] + scan * 600 + data[-2:])
    with pytest.raises(MediaError, match=r"^broken JPEG picture$"):
        pictures.picture_size(path)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38])
def test_sound_that_is_no_number(tmp_path: Path, value: float) -> None:
    """Samples of a floating-point file may be anything: the patches stay finite and small.

    Two channels, so that their mean would add infinity and its opposite.
    """
    left = np.full(16_000, value, np.float32)
    path = tmp_path / "a.wav"
    soundfile.write(str(path), np.stack([left, -left], 1), 16_000, subtype="FLOAT")
    patches = decode_media("audio", path, tiny_features(), DecodeSettings()).sound
    assert patches is not None
    assert np.isfinite(patches).all()
    assert np.abs(patches).max() < 20


@pytest.mark.parametrize("channels", [1, 2, 6, 7, 8, 9, 17, 64])
def test_sound_of_many_channels(tmp_path: Path, channels: int) -> None:
    """Eight channels and more are mixed like fewer: PyAV would read past the end of their planes.

    Every channel holds the tone times its own factor; the factors' mean is 1.
    """
    tone = media.tone(duration_s=1.0, level=0.3)
    factors = np.linspace(0.5, 1.5, channels) if channels > 1 else np.ones(1)
    path = tmp_path / "a.wav"
    samples = (tone[:, None] * factors).astype(np.float32)  # (samples, channels)
    soundfile.write(str(path), samples, 16_000, subtype="FLOAT")
    patches = decode_media("audio", path, tiny_features(), DecodeSettings()).sound
    assert patches is not None
    np.testing.assert_allclose(patches, log_mel_patches(tone), atol=1e-3)


def test_stream_that_comes_later(tmp_path: Path) -> None:
    """A stream that begins in the middle of the file is passed over: PyAV raises IndexError.

    FFmpeg looks for streams in the first 5 MB and at the end, so the film is large and is there
    twice, around a short one with sound.
    """
    film = media.write_video(
        tmp_path / "film.mpg",
        [media.noise(640, 480, i) for i in range(16)],
        codec="mpeg2video",
        options={"b": "40000000", "qmax": "2"},
    ).read_bytes()
    loud = media.write_video(
        tmp_path / "loud.mpg",
        media.grey_steps(20),
        codec="mpeg2video",
        audio=media.tone(duration_s=1, rate_hz=44100),
        audio_codec="mp2",
    ).read_bytes()
    path = tmp_path / "late.mpg"
    path.write_bytes(film + loud + film)
    with av.open(str(path)) as container, pytest.raises(IndexError):
        for _ in container.demux(*container.streams):
            pass
    decoded: Any = decode_media("video", path, tiny_features(), DecodeSettings())
    assert len(decoded.frames) == 4


@pytest.mark.parametrize("rate_hz", [0.0, 1.0, 3e9, 1e13, 1.8945e14, 1e300, np.inf, np.nan, -8e3])
def test_sound_at_impossible_rates(tmp_path: Path, rate_hz: float) -> None:
    """A sample rate that nothing has is a broken file, also where FFmpeg says so late.

    At 1 Hz, one second's packet would be resampled to hours.
    """
    path = tmp_path / "a.caf"
    media.write_aac(path, media.tone(rate_hz=44100), codec="pcm_s16be")
    content = bytearray(path.read_bytes())
    struct.pack_into(">d", content, content.index(b"desc") + 12, rate_hz)
    path.write_bytes(bytes(content))
    with pytest.raises(MediaError, match=r"^[^\n]+$"):
        decode_media("audio", path, tiny_features(), DecodeSettings())
