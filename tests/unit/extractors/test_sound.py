"""Sound: patches as VGGish's own code makes them, and resampling as other libraries do it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.signal

from common.errors import MediaError
from config.features import FeatureSettings
from config.settings import DecodeSettings
from extractors.media.containers import find_stream, open_container, packets
from extractors.media.decode import decode_media
from extractors.media.sniff import check_type
from extractors.media.sound import SoundTrack, log_mel_patches
from tests.support import media


def reference() -> ModuleType:
    """`torchvggish.mel_features` without the package, whose import loads torch and resampy."""
    package: Any = importlib.util.find_spec("torchvggish")
    assert package.origin is not None
    file = Path(package.origin).with_name("mel_features.py")
    spec: Any = importlib.util.spec_from_file_location("vggish_mel_features", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def reference_patches(waveform: np.ndarray) -> np.ndarray:
    """VGGish's own patches with VGGish's own parameters."""
    module = reference()
    log_mel = module.log_mel_spectrogram(
        waveform.astype(np.float64),
        audio_sample_rate=16000,
        log_offset=0.01,
        window_length_secs=0.025,
        hop_length_secs=0.010,
        num_mel_bins=64,
        lower_edge_hertz=125,
        upper_edge_hertz=7500,
    )
    return np.asarray(module.frame(log_mel, window_length=96, hop_length=96))


def waveform_of(path: Path, max_audio_s: float = 300) -> np.ndarray:
    with open_container(path, check_type(path, "audio")) as container:
        stream = find_stream(container, "audio")
        track = SoundTrack(stream, max_audio_s, 16_000)
        for packet in packets(container, stream):
            track.feed(packet)
        return track.waveform()


def patches_of(path: Path, **limits: Any) -> np.ndarray:
    decoded = decode_media("audio", path, FeatureSettings(), DecodeSettings(**limits))
    assert decoded.sound is not None
    assert decoded.frames is None
    assert decoded.image is None
    return decoded.sound


@pytest.mark.parametrize("seconds", [0.975, 1.0, 5.3, 31.0])
def test_patches_equal_vggish(seconds: float) -> None:
    """Noise, a chirp and silence give torchvggish's patches to 1e-5, over block borders too."""
    count = round(seconds * 16000)
    times = np.arange(count) / 16000
    random = np.random.default_rng(3)
    for waveform in (
        random.normal(0, 0.2, count),
        0.8 * scipy.signal.chirp(times, 50, seconds, 7900),
        np.zeros(count),
    ):
        ours = log_mel_patches(waveform.astype(np.float32))
        theirs = reference_patches(waveform.astype(np.float32))
        assert ours.dtype == np.float32
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize("samples", [0, 1, 400, 15359, 15599, 15600])
def test_short_sound_is_padded_to_one_patch(samples: int) -> None:
    waveform = np.full(samples, 0.3, np.float32)
    expected = reference_patches(np.pad(waveform, (0, 15600 - samples)))
    patches = log_mel_patches(waveform)
    assert patches.shape == (1, 96, 64)
    assert np.abs(patches - expected).max() < 1e-5


def test_the_tail_is_dropped() -> None:
    assert len(log_mel_patches(np.zeros(15600 + 15359, np.float32))) == 1
    assert len(log_mel_patches(np.zeros(15600 + 15360, np.float32))) == 2


@pytest.mark.parametrize("seconds", [2, 12])
@pytest.mark.parametrize("rate_hz", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_resampling_of_a_sine(tmp_path: Path, rate_hz: int, seconds: int) -> None:
    """A 1 kHz sine stored at any rate is the 1 kHz sine at 16 kHz, to 50 dB, without seams."""
    path = media.write_wav(
        tmp_path / "a.wav", media.tone(1000, seconds, rate_hz), rate_hz, subtype="FLOAT"
    )
    waveform = waveform_of(path)
    expected = media.tone(1000, seconds, 16000)
    assert abs(len(waveform) - len(expected)) <= 32
    inner = slice(800, 16000 * seconds - 1000)
    assert float(np.abs(waveform[inner] - expected[inner]).max()) < 0.5 * 10 ** (-50 / 20)


def test_resampling_equals_scipy(tmp_path: Path) -> None:
    """Noise under 6 kHz at 48 kHz comes out as scipy's polyphase resampler gives it."""
    random = np.random.default_rng(5).normal(0, 0.2, 96000)
    band = scipy.signal.butter(8, 6000, fs=48000, output="sos")
    sound = scipy.signal.sosfilt(band, random).astype(np.float32)
    path = media.write_wav(tmp_path / "a.wav", sound, 48000, subtype="FLOAT")
    theirs = scipy.signal.resample_poly(sound, 1, 3)
    ours = waveform_of(path)[: len(theirs)]
    inner = slice(500, 31000)
    noise = float(np.square(ours[inner] - theirs[inner]).mean() / np.square(theirs[inner]).mean())
    assert noise < 1e-3
    gap = np.abs(log_mel_patches(ours) - log_mel_patches(theirs.astype(np.float32)))
    assert float(gap.mean()) < 0.02


@pytest.mark.parametrize("channels", [2, 6])
@pytest.mark.parametrize("name", ["a.wav", "a.m4a", "a.mkv"])
def test_channels_are_mixed(tmp_path: Path, channels: int, name: str) -> None:
    rate_hz = 48000
    sound = np.stack([media.tone(500, 2, rate_hz, 0.2)] * channels, 1)
    path = tmp_path / name
    if name == "a.wav":
        media.write_wav(path, sound, rate_hz)
    else:
        media.write_aac(path, sound, rate_hz)
    waveform = waveform_of(path)
    assert int(np.abs(np.fft.rfft(waveform[1600:17600])).argmax()) == 500
    # AAC filters the low-frequency channel out
    level = 0.2 * 5 / 6 if channels == 6 and name != "a.wav" else 0.2
    assert abs(float(np.abs(waveform[3000:29000]).max()) - level) < 0.01


def test_the_default_stream_of_several(tmp_path: Path) -> None:
    first, second = media.tone(500, 1, 48000), media.tone(3000, 1, 48000)
    path = media.write_video(
        tmp_path / "a.mp4", media.grey_steps(25), audio=[first, second], audio_rate_hz=48000
    )
    assert abs(int(np.abs(np.fft.rfft(waveform_of(path)[:16000])).argmax()) - 500) < 3


def test_a_rate_that_changes_on_the_way(tmp_path: Path) -> None:
    """Two MP3s joined, of different rates and channels, are read to their end."""
    stereo = np.stack([media.tone(500, 1, 48000)] * 2, 1)
    one = media.write_mp3(tmp_path / "1.mp3", media.tone(500, 1, 44100), 44100).read_bytes()
    two = media.write_mp3(tmp_path / "2.mp3", stereo, 48000).read_bytes()
    (tmp_path / "a.mp3").write_bytes(one + two)
    assert len(waveform_of(tmp_path / "a.mp3")) > 1.9 * 16000


def test_max_audio_s(tmp_path: Path) -> None:
    path = media.write_wav(tmp_path / "a.wav", media.tone(440, 20, 16000))
    assert patches_of(path, max_audio_s=5).shape == (5, 96, 64)
    assert patches_of(path, max_duration_s=3).shape == (3, 96, 64)
    assert patches_of(path).shape == (20, 96, 64)


def test_a_video_without_sound_is_no_sound(tmp_path: Path) -> None:
    path = media.write_video(tmp_path / "a.mp4", media.grey_steps(5))
    with pytest.raises(MediaError, match=r"^MP4 video has no sound$"):
        patches_of(path)


def test_an_empty_track(tmp_path: Path) -> None:
    path = media.write_wav(tmp_path / "a.wav", np.zeros(0, np.float32))
    with pytest.raises(MediaError, match=r"^WAV sound is empty: it has no sound$"):
        patches_of(path)


def test_damaged_sound(tmp_path: Path) -> None:
    """An MP3 of which most is overwritten is broken; a few bad frames are passed over."""
    path = media.write_mp3(tmp_path / "a.mp3", media.tone(440, 4, 44100), 44100)
    data = bytearray(path.read_bytes())
    data[8000:9000] = b"\x55" * 1000
    path.write_bytes(bytes(data))
    assert 3 <= len(patches_of(path)) <= 4
    data[2000:] = bytes(len(data) - 2000)
    path.write_bytes(bytes(data))
    with pytest.raises(MediaError, match="MP3"):
        patches_of(path)
