"""Videos of every container and codec give the frames at the right times, the right way round.

Each film holds a grey patch that gets lighter with time, and a colour in each corner: what a frame
shows is known, whatever decodes it. PyAV, decoding plainly from the beginning, is the second judge.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from common.errors import MediaError
from extractors.media.decode import DecodedMedia
from tests.support import media
from tests.support.extractors.video_support import decode, settings

RATE, SECONDS, COUNT = 25, 4, 8
FRAMES = RATE * SECONDS
EXPECTED = [(k + 0.5) * SECONDS / COUNT for k in range(COUNT)]
CORNERS = (media.RED, media.GREEN, media.BLUE, media.WHITE)


def film(first: int = 0, last: int = FRAMES) -> list[np.ndarray]:
    frames = []
    for i in range(first, last):
        pixels = media.quadrants(176, 144)
        pixels[48:96, 64:112] = 20 + 2 * i
        frames.append(pixels)
    return frames


def shown_s(frame: np.ndarray) -> float:
    """The time at which a frame was recorded, by its grey patch."""
    return (float(frame[14:18, 14:18].mean()) - 20) / 2 / RATE


def corners(frame: np.ndarray) -> list[Any]:
    return [frame[y, x].astype(int) for y, x in ((3, 3), (3, 28), (28, 3), (28, 28))]


def check(decoded: DecodedMedia, expected: list[float] = EXPECTED, late: float = 0.13) -> None:
    """Right frames, right way round: greys are quantised, so that times are known to two frames."""
    assert decoded.frames is not None
    times = [shown_s(frame) for frame in decoded.frames]
    assert len(times) == len(expected)
    assert np.abs(np.array(times) - expected).max() < late, times
    for frame in decoded.frames:
        for got, colour in zip(corners(frame), CORNERS, strict=True):
            assert np.abs(got - colour).max() < 40


def write(path: Path, frames: list[np.ndarray] | None = None, **options: Any) -> Path:
    rich = {} if options.get("codec", "libx264").startswith("lib") else {"b": "4000000"}
    options["options"] = {**rich, **options.get("options", {})}
    return media.write_video(path, film() if frames is None else frames, RATE, **options)


X264: dict[str, Any] = {"options": {"preset": "medium", "bf": "3"}}
FILMS: dict[str, dict[str, Any]] = {
    "h264.mp4": X264,
    "h264.mov": X264,
    "h264.mkv": X264,
    "h264.flv": X264,
    "h264.ts": X264,
    "h264.avi": {"options": {"bf": "0"}},
    "h264.3gp": X264,
    "fragments.mp4": {**X264, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "camera.m2ts": {**X264, "container_options": {"mpegts_m2ts_mode": "1"}},
    "refresh.mp4": {"options": {"preset": "medium", "x264-params": "intra-refresh=1:keyint=12"}},
    "refresh.ts": {"options": {"preset": "medium", "x264-params": "intra-refresh=1:keyint=12"}},
    "open.mkv": {"options": {"preset": "medium", "x264-params": "open-gop=1:bframes=3"}},
    "h265.mp4": {"codec": "libx265"},
    "h265.mkv": {"codec": "libx265"},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime"}},
    "vp9.ivf": {"codec": "libvpx-vp9", "options": {"deadline": "realtime"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "lp=1"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"qscale": "3"}},
    "mpeg4-b.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "divx3.avi": {"codec": "msmpeg4"},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "mpeg1.mpg": {"codec": "mpeg1video"},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "mpeg2.mxf": {"codec": "mpeg2video"},
    "wmv.wmv": {"codec": "wmv2"},
    "sorenson.flv": {"codec": "flv"},
    "motion.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
}


@pytest.mark.parametrize("name", FILMS)
def test_containers_and_codecs(tmp_path: Path, name: str) -> None:
    """The frames at the right times, and the same pixels as PyAV's of the same times."""
    path = write(tmp_path / name, **FILMS[name])
    decoded: Any = decode(path, settings(COUNT))
    check(decoded)
    assert decoded.failures == {}
    with av.open(str(path)) as container:
        plain = [
            f.reformat(32, 32, "gbrp", interpolation="AREA").to_ndarray()
            for f in container.decode(video=0)
        ]
    for frame in decoded.frames:
        assert min(int(np.abs(frame.astype(int) - other).max()) for other in plain) <= 2


@pytest.mark.parametrize("name", FILMS)
def test_cheap_frames(tmp_path: Path, name: str) -> None:
    """One in each half second at least, and each shows the time that it claims."""
    path = write(tmp_path / name, **FILMS[name])
    decoded = decode(path, settings(2 * COUNT, decode="auto", min_frames=COUNT))
    assert COUNT <= len(decoded.times_s) <= 2 * COUNT
    assert {int(time_s * COUNT / SECONDS) for time_s in decoded.times_s} == set(range(COUNT))
    check(decoded, list(decoded.times_s))


def test_an_mp4_whose_index_is_far_off(tmp_path: Path) -> None:
    """Padding stands in place of its type, and 200 KB between its frames and their index."""
    path = write(tmp_path / "a.mp4")
    head, index = path.read_bytes().replace(b"ftyp", b"free", 1).split(b"moov")
    padding = (200_008).to_bytes(4, "big") + b"free" + bytes(200_000)
    path.write_bytes(head[:-4] + padding + head[-4:] + b"moov" + index)
    check(decode(path, settings(COUNT)))


def without_index(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"idx1", b"JUNK"))


def packed(path: Path) -> None:
    """Pack a P frame with the B frame behind it, and an empty frame in place of the latter."""
    with av.open(str(path)) as container:
        template = container.streams.video[0]
        singles = [bytes(p) for p in container.demux(video=0) if p.size]
        target = path.with_name("packed.avi")
        with av.open(str(target), "w") as output:
            stream = output.add_stream_from_template(template)
            kinds = [s[s.index(b"\0\0\1\xb6") + 4] >> 6 for s in singles]  # 0 I, 1 P, 2 B
            chunks: list[bytes] = []
            i = 0
            while i < len(singles):
                group = singles[i]
                behind = i + 1
                if kinds[i] == 1 and behind < len(singles) and kinds[behind] == 2:
                    group += singles[behind]
                    behind += 1
                chunks.append(group)
                packed_two = behind == i + 2
                while behind < len(singles) and kinds[behind] == 2:
                    chunks.append(singles[behind])
                    behind += 1
                if packed_two:
                    chunks.append(b"\0\0\1\xb6\x51\x9f")
                i = behind
            for number, chunk in enumerate(chunks):
                packet = av.Packet(chunk)
                packet.stream, packet.time_base = stream, template.time_base
                packet.pts = packet.dts = number
                packet.is_keyframe = True  # the claim of many such files
                output.mux(packet)
    target.replace(path)


@pytest.mark.parametrize(
    ("codec", "options", "damage"),
    [
        ("msmpeg4", {}, without_index),
        ("mpeg4", {}, without_index),
        ("libx264", {"bf": "0"}, without_index),
        ("mjpeg", {}, without_index),
        ("mpeg4", {"bf": "2"}, packed),
    ],
)
def test_false_key_frames(
    tmp_path: Path, codec: str, options: dict[str, str], damage: Callable[[Path], None]
) -> None:
    """Packets that claim to be key frames and are none give no grey frames."""
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write(tmp_path / "a.avi", codec=codec, options=options, gop=30, pix_fmt=pix_fmt)
    damage(path)
    check(decode(path, settings(COUNT)), late=0.17 if damage is packed else 0.13)
    cheap = decode(path, settings(COUNT, decode="auto"))
    check(cheap, list(cheap.times_s), late=0.17 if damage is packed else 0.13)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
@pytest.mark.parametrize(
    ("matrix", "order", "turned"),
    [
        ((1, 0, 0, 1), (0, 1, 2, 3), ""),
        ((-1, 0, 0, 1), (1, 0, 3, 2), "left and right swapped"),
        ((-1, 0, 0, -1), (3, 2, 1, 0), "left and right swapped, top and bottom swapped"),
        ((1, 0, 0, -1), (2, 3, 0, 1), "top and bottom swapped"),
        ((0, 1, 1, 0), (0, 2, 1, 3), "transposed"),
        ((0, 1, -1, 0), (2, 0, 3, 1), "transposed, left and right swapped"),
        (
            (0, -1, -1, 0),
            (3, 1, 2, 0),
            "transposed, left and right swapped, top and bottom swapped",
        ),
        ((0, -1, 1, 0), (1, 3, 0, 2), "transposed, top and bottom swapped"),
    ],
)
def test_display_matrices(
    tmp_path: Path,
    name: str,
    matrix: tuple[int, int, int, int],
    order: tuple[int, int, int, int],
    turned: str,
) -> None:
    """Turned and mirrored films, as the matrix maps points: (x, y) to (a x + c y, b x + d y)."""
    path = write(tmp_path / name, film(0, 3))
    a, b, c, d = matrix
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    struct.pack_into(">9i", data, at, *(v << 16 for v in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    path.write_bytes(bytes(data))
    decoded: Any = decode(path, settings(3))
    assert decoded.turned == turned
    assert decoded.pictures[0].shape[:2] == ((100, 82) if b else (82, 100))
    for got, i in zip(corners(decoded.frames[0]), order, strict=True):
        assert np.abs(got - CORNERS[i]).max() < 40


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mp4", "libx264", "yuv422p"),
        ("a.mp4", "libx264", "yuv444p"),
        ("a.mp4", "libx264", "yuv420p10le"),
        ("a.mkv", "libx264", "yuv444p10le"),
        ("a.mp4", "libx265", "yuv420p12le"),
        ("a.mkv", "ffv1", "gray16le"),
        ("a.mkv", "ffv1", "yuv420p16le"),
        ("a.mov", "prores_ks", "yuv444p10le"),
    ],
)
def test_depths(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    decoded = decode(write(tmp_path / name, film(0, 3), codec=codec, pix_fmt=pix_fmt), settings(3))
    assert decoded.frames is not None
    for got, colour in zip(corners(decoded.frames[0]), CORNERS, strict=True):
        grey = int(np.dot(colour, (0.299, 0.587, 0.114)))
        assert np.abs(got - ([grey] * 3 if "gray" in pix_fmt else colour)).max() < 40


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.webm", "libvpx", "yuva420p"),
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mov", "qtrle", "argb"),
        ("a.mov", "png", "rgba"),
        ("a.mkv", "ffv1", "bgra"),
    ],
)
def test_transparent_films_on_white(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    pixels = np.zeros((96, 96, 4), np.uint8)
    pixels[24:72, 24:72] = (*media.BLUE, 255)
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        options = {"auto-alt-ref": "0"} if codec == "libvpx" else {}
        stream: Any = container.add_stream(codec, rate=RATE, options=options)
        stream.width = stream.height = 96
        stream.pix_fmt = pix_fmt
        for i in range(5):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format=pix_fmt)
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    decoded: Any = decode(path, settings(3))
    assert decoded.frames[1][3, 3].min() > 245
    assert np.abs(decoded.frames[1][16, 16].astype(int) - media.BLUE).max() < 40


def test_edit_lists(tmp_path: Path) -> None:
    """Of a film that was trimmed without encoding it again, only what is shown counts."""
    path = write(tmp_path / "a.mp4", gop=50, **X264)
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 4
    assert struct.unpack_from(">I", data, at + 4) == (1,)
    (media_time,) = struct.unpack_from(">i", data, at + 12)
    scale = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0]
    struct.pack_into(">Ii", data, at + 8, 1000, media_time + 3 * scale)  # a second from 3 s on
    path.write_bytes(bytes(data))
    decoded = decode(path, settings(COUNT))
    check(decoded, [3 + (k + 0.5) / COUNT for k in range(COUNT)])
    shown = [(k + 0.5) / COUNT for k in range(COUNT)]
    assert np.abs(np.array(decoded.times_s) - shown).max() < 0.05  # from what is shown first


@pytest.mark.parametrize("name", ["a.ts", "a.mpg"])
def test_clocks_that_restart(tmp_path: Path, name: str) -> None:
    """Two recordings joined are one film of both."""
    codec = "mpeg2video" if name == "a.mpg" else "libx264"
    halves = [
        write(tmp_path / f"{i}{name}", film(i * 50, i * 50 + 50), codec=codec).read_bytes()
        for i in range(2)
    ]
    path = tmp_path / name
    path.write_bytes(b"".join(halves))
    check(decode(path, settings(COUNT)))


def test_a_clock_that_jumps(tmp_path: Path) -> None:
    """A source that was changed in mid-stream leaves no hole of hours."""
    times = [i / RATE + (7200 if i >= 50 else 0) for i in range(FRAMES)]
    path = write(tmp_path / "a.ts", times_s=times, options={"bf": "0"})
    check(decode(path, settings(COUNT), max_duration_s=10**6))


def joined_late(path: Path) -> tuple[Any, list[float]]:
    """The frames of a film without its first third, up to its end, and when they are shown."""
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 3 + 77 :])
    frames: Any = decode(path, settings(COUNT)).frames
    times = [shown_s(frame) for frame in frames]
    assert len(times) == COUNT
    assert times[-1] > 3.5
    return frames, times


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.ts", "libx264"),
        ("a.ts", "libx265"),
        ("a.ts", "mpeg2video"),
        ("a.m2ts", "libx264"),
        ("a.mpg", "mpeg2video"),
    ],
)
def test_recordings_that_begin_anywhere(tmp_path: Path, name: str, codec: str) -> None:
    """A broadcast recorded from the middle of a packet and of a group of pictures on."""
    options = {"mpegts_m2ts_mode": "1"} if name == "a.m2ts" else None
    path = write(tmp_path / name, codec=codec, gop=25, container_options=options)
    frames, times = joined_late(path)
    assert 0.8 < times[0] < 2.8
    assert times == sorted(times)
    for frame in frames:
        for got, colour in zip(corners(frame), CORNERS, strict=True):
            assert np.abs(got - colour).max() < 40


@pytest.mark.parametrize("name", ["refresh.ts", "refresh.m2ts"])
def test_refreshed_recordings_begin_anywhere(tmp_path: Path, name: str) -> None:
    """A live stream that never sends a key frame is right once it has been refreshed."""
    options = {"mpegts_m2ts_mode": "1"} if name == "refresh.m2ts" else None
    path = write(tmp_path / name, **FILMS["refresh.ts"], container_options=options)
    with av.open(str(path)) as container:
        plain = [
            f.reformat(32, 32, "gbrp", interpolation="AREA").to_ndarray()
            for f in container.decode(video=0)
        ]
    frames, times = joined_late(path)
    assert 1 < times[0] < 3
    assert np.ptp(np.diff(times)) < 0.2  # spread evenly over what can be seen
    for frame in frames:
        assert min(int(np.abs(frame.astype(int) - other).max()) for other in plain) <= 2


@pytest.mark.parametrize("front", [b"\r\n", bytes(700), bytes(65_534)])
@pytest.mark.parametrize("name", ["h264.mp4", "h264.mov", "h264.mkv", "h264.avi", "mpeg2.mpg"])
def test_padding_before_a_film(tmp_path: Path, name: str, front: bytes) -> None:
    """Padding is not taken together with zeros that the file itself begins with."""
    path = write(tmp_path / name, **FILMS[name])
    path.write_bytes(front + path.read_bytes())
    check(decode(path, settings(COUNT)))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_cut_films(tmp_path: Path, name: str) -> None:
    """One policy: of 95% the frames are used and the loss is said, 80% are broken."""
    noisy = [np.maximum(f, media.noise(176, 144, i) // 4) for i, f in enumerate(film())]
    options = {"movflags": "faststart"} if name == "a.mp4" else None
    codec = "mpeg4" if name == "a.avi" else "libx264"
    path = write(tmp_path / name, noisy, codec=codec, container_options=options)
    decoded: Any = decode(media.truncate(path, tmp_path / "95", 0.95), settings(COUNT))
    assert len(decoded.frames) == COUNT
    assert decoded.failures["video"].message.startswith("truncated ")
    assert decoded.failures["video"].message.endswith("which are used")
    with pytest.raises(MediaError, match=r"^truncated "):
        decode(media.truncate(path, tmp_path / "80", 0.8), settings(COUNT))
