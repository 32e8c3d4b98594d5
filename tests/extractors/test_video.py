"""Video: the frames that are taken, and that skipping never changes them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from config.errors import MediaError
from config.settings import DecodeSettings, FeatureSettings
from extractors.containers import find_stream, open_container, packets
from extractors.decode import DecodedMedia, decode_media
from extractors.sniff import check_type
from extractors.video import PacketIndex, choose_frames, decode_frames, plan_runs
from tests import media


def settings(frames: int = 16, size: int = 32, ocr_frames: int = 2, **more: Any) -> FeatureSettings:
    return FeatureSettings.model_validate(
        {
            "video": {"frames": frames, "image_size": size, **more},
            "ocr": {"frames": ocr_frames, "max_side": 100},
        }
    )


def decode(path: Path, features: FeatureSettings | None = None, **limits: Any) -> DecodedMedia:
    return decode_media("video", path, features or settings(), DecodeSettings(**limits))


def greys(path: Path, frames: int = 16, **more: Any) -> list[int]:
    """Mean grey of each frame that is taken."""
    decoded = decode(path, settings(frames, **more))
    assert decoded.frames is not None
    return [round(float(frame.mean())) for frame in decoded.frames]


def index_of(path: Path) -> PacketIndex:
    with open_container(path, check_type(path, "video")) as container:
        stream = find_stream(container, "video")
        index = PacketIndex(stream, 3600)
        for packet in packets(container, stream):
            index.add(packet)
    return index


def taken(path: Path, count: int) -> dict[int, np.ndarray]:
    """Time ─► full-size pixels of the frames that are taken."""
    index = index_of(path)
    with open_container(path, check_type(path, "video")) as container:
        stream = find_stream(container, "video")
        chosen = choose_frames(index, count, "accurate")
        frames = decode_frames(container, stream, index, chosen)
        return {frame.pts: frame.to_ndarray(format="rgb24") for frame in frames}


def everything(path: Path) -> dict[int, np.ndarray]:
    """Time ─► pixels of every frame, decoded plainly from the beginning."""
    with av.open(str(path)) as container:
        return {f.pts: f.to_ndarray(format="rgb24") for f in container.decode(video=0)}


def moving(count: int, width: int = 64, height: int = 48) -> list[np.ndarray]:
    """Frames that depend on each other: noise that shifts, so that a wrong reference shows."""
    base = media.noise(width * 2, height * 2, 1)
    return [
        np.ascontiguousarray(np.roll(base, (i, 2 * i), (0, 1))[:height, :width])
        for i in range(count)
    ]


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
    """What is decoded with gaps equals, bit for bit, what plain decoding of everything gives."""
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
    """A clip of fewer frames than segments gives fewer features, not repeated ones."""
    path = media.write_video(tmp_path / "a.mp4", media.grey_steps(count), 25)
    found = greys(path)
    assert len(found) == count
    assert found == sorted(set(found))


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


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotated_phone_video(tmp_path: Path, rotation: int) -> None:
    """The display matrix is applied: frames and the pictures for OCR stand upright."""
    upright = media.quadrants(64, 96 if rotation % 180 else 48)
    upright = upright if rotation % 180 else media.quadrants(96, 64)
    stored = np.ascontiguousarray(np.rot90(upright, rotation // 90))  # counter-clockwise
    path = media.write_video(tmp_path / "a.mp4", [stored] * 5, 25, rotation=rotation)
    decoded = decode(path)
    assert decoded.frames is not None
    assert decoded.pictures[0].shape == upright.shape
    for pixels in (decoded.frames[0], decoded.pictures[0]):
        height, width = pixels.shape[:2]
        for row, column in ((0.2, 0.2), (0.2, 0.8), (0.8, 0.2), (0.8, 0.8)):
            got = pixels[int(row * height), int(column * width)].astype(int)
            want = upright[int(row * upright.shape[0]), int(column * upright.shape[1])].astype(int)
            assert np.abs(got - want).max() < 25


def test_the_whole_frame_is_squashed(tmp_path: Path) -> None:
    """Nothing is cropped: left and right edges of a wide video are there."""
    path = media.write_video(tmp_path / "a.mp4", [media.halves(256, 64)] * 3, 25)
    decoded = decode(path)
    assert decoded.frames is not None
    assert decoded.frames.shape == (3, 32, 32, 3)
    assert decoded.frames.dtype == np.uint8
    assert np.abs(decoded.frames[0, 16, 1].astype(int) - media.RED).max() < 25
    assert np.abs(decoded.frames[0, 16, 30].astype(int) - media.BLUE).max() < 25


def test_key_frames_only(tmp_path: Path) -> None:
    """`decode: keyframes` takes the key frames nearest to the centres, each once."""
    steps = media.grey_steps(96)
    path = media.write_video(
        tmp_path / "a.mp4", steps, 25, gop=12, options={"crf": "1", "sc_threshold": "0"}
    )
    keys = [int(steps[i][0, 0, 0]) for i in range(0, 96, 12)]
    found = greys(path, 16, decode="keyframes")
    assert len(found) == len(keys)
    assert np.abs(np.array(found) - keys).max() <= 2
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


def test_sound_and_silence(tmp_path: Path) -> None:
    """A video's sound comes with it; a video without sound has no patches and no failure."""
    with_sound = media.write_video(
        tmp_path / "a.mp4", media.grey_steps(75), 25, audio=media.tone(440, 3, 44100)
    )
    decoded = decode(with_sound)
    assert decoded.patches is not None
    assert decoded.patches.shape == (3, 96, 64)
    silent = decode(media.write_video(tmp_path / "b.mp4", media.grey_steps(5), 25))
    assert silent.patches is None
    assert silent.failures == {}


def test_broken_sound_leaves_the_frames(tmp_path: Path) -> None:
    """A sound track that cannot be decoded is noted; the frames are there."""
    path = media.write_video(
        tmp_path / "a.mkv", media.grey_steps(50), 25, audio=media.tone(440, 2, 44100)
    )
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        sounds = [bytes(p) for p in container.demux(audio=0) if p.size]
    for sound in sounds:
        at = data.index(sound)
        data[at : at + len(sound)] = b"\xff" * len(sound)
    path.write_bytes(bytes(data))
    decoded = decode(path)
    assert decoded.frames is not None
    assert len(decoded.frames) == 16
    assert decoded.patches is None
    assert decoded.failures["audio"].type == "MediaError"
    assert "sound cannot be decoded" in decoded.failures["audio"].message


def test_broken_frames_leave_the_sound(tmp_path: Path) -> None:
    """Frames that cannot be decoded are noted; the sound is there. Without sound it is an error."""
    path = media.write_video(
        tmp_path / "a.mkv", media.grey_steps(50), 25, audio=media.tone(440, 2, 44100)
    )
    silent = media.write_video(tmp_path / "b.mkv", media.grey_steps(50), 25)
    for file in (path, silent):
        data = bytearray(file.read_bytes())
        with av.open(str(file)) as container:
            images = [bytes(p) for p in container.demux(video=0) if p.size]
        for image in images:
            at = data.index(image)
            data[at : at + len(image)] = b"\xff" * len(image)
        file.write_bytes(bytes(data))
    decoded = decode(path)
    assert decoded.frames is None
    assert decoded.patches is not None
    assert "0 of 16 frames" in decoded.failures["video"].message
    with pytest.raises(MediaError, match=r"^broken Matroska video: 0 of 16 frames are there$"):
        decode(silent)


def test_sound_only(tmp_path: Path) -> None:
    """A container of sound alone, posted as a video, gives its sound and says what lacks."""
    path = media.write_aac(tmp_path / "a.mp4", media.tone(440, 2, 44100))
    decoded = decode(path)
    assert decoded.frames is None
    assert decoded.patches is not None
    assert decoded.failures["video"].message == "MP4 video has no video stream"


def test_cover_art_is_no_video(tmp_path: Path) -> None:
    """An attached picture does not make a sound file a video."""
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
    assert decoded.patches is not None


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("faststart", [True, False])
def test_truncated_mp4(tmp_path: Path, keep: float, faststart: bool) -> None:
    """An MP4 without its end is failed, whether its index is in front or was lost with the end."""
    path = media.write_video(
        tmp_path / "a.mp4",
        moving(50),
        25,
        container_options={"movflags": "faststart"} if faststart else None,
    )
    cut = media.truncate(path, tmp_path / "cut.mp4", keep)
    with pytest.raises(MediaError, match=r"truncated|cannot be read") as caught:
        decode(cut)
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_mp4_without_its_index(tmp_path: Path) -> None:
    """The `moov` box missing altogether: one line that names the type."""
    data = media.write_video(tmp_path / "a.mp4", moving(20), 25).read_bytes()
    (tmp_path / "b.mp4").write_bytes(data[: data.index(b"moov") - 4])
    with pytest.raises(MediaError, match=r"^MP4 video cannot be read: Invalid data"):
        decode(tmp_path / "b.mp4")


def test_a_lying_duration(tmp_path: Path) -> None:
    """The header's duration is not believed: frames are spread over those that are there."""
    steps = media.grey_steps(64)
    path = media.write_video(tmp_path / "a.mp4", steps, 25, options={"crf": "1"})
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
    """Of a longer video only the beginning is looked at."""
    path = media.write_video(tmp_path / "a.mp4", media.grey_steps(100), 10)
    decoded = decode(path, settings(4), max_duration_s=5)
    assert decoded.frames is not None
    assert [round(float(f.mean())) for f in decoded.frames][-1] < 128


def test_max_pixels(tmp_path: Path) -> None:
    """A video of too many pixels is refused before a frame of it is decoded."""
    path = media.write_video(tmp_path / "a.mp4", [media.solid(320, 240)] * 2, 25)
    with pytest.raises(MediaError, match=r"320×240 pixels are more than decode.max_pixels: 10000"):
        decode(path, max_pixels=10000)


def test_ten_bits(tmp_path: Path) -> None:
    """Frames of ten bits a channel come out as eight."""
    path = media.write_video(
        tmp_path / "a.mp4", [media.solid(64, 48)] * 3, 25, pix_fmt="yuv420p10le"
    )
    decoded = decode(path)
    assert decoded.frames is not None
    assert np.abs(decoded.frames[0, 16, 16].astype(int) - media.RED).max() < 12


def test_gif_as_video(tmp_path: Path) -> None:
    """An animated GIF may be posted as a video."""
    path = media.write_gif(tmp_path / "a.gif", media.grey_steps(8))
    assert len(greys(path)) == 8


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


# Choosing, without files -----------------------------------------------------------------------


def index(times: list[int | None], keys: set[int], duration: int = 40) -> PacketIndex:
    stream = SimpleNamespace(time_base=Fraction(1, 1000), average_rate=25, guessed_rate=25)
    made = PacketIndex(stream, 3600)
    for i, time in enumerate(times):
        made.add(SimpleNamespace(pts=time, dts=None, duration=duration, is_keyframe=i in keys))
    return made


def test_runs() -> None:
    """Groups of pictures without a chosen frame are passed over; touching runs are joined."""
    made = index([40 * i for i in range(100)], {0, 20, 40, 60, 80})
    runs = [(run.first, run.last, len(run.times)) for run in plan_runs(made, [5, 45, 50, 95])]
    assert runs == [(0, 5, 1), (40, 50, 2), (80, 95, 1)]
    assert [(r.first, r.last) for r in plan_runs(made, [39, 41])] == [(20, 41)]


def test_open_groups_of_pictures() -> None:
    """A frame behind a key frame in the file and before it in time needs the key frame before."""
    made = index([0, 40, 200, 120, 160, 240], {0, 2})
    assert made.key_before(3) == 0
    assert made.key_before(5) == 2


def test_without_any_time_stamps() -> None:
    """Packets without times are counted; with all times alike, frames are chosen by number."""
    assert index([None] * 10, {0}).choose(2) == [2, 7]
    assert index([0] * 10, {0}, duration=0).choose(2) in ([2, 7], [9])


def test_without_key_frames() -> None:
    """A stream that marks no key frame is decoded from its beginning."""
    made = index([40 * i for i in range(20)], set())
    assert [(r.first, r.last) for r in plan_runs(made, [5, 15])] == [(0, 15)]
    assert made.nearest_keys([5, 15]) == [5, 15]
