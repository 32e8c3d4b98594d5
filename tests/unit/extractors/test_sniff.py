"""The type of a file by its bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import MediaError
from common.post import MediaKind
from config.settings import DecodeSettings
from extractors.media.decode import read_waveform
from extractors.media.sniff import check_type, sniff
from tests.support import media

MAKERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a.jpg": ("jpeg", lambda p: media.write_jpeg(p, media.solid(16, 16))),
    "a.png": ("png", lambda p: media.write_png(p, media.solid(16, 16))),
    "a.gif": ("gif", lambda p: media.write_animation(p, media.grey_steps(2))),
    "a.webp": ("webp", lambda p: media.write_webp(p, media.solid(16, 16))),
    "a.mp4": ("mp4", lambda p: media.write_video(p, media.grey_steps(3))),
    "a.mov": ("mp4", lambda p: media.write_video(p, media.grey_steps(3))),
    "a.mkv": ("matroska", lambda p: media.write_video(p, media.grey_steps(3))),
    "a.avi": ("avi", lambda p: media.write_video(p, media.grey_steps(3), codec="mpeg4")),
    "a.flv": ("flv", lambda p: media.write_video(p, media.grey_steps(3))),
    "a.ts": ("mpegts", lambda p: media.write_video(p, media.grey_steps(9))),
    "a.mpg": ("mpeg", lambda p: media.write_video(p, media.grey_steps(9), codec="mpeg2video")),
    "a.wmv": ("asf", lambda p: media.write_video(p, media.grey_steps(3), codec="mpeg4")),
    "a.wav": ("wav", lambda p: media.write_wav(p, media.tone())),
    "a.ogg": ("ogg", lambda p: media.write_ogg(p, media.tone())),
    "a.flac": ("flac", lambda p: media.write_flac(p, media.tone())),
    "a.m4a": ("mp4", lambda p: media.write_aac(p, media.tone(rate_hz=44100))),
    "a.aac": ("aac", lambda p: media.write_aac(p, media.tone(rate_hz=44100))),
    "a.mp3": ("id3", lambda p: media.write_mp3(p, media.tone(rate_hz=44100))),
    "b.mp3": ("mp3", lambda p: _untagged_mp3(p, 44100)),
    "c.mp3": ("mp3", lambda p: _untagged_mp3(p, 16000)),
}


def _untagged_mp3(path: Path, rate_hz: int) -> None:
    """An MP3 that begins with a frame and not with an ID3 tag."""
    data = media.write_mp3(path, media.tone(rate_hz=rate_hz), rate_hz).read_bytes()
    length = 10 + (data[6] << 21 | data[7] << 14 | data[8] << 7 | data[9])
    path.write_bytes(data[length:])


@pytest.mark.parametrize("name", MAKERS)
def test_real_files_are_told_apart(tmp_path: Path, name: str) -> None:
    family, write = MAKERS[name]
    write(tmp_path / name)
    media_type: Any = sniff((tmp_path / name).read_bytes()[:4096])
    assert media_type.family == family


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><title>404</title>", "is not a picture: HTML page"),
        (b'\n <svg xmlns="http://www.w3.org/2000/svg"/>', "is not a picture: SVG drawing"),
        (b'{"error": "gone"}', "is not a picture: text"),
        (b"#EXTM3U\nhttp://127.0.0.1/x.ts\n", "is not a picture: playlist"),
        (b"%PDF-1.7", "is not a picture: PDF document"),
        (b"\x00\x01\x02\x03" * 9, "is not a picture: unknown type of file"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "is not a picture: JPEG XL picture, which cannot"),
        (b"8BPS\0\1", "is not a picture: Photoshop document, which cannot be decoded"),
        (b"", "the file is empty"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    """Error pages and documents behind a picture's URL are refused with what they are."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(MediaError) as caught:
        check_type(path, "image")
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("a.mp4", "image", "is not a picture: MP4 video"),
        ("a.jpg", "video", "is not a video: JPEG picture"),
        ("a.wav", "video", "is not a video: WAV sound"),
        ("a.png", "audio", "is not a sound: PNG picture"),
    ],
)
def test_the_wrong_kind_is_named(tmp_path: Path, name: str, kind: MediaKind, said: str) -> None:
    path = tmp_path / "file.bin"
    MAKERS[name][1](tmp_path / name)
    (tmp_path / name).rename(path)
    with pytest.raises(MediaError, match=f"^{said}$"):
        check_type(path, kind)


def test_no_path_in_the_reason(tmp_path: Path) -> None:
    """A missing file's reason is one line without the folders of this machine."""
    with pytest.raises(MediaError) as caught:
        check_type(tmp_path / "gone.mp4", "video")
    assert str(caught.value) == "cannot be read: No such file or directory"


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_are_nothing(tmp_path: Path, seed: int) -> None:
    path = media.write_random(tmp_path / "x.mp3", 8192, seed)
    with pytest.raises(MediaError, match="unknown type of file"):
        check_type(path, "audio")


@pytest.mark.parametrize("name", ["a.mp3", "b.mp3", "c.mp3"])
def test_much_behind_a_sound_makes_it_no_longer(tmp_path: Path, name: str) -> None:
    """A length is a promise where the file tells it, not where its bytes are divided by a rate."""
    path = tmp_path / name
    MAKERS[name][1](path)
    whole, note = read_waveform(path, DecodeSettings(), 16_000)
    assert note == ""
    path.write_bytes(path.read_bytes() + b"lyrics, pictures " * path.stat().st_size)
    waveform, note = read_waveform(path, DecodeSettings(), 16_000)
    assert note == ""
    assert abs(len(waveform) - len(whole)) < 0.2 * 16_000


def test_a_large_tag_hides_no_cut(tmp_path: Path) -> None:
    path = tmp_path / "b.mp3"
    _untagged_mp3(path, 44100)
    data = path.read_bytes()
    tag = b"ID3\4\0\0\0\0\x40\0" + bytes(8192)
    path.write_bytes(tag + data)
    assert read_waveform(path, DecodeSettings(), 16_000)[1] == ""
    path.write_bytes(tag + data[: len(data) // 2])
    with pytest.raises(MediaError, match=r"^truncated MP3"):
        read_waveform(path, DecodeSettings(), 16_000)


def test_sound_that_holds_the_mark_of_a_film(tmp_path: Path) -> None:
    """Four bytes of a frame that look like a program stream's are none without what follows."""
    _untagged_mp3(tmp_path / "a.mp3", 44100)
    media_type = sniff(
        b"\x91end of a frame\0\0\1\xba\x44\x91\x92" + (tmp_path / "a.mp3").read_bytes()
    )
    assert media_type is not None
    assert (media_type.family, media_type.start) == ("mp3", 22)


@pytest.mark.parametrize("name", ["a.wav", "a.ogg", "a.m4a", "a.flac", "a.aac", "b.mp3"])
def test_a_tag_before_any_sound(tmp_path: Path, name: str) -> None:
    """Taggers put ID3 before files whose formats know no such tag."""
    family, write = MAKERS[name]
    write(tmp_path / name)
    path = tmp_path / "tagged"
    path.write_bytes(b"ID3\4\0\0\0\0\x10\0" + bytes(2048) + (tmp_path / name).read_bytes())
    seconds, limits = [], DecodeSettings()
    for file in (path, tmp_path / name):
        waveform, note = read_waveform(file, limits, 16_000)
        seconds.append(round(len(waveform) / 16_000, 1))
        assert note == ""
    assert seconds[0] == seconds[1]
    assert check_type(path, "audio").family in (family, "id3")


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.avi", "a.wav", "a.m4a"])
@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_a_missing_end_is_noticed(tmp_path: Path, name: str, keep: float) -> None:
    MAKERS[name][1](tmp_path / name)
    kind: MediaKind = "audio" if name in ("a.wav", "a.m4a") else "video"
    assert check_type(tmp_path / name, kind).note == ""
    cut = media.truncate(tmp_path / name, tmp_path / "cut", keep)
    with pytest.raises(MediaError, match=r"^truncated .+: \d+ of \d+ bytes$"):
        check_type(cut, kind)


def test_live_recordings_have_no_length(tmp_path: Path) -> None:
    """A Matroska file whose writer could not seek back says nothing of its length: accepted."""
    path = media.write_video(
        tmp_path / "live.mkv", media.grey_steps(25), container_options={"live": "1"}
    )
    assert check_type(path, "video").family == "matroska"
    wav = media.write_wav(tmp_path / "piped.wav", media.tone())
    data = wav.read_bytes()
    wav.write_bytes(data[:4] + b"\xff\xff\xff\xff" + data[8:])
    assert check_type(wav, "audio").family == "wav"


def test_rubbish_behind_the_end_is_tolerated(tmp_path: Path) -> None:
    path = media.write_video(tmp_path / "a.mp4", media.grey_steps(5))
    path.write_bytes(path.read_bytes() + b"\0" * 500)
    assert check_type(path, "video").family == "mp4"
