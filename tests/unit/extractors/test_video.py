"""Frames of videos, whole and broken."""

from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from common.errors import MediaError
from config.features import FeatureSettings
from extractors.media.pictures import average
from extractors.media.video import FrameScaler
from tests.support import media
from tests.support.extractors.video_support import (
    decode,
    everything,
    greys,
    moving,
    settings,
    taken,
)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain.mp4", {}),
        ("b.mp4", {"options": {"preset": "medium", "bf": "3", "b-pyramid": "normal"}}),
        ("b.mkv", {"options": {"preset": "medium", "bf": "3"}, "gop": 250}),
        ("open.mp4", {"options": {"preset": "medium", "x264-params": "open-gop=1:bframes=3"}}),
        ("b.ts", {"options": {"preset": "medium", "bf": "3"}}),
        ("b.flv", {"options": {"preset": "medium", "bf": "3"}}),
        ("h265.mp4", {"codec": "libx265"}),
        ("vp8.webm", {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "10"}}),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime"}}),
        ("mpeg4.avi", {"codec": "mpeg4"}),
        ("mpeg2.mpg", {"codec": "mpeg2video", "options": {"bf": "2"}}),
    ],
)
@pytest.mark.parametrize("count", [3, 16])
def test_skipping_is_exact(tmp_path: Path, name: str, options: dict[str, Any], count: int) -> None:
    """Decoding with gaps gives, bit for bit, the frames of plain decoding."""
    path = media.write_video(tmp_path / name, moving(100), 25, **options)
    some, all_frames = taken(path, count), everything(path)
    assert len(some) == count
    times = sorted(all_frames)
    expected = [times[(2 * k + 1) * len(times) // (2 * count)] for k in range(count)]
    gaps = [abs(times.index(a) - times.index(b)) for a, b in zip(some, expected, strict=True)]
    assert max(gaps) <= 1  # a rounded time may fall on either side of a frame's border
    for time, pixels in some.items():
        assert np.array_equal(pixels, all_frames[time]), f"frame at {time}"


def test_centre_frames(tmp_path: Path) -> None:
    """Sixteen of 160 frames: number 5, 15, 25 and so on."""
    steps = media.grey_steps(160)
    path = media.write_video(tmp_path / "a.mp4", steps, 25, options={"crf": "1"})
    expected = [int(steps[i][0, 0, 0]) for i in range(5, 160, 10)]
    assert np.abs(np.array(greys(path)) - expected).max() <= 2


@pytest.mark.parametrize("count", [1, 2, 7])
def test_short_clips_give_each_frame_once(tmp_path: Path, count: int) -> None:
    shades = greys(media.write_video(tmp_path / "a.mp4", media.grey_steps(count), 25))
    assert len(shades) == count
    assert shades == sorted(set(shades))


def test_variable_frame_rate(tmp_path: Path) -> None:
    """Frames are chosen by when they are shown: ten in a second are little beside ten long ones."""
    steps = media.grey_steps(20)
    times = [0.1 * i for i in range(10)] + [1 + float(i) for i in range(10)]
    path = media.write_video(
        tmp_path / "a.mkv", steps, 25, times_s=times, options={"crf": "1", "bf": "0"}
    )
    # 10.04 s in five parts: the frames on display at about 1, 3, 5, 7 and 9 s
    expected = [int(steps[i][0, 0, 0]) for i in (10, 12, 14, 16, 18)]
    assert np.abs(np.array(greys(path, 5)) - expected).max() <= 2


def test_the_whole_frame_is_squashed(tmp_path: Path) -> None:
    """Nothing is cropped: left and right edges of a wide video are there."""
    decoded: Any = decode(media.write_video(tmp_path / "a.mp4", [media.halves(256, 64)] * 3, 25))
    assert decoded.frames.shape == (3, 32, 32, 3)
    assert decoded.frames.dtype == np.uint8
    assert np.abs(decoded.frames[0, 16, 1].astype(int) - media.RED).max() < 25
    assert np.abs(decoded.frames[0, 16, 30].astype(int) - media.BLUE).max() < 25


def test_key_frames_only(tmp_path: Path) -> None:
    steps = media.grey_steps(96)
    path = media.write_video(
        tmp_path / "a.mp4", steps, 25, gop=12, options={"crf": "1", "sc_threshold": "0"}
    )
    keys = [int(steps[i][0, 0, 0]) for i in range(0, 96, 12)]
    shades = greys(path, 16, decode="keyframes")
    assert len(shades) == len(keys)
    assert np.abs(np.array(shades) - keys).max() <= 2
    assert len(greys(path, 3, decode="keyframes")) == 3


def test_ocr_pictures(tmp_path: Path) -> None:
    """Some of the frames are given at reading size, none when OCR is off."""
    path = media.write_video(tmp_path / "a.mp4", media.grey_steps(32, 320, 160), 25)
    decoded = decode(path, settings(ocr_frames=3))
    assert [p.shape for p in decoded.pictures] == [(50, 100, 3)] * 3
    means = [p.mean() for p in decoded.pictures]
    assert means == sorted(means)
    off = settings().model_copy(
        update={"ocr": FeatureSettings().ocr.model_copy(update={"enabled": False})}
    )
    assert decode(path, off).pictures == ()


def test_frames_that_look_alike_are_read_once(tmp_path: Path) -> None:
    """OCR gets the first of them; a word that appears in small print makes another of it."""
    page = np.full((360, 640, 3), 235, np.uint8)
    other = page.copy()
    cv2.putText(other, "sale", (40, 300), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (190, 190, 190), 1)
    for second, pictures in ((page, 1), (other, 2)):
        path = media.write_video(tmp_path / "a.mp4", [page] * 20 + [second] * 20, 25)
        decoded: Any = decode(path, settings(size=224))
        assert len(decoded.frames) == 16
        assert len(decoded.pictures) == pictures


@pytest.mark.parametrize(("size", "apart"), [(160, 1), (180, 0), (320, 0)])
@pytest.mark.parametrize("mode", ["keyframes", "auto"])
def test_large_key_frames_stay_blocks(tmp_path: Path, mode: str, size: int, apart: float) -> None:
    """They hardly show where frames are more than halved for the encoder; others are smoothed."""
    scenes: Any = [cv2.resize(media.noise(16, 9, seed), (640, 360)) for seed in range(4)]
    path = media.write_video(
        tmp_path / "a.mp4",
        [scene for scene in scenes for _ in range(10)],
        25,
        gop=10,
        options={"crf": "30", "preset": "veryfast"},
    )
    frames: Any = decode(path, settings(4, size, decode=mode)).frames
    scale = FrameScaler(lambda width, height: (size, size))
    with av.open(str(path)) as film:
        whole = [scale(frame) for frame in film.decode(video=0)][::10]
    difference = np.abs(frames.astype(int) - np.stack(whole))
    assert difference.mean() <= apart
    assert difference.any() == (apart > 0)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("pix_fmt", ["rgb24", "yuv444p", "yuv422p", "yuvj420p", "yuv420p10le"])
def test_colours_of_columns_are_not_mixed(pix_fmt: str, width: int) -> None:
    """Columns that change their colour are averaged as a picture's, from any format of pixels."""
    columns = np.repeat(np.array([[220, 40, 40], [40, 40, 220]], np.uint8), width, axis=0)
    pixels: Any = np.tile(columns, (64, 32 // width, 1))
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix_fmt)
    scaled = FrameScaler(lambda width, height: (32, 32))(frame)
    assert np.abs(scaled.astype(int) - average(pixels, 32, 32)).max() <= 2


def test_sound_and_silence(tmp_path: Path) -> None:
    with_sound = media.write_video(
        tmp_path / "a.mp4", media.grey_steps(75), 25, audio=media.tone(440, 3, 44100)
    )
    decoded: Any = decode(with_sound)
    assert decoded.sound.shape == (3, 96, 64)
    silent = decode(media.write_video(tmp_path / "b.mp4", media.grey_steps(5), 25))
    assert silent.sound is None
    assert silent.failures == {}


def test_gif_as_video(tmp_path: Path) -> None:
    assert len(greys(media.write_animation(tmp_path / "a.gif", media.grey_steps(8)))) == 8


def broken(path: Path, **stream: int) -> Path:
    """A film of which every packet of one stream is overwritten."""
    sound = media.tone(440, 2, 44100) if path.stem != "silent" else None
    media.write_video(path, media.grey_steps(50), 25, audio=sound)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [bytes(p) for p in container.demux(**stream) if p.size]
    for packet in packets:
        at = data.index(packet)
        data[at : at + len(packet)] = b"\xff" * len(packet)
    path.write_bytes(bytes(data))
    return path


def test_broken_sound_leaves_the_frames(tmp_path: Path) -> None:
    decoded: Any = decode(broken(tmp_path / "a.mkv", audio=0))
    assert len(decoded.frames) == 16
    assert decoded.sound is None
    assert decoded.failures["audio"].type == "MediaError"
    assert "sound cannot be decoded" in decoded.failures["audio"].message


def test_broken_frames_leave_the_sound(tmp_path: Path) -> None:
    decoded = decode(broken(tmp_path / "a.mkv", video=0))
    assert decoded.frames is None
    assert decoded.sound is not None
    assert "0 of 16 frames" in decoded.failures["video"].message
    silent = broken(tmp_path / "silent.mkv", video=0)
    with pytest.raises(MediaError, match=r"^broken Matroska video: 0 of 16 frames can be read$"):
        decode(silent)


def test_sound_only(tmp_path: Path) -> None:
    """A container of sound alone, posted as a video, gives its sound and says what lacks."""
    decoded = decode(media.write_aac(tmp_path / "a.mp4", media.tone(440, 2, 44100)))
    assert decoded.frames is None
    assert decoded.sound is not None
    assert decoded.failures["video"].message == "MP4 video has no video stream"


def test_cover_art_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    sound = media.write_mp3(
        tmp_path / "a.mp3", media.tone(440, 1, 44100), cover=media.solid(64, 48)
    )
    with av.open(str(sound)) as source, av.open(str(path), "w") as target:
        streams = {s.index: target.add_stream_from_template(s) for s in source.streams}
        for stream in source.streams.video:
            streams[stream.index].disposition = av.stream.Disposition.attached_pic
        for packet in source.demux():
            if packet.size:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    decoded = decode(path)
    assert decoded.frames is None
    assert decoded.sound is not None


def test_an_mp4_without_its_index(tmp_path: Path) -> None:
    data = media.write_video(tmp_path / "a.mp4", moving(20), 25).read_bytes()
    (tmp_path / "b.mp4").write_bytes(data[: data.index(b"moov") - 4])
    with pytest.raises(MediaError, match=r"^MP4 video cannot be read: Invalid data"):
        decode(tmp_path / "b.mp4")


def test_a_lying_duration(tmp_path: Path) -> None:
    """The header's duration is not believed: frames are spread over those that are there."""
    path = media.write_video(tmp_path / "a.mp4", media.grey_steps(64), 25, options={"crf": "1"})
    honest = greys(path)
    data = bytearray(path.read_bytes())
    for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):
        at = data.index(box) + offset
        data[at : at + 4] = (1 << 30).to_bytes(4, "big")
    path.write_bytes(bytes(data))
    assert greys(path) == honest


def test_no_duration(tmp_path: Path) -> None:
    """A live recording has no duration and no index."""
    path = media.write_video(
        tmp_path / "a.mkv", media.grey_steps(64), 25, container_options={"live": "1"}
    )
    assert len(greys(path)) == 16
    assert greys(path) == sorted(greys(path))


def test_max_duration_s(tmp_path: Path) -> None:
    path = media.write_video(tmp_path / "a.mp4", media.grey_steps(100), 10)
    decoded: Any = decode(path, settings(4), max_duration_s=5)
    assert [round(float(f.mean())) for f in decoded.frames][-1] < 128


def test_max_pixels(tmp_path: Path) -> None:
    path = media.write_video(tmp_path / "a.mp4", [media.solid(320, 240)] * 2, 25)
    with pytest.raises(MediaError, match=r"320×240 pixels are more than decode.max_pixels: 10000"):
        decode(path, max_pixels=10000)


def test_playlists_are_not_followed(tmp_path: Path) -> None:
    """A playlist that begins like a video's text cannot make FFmpeg open what it names."""
    target = media.write_video(tmp_path / "secret.ts", media.grey_steps(25), 25)
    path = tmp_path / "a.mp4"
    path.write_text(f"#EXTM3U\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n")
    with pytest.raises(MediaError, match=r"^is not a video: playlist$"):
        decode(path)
    path.write_text(f"ffconcat version 1.0\nfile {target}\n")
    with pytest.raises(MediaError, match=r"^is not a video: text$"):
        decode(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_damaged_videos_raise_nothing_else(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Overwritten bytes anywhere give frames or a MediaError, and nothing on standard error."""
    codec = "mpeg4" if name == "a.avi" else "libx264"
    path = media.write_video(
        tmp_path / name, moving(30), 25, codec=codec, audio=media.tone(440, 1, 44100)
    )
    data, random = path.read_bytes(), np.random.default_rng(11)
    outcomes = []
    for _ in range(40):
        broken = bytearray(data)
        for at in random.integers(0, len(data), 30):
            broken[at] = random.integers(256)
        path.write_bytes(bytes(broken))
        try:
            decode(path, settings(4))
            outcomes.append("frames")
        except MediaError as error:
            outcomes.append(str(error))
    assert "frames" in outcomes
    assert not any("\n" in outcome for outcome in outcomes)
    assert capfd.readouterr().err == ""
