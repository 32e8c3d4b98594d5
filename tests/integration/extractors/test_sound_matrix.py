"""Sound of every format gives the tone that was written; of headers only promises are believed.

The second judge is PyAV, decoding and resampling plainly, or the tone itself.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import MediaError
from config.features import FeatureSettings
from config.settings import DecodeSettings
from extractors.media.decode import decode_media, read_waveform
from extractors.media.sizes import filled_in
from extractors.media.sound import log_mel_patches
from tests.support import media

LIMITS = DecodeSettings()
SECONDS = 4.0


def tone(rate_hz: int) -> media.Sound:
    return media.tone(700, SECONDS, rate_hz, 0.3)


def write(path: Path, codec: str, rate_hz: int, options: dict[str, str] | None = None) -> Path:
    encoder = {"b": "128000"} if codec == "wmav2" else None
    return media.write_aac(
        path, tone(rate_hz), rate_hz, codec=codec, options=options, encoder=encoder
    )


FORMATS: dict[str, tuple[str, int]] = {
    "a.wav": ("pcm_s16le", 44100),
    "u8.wav": ("pcm_u8", 22050),
    "s24.wav": ("pcm_s24le", 48000),
    "f32.wav": ("pcm_f32le", 48000),
    "alaw.wav": ("pcm_alaw", 8000),
    "rf64.wav": ("pcm_s16le", 44100),
    "ima.wav": ("adpcm_ima_wav", 22050),
    "a.w64": ("pcm_s16le", 44100),
    "a.au": ("pcm_s16be", 44100),
    "a.aiff": ("pcm_s16be", 44100),
    "a.caf": ("pcm_s16be", 44100),
    "a.flac": ("flac", 44100),
    "a.mp3": ("libmp3lame", 44100),
    "a.mp2": ("mp2", 44100),
    "a.ogg": ("libopus", 48000),
    "a.aac": ("aac", 44100),
    "a.m4a": ("aac", 44100),
    "a.mp4": ("aac", 44100),
    "alac.m4a": ("alac", 44100),
    "a.ac3": ("ac3", 48000),
    "a.eac3": ("eac3", 48000),
    "a.wma": ("wmav2", 44100),
    "a.wv": ("wavpack", 44100),
    "a.tta": ("tta", 44100),
    "a.voc": ("pcm_u8", 22050),
    "a.webm": ("libopus", 48000),
    "a.mka": ("aac", 44100),
    "a.ts": ("aac", 44100),
    "a.flv": ("aac", 44100),
}


def check(path: Path, seconds: float = SECONDS, frequency_hz: float = 700) -> np.ndarray:
    """The tone, as long as it is; returns the patches."""
    waveform, _ = read_waveform(path, LIMITS, 16_000)
    assert abs(len(waveform) / 16_000 - seconds) < 0.15
    inner = waveform[4000:-4000]
    assert abs(np.abs(np.fft.rfft(inner)).argmax() * 16_000 / len(inner) - frequency_hz) < 8
    assert abs(float(np.sqrt(np.mean(inner**2))) - 0.3 / 2**0.5) < 0.02
    decoded = decode_media("audio", path, FeatureSettings(), LIMITS)
    assert decoded.sound is not None
    assert np.array_equal(decoded.sound, log_mel_patches(waveform))
    return decoded.sound


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path: Path, name: str) -> None:
    codec, rate_hz = FORMATS[name]
    path = write(
        tmp_path / name, codec, rate_hz, {"rf64": "always"} if name == "rf64.wav" else None
    )
    patches = check(path)
    expected = log_mel_patches(media.tone(700, SECONDS, level=0.3))
    loudest = int(expected.mean((0, 1)).argmax())
    assert patches[1:3, :, loudest].mean() == pytest.approx(
        expected[1:3, :, loudest].mean(), abs=0.2
    )
    assert decode_media("audio", path, FeatureSettings(), LIMITS).failures == {}


PLACEHOLDERS = [0, 36, 0x7FFFFFFF, 0x80000000, 2_000_000_000, 0xFFFFFFFF, 0xFFFFFFFF - 36]


@pytest.mark.parametrize("size", PLACEHOLDERS)
@pytest.mark.parametrize("which", ["file", "samples", "both"])
@pytest.mark.parametrize("name", ["a.wav", "a.aiff", "a.w64", "a.au"])
def test_placeholder_sizes(tmp_path: Path, name: str, which: str, size: int) -> None:
    """Pipes and speech servers write a header before they know the length of what follows."""
    path = write(tmp_path / name, *FORMATS[name])
    data = bytearray(path.read_bytes())
    layout, outer, samples, name_bytes, own = {
        "a.wav": ("<I", 4, b"data", 4, 0),
        "a.aiff": (">I", 4, b"SSND", 4, 8),
        "a.w64": ("<Q", 16, b"data", 16, 24),
        "a.au": (">I", 8, b".snd", 8, 0),  # one size
    }[name]
    if which != "samples":
        struct.pack_into(layout, data, outer, size)
    if which != "file":
        struct.pack_into(layout, data, data.index(samples) + name_bytes, max(own, size - 36))
    if which == "both" and name == "a.aiff":
        struct.pack_into(">I", data, data.index(b"COMM") + 10, size // 2)
    path.write_bytes(bytes(data))
    check(path)


@pytest.mark.parametrize("name", ["a.aiff", "a.w64", "a.au"])
def test_sizes_that_are_there_are_left(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, FORMATS[name][0], 44100)
    assert filled_in(path, name.partition(".")[2]) is None


def cut_start(data: bytes) -> bytes:
    return data[len(data) // 4 + 3 :]


JUNK: dict[str, Callable[[bytes], bytes]] = {
    "whole": lambda data: data,
    "zeros": lambda data: bytes(5000) + data,
    "many zeros": lambda data: bytes(300_000) + data,
    "line": lambda data: b"\r\n" + data,
    "ape tag": lambda data: (
        b"APETAGEX" + struct.pack("<IIII8x", 2000, 50, 1, 0xA0000000) + b"x" * 50 + data
    ),
    "id3 and zeros": lambda data: b"ID3\4\0\0\0\0\1\0" + bytes(128 + 1500) + data,
}


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("name", ["a.mp3", "a.aac", "a.ac3"])
def test_bytes_before_the_sound(tmp_path: Path, name: str, junk: str) -> None:
    codec, rate_hz = FORMATS[name]
    options = {"write_xing": "0", "id3v2_version": "0"} if name == "a.mp3" else None
    data = write(tmp_path / name, codec, rate_hz, options).read_bytes()
    path = tmp_path / "file"
    path.write_bytes(JUNK[junk](data))
    check(path)


@pytest.mark.parametrize("name", ["a.mp3", "a.aac", "a.ac3", "a.eac3", "a.ts"])
def test_sound_that_begins_inside_a_frame(tmp_path: Path, name: str) -> None:
    codec, rate_hz = FORMATS[name]
    data = write(tmp_path / name, codec, rate_hz).read_bytes()
    path = tmp_path / "file"
    path.write_bytes(cut_start(data))
    check(path, 0.75 * SECONDS)


def test_lengths_that_are_estimated(tmp_path: Path) -> None:
    """A bit rate of silence, and a picture at the end, make an MP3 seem longer than it is."""
    rate_hz = 44100
    silence = np.zeros(3 * rate_hz, np.float32)
    noise = np.random.default_rng(0).normal(0, 0.2, rate_hz).astype(np.float32)
    path = media.write_aac(
        tmp_path / "a.mp3",
        np.concatenate([silence, noise]),
        rate_hz,
        codec="libmp3lame",
        options={"write_xing": "0"},
        encoder={"q": "2"},
    )
    for tail in (b"", b"APETAGEX" + bytes(200_000)):
        path.write_bytes(path.read_bytes() + tail)
        decoded: Any = decode_media("audio", path, FeatureSettings(), LIMITS)
        assert len(decoded.sound) == 4
        assert decoded.failures == {}


@pytest.mark.parametrize("name", ["a.wav", "a.aiff", "a.flac", "a.mp3", "faststart.m4a"])
def test_cut_sound(tmp_path: Path, name: str) -> None:
    """One policy: 95% is used and the loss is said, 80% is broken."""
    rate_hz = 44100
    noise = np.random.default_rng(0).normal(0, 0.2, 8 * rate_hz).astype(np.float32)
    codecs: dict[str, Any] = {"wav": "pcm_s16le", "aiff": "pcm_s16be", "m4a": "aac"}
    codec = codecs.get(name.split(".")[1], {"mp3": "libmp3lame"}.get(name[2:], "flac"))
    options = {"movflags": "faststart"} if name.endswith("m4a") else None
    path = media.write_aac(tmp_path / name, noise, rate_hz, codec=codec, options=options)
    cut = media.truncate(path, tmp_path / "95", 0.95)
    decoded: Any = decode_media("audio", cut, FeatureSettings(), LIMITS)
    assert len(decoded.sound) == 7
    assert decoded.failures["audio"].message.startswith("truncated ")
    cut = media.truncate(path, tmp_path / "80", 0.8)
    with pytest.raises(MediaError, match=r"^truncated "):
        decode_media("audio", cut, FeatureSettings(), LIMITS)
