"""``insighttag inspect``: a media file as the model sees it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageDraw, ImageFont

from config.features import FeatureSettings
from config.settings import DecodeSettings
from extractors.media.decode import decode_media
from scripts.cli import run
from tests.support import media

SMALL = {
    "video": {"frames": 4, "image_size": 32, "decode": "accurate"},
    "image": {"image_size": 32},
    "ocr": {"enabled": False},
}
SETTINGS = [
    *("--set", "features.ocr.enabled=false", "--set", "features.video.frames=4"),
    *("--set", "features.video.decode=accurate"),
] + [item for name in ("video", "image") for item in ("--set", f"features.{name}.image_size=32")]


def facts(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert run(["inspect", *arguments, "--json", *SETTINGS]) == code
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


def test_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Streams, times and sound are shown; what is written is what the extractors get."""
    path = media.write_video(
        tmp_path / "a.mp4", media.grey_steps(50), rotation=90, audio=media.tone(440, 2, 44100)
    )
    shown = facts(capsys, str(path), "--out", str(tmp_path / "seen"))
    assert (shown["type"], shown["read_as"], shown["notes"]) == ("MP4 video", "video", {})
    assert [stream["codec"] for stream in shown["streams"]] == ["h264", "aac"]
    assert shown["frames"]["times_s"] == pytest.approx([0.24, 0.72, 1.24, 1.72], abs=0.05)
    assert shown["turned"] == "transposed, left and right swapped"
    assert shown["sound"]["windows"] == 2
    decoded = decode_media("video", path, FeatureSettings.model_validate(SMALL), DecodeSettings())
    assert decoded.frames is not None
    for i, frame in enumerate(decoded.frames):
        with Image.open(tmp_path / "seen" / f"frame_{i:02}.png") as written:
            assert np.array_equal(np.asarray(written), frame)
    sound, rate_hz = soundfile.read(str(tmp_path / "seen" / "sound.wav"))
    assert (rate_hz, round(len(sound) / rate_hz)) == (16_000, 2)


def test_text_is_shown_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The extractor keeps the beginning: that is said, and the rest is seen."""
    picture = Image.new("RGB", (640, 160), "white")
    font = ImageFont.load_default(56)
    ImageDraw.Draw(picture).text((40, 40), "HELLO WORLD", "black", font)
    picture.save(tmp_path / "a.png")
    settings = ["--set", "features.image.image_size=32", "--set", "features.ocr.max_chars=5"]
    assert run(["inspect", str(tmp_path / "a.png"), "--json", *settings]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [each["text"] for each in shown["ocr"]] == ["HELLO WORLD"]
    assert shown["notes"] == {
        "ocr": "of 11 characters the extractor keeps the first 5 (features.ocr.max_chars)"
    }


def test_pictures_and_sounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = facts(capsys, str(media.write_gif(tmp_path / "a.gif", media.grey_steps(5))))
    assert (shown["read_as"], shown["image"]["shape"]) == ("image", [1, 32, 32, 3])
    shown = facts(capsys, str(tmp_path / "a.gif"), "--as", "video")
    assert len(shown["frames"]["times_s"]) == 4
    shown = facts(capsys, str(media.write_wav(tmp_path / "a.wav", media.tone(440, 3))))
    assert (shown["read_as"], shown["sound"]["seconds"]) == ("audio", 3.0)


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A note and 0 for a file that is used, the reason and 1 for a broken one, 2 for none."""
    path = media.write_wav(tmp_path / "a.wav", media.tone(440, 3))
    cut = media.truncate(path, tmp_path / "cut.wav", 0.95)
    assert facts(capsys, str(cut))["notes"]["audio"].endswith("which are used")
    cut = media.truncate(path, tmp_path / "cut.wav", 0.5)
    assert facts(capsys, str(cut), code=1)["error"].startswith("truncated WAV sound")
    assert run(["inspect", str(cut), *SETTINGS]) == 1
    assert "failed    truncated WAV sound" in capsys.readouterr().out
    assert run(["inspect", str(tmp_path / "none.mp4"), *SETTINGS]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["http://", "https://", "//"])
def test_a_password_of_a_url_is_not_shown(scheme: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", f"{scheme}u:secret1@127.0.0.1:9/a.jpg", *SETTINGS]) == 2
    said = capsys.readouterr().err
    assert f"{scheme}u:***@127.0.0.1" in said
    assert "secret1" not in said
