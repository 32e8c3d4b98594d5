"""Videos that are cut, that lie or that hold too much: what can be had of them, or one error."""

from pathlib import Path

import av
import numpy as np
import pytest

from common.errors import MediaError
from tests.support import media
from tests.support.extractors.video_support import decode, greys, moving, settings


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
    """A sound track that cannot be decoded is noted; the frames are there."""
    decoded = decode(broken(tmp_path / "a.mkv", audio=0))
    assert decoded.frames is not None
    assert len(decoded.frames) == 16
    assert decoded.sound is None
    assert decoded.failures["audio"].type == "MediaError"
    assert "sound cannot be decoded" in decoded.failures["audio"].message


def test_broken_frames_leave_the_sound(tmp_path: Path) -> None:
    """Frames that cannot be decoded are noted; the sound is there. Without sound it is an error."""
    decoded = decode(broken(tmp_path / "a.mkv", video=0))
    assert decoded.frames is None
    assert decoded.sound is not None
    assert "0 of 16 frames" in decoded.failures["video"].message
    silent = broken(tmp_path / "silent.mkv", video=0)
    with pytest.raises(MediaError, match=r"^broken Matroska video: 0 of 16 frames can be read$"):
        decode(silent)


def test_sound_only(tmp_path: Path) -> None:
    """A container of sound alone, posted as a video, gives its sound and says what lacks."""
    path = media.write_aac(tmp_path / "a.mp4", media.tone(440, 2, 44100))
    decoded = decode(path)
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
    path = media.write_video(tmp_path / "a.mp4", media.grey_steps(100), 10)
    decoded = decode(path, settings(4), max_duration_s=5)
    assert decoded.frames is not None
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
