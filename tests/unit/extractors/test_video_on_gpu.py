"""Videos that a GPU decodes give the arrays of the CPU, as do those that it refuses.

Without a GPU, `NextToGpu` has the CPU decode and puts the frames into the GPU's layout; what it
cannot show is NVDEC itself. On a machine with one, the same films go through it too.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import structlog

from config.features import FeatureSettings
from config.settings import DecodeSettings
from extractors.media import hwaccel
from extractors.media.containers import find_stream, open_container
from extractors.media.decode import DecodedMedia, read_frames
from extractors.media.hwaccel import GpuDecoder, gpu_decoder, worth_it
from extractors.media.sniff import FileType, check_type
from extractors.media.video import Refused
from extractors.parts import FrameChoice
from tests.support import media
from tests.support.extractors.video_support import decode, index_of, moving, settings

BOTH = settings(8, 40, ocr_frames=8)  # an even scale, a small and a large picture: all paths
PRESET = {"preset": "medium", "bf": "3"}


class NextToGpu(GpuDecoder):
    """A decoder of the CPU whose frames are laid out as a GPU's."""

    def __init__(self, refuse_at: int = -1, reason: str = "no surfaces are left") -> None:
        self.downloads, self.refuse_at, self.reason = 0, refuse_at, reason

    def open(self, path: Path, file_type: FileType) -> Any:
        return open_container(path, file_type)

    def download(self, frame: Any) -> Any:
        self.downloads += 1
        if self.downloads == self.refuse_at:
            raise Refused(self.reason)
        layout = "p010le" if "10" in frame.format.name else "nv12"
        return super().download(frame.reformat(format=layout))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[GpuDecoder], None]:
    """Place a decoder as this process's GPU, to which even the films of tests are worth it."""
    monkeypatch.setattr(hwaccel, "LEAST_PIXELS", 0)
    monkeypatch.setattr(hwaccel, "LEAST_FRAMES", 0)

    def place(decoder: GpuDecoder) -> None:
        monkeypatch.setattr(hwaccel, "gpu_decoder", lambda pid: decoder)

    return place


def same(one: DecodedMedia, other: DecodedMedia) -> None:
    """Bit for bit: frames, pictures for OCR and sound, and what is said of them."""
    assert [kind for kind, _ in one.parts] == [kind for kind, _ in other.parts]
    for (kind, array), (_, expected) in zip(one.parts, other.parts, strict=True):
        assert np.array_equal(array, expected), kind
    assert (one.times_s, one.turned) == (other.times_s, other.turned)
    assert {k: f.message for k, f in one.failures.items()} == {
        k: f.message for k, f in other.failures.items()
    }


def compared(path: Path, features: FeatureSettings = BOTH) -> bool | None:
    """Decode a file with and without a GPU, hold both equal, and tell whether the GPU did it."""
    on_cpu, on_gpu = decode(path, features), decode(path, features, hwaccel="cuda")
    assert on_cpu.on_gpu is None
    same(on_gpu, on_cpu)
    return on_gpu.on_gpu


FILMS: dict[str, dict[str, Any]] = {
    "b.mp4": {"options": PRESET},
    "open.mkv": {"options": {"preset": "medium", "x264-params": "open-gop=1:bframes=3"}},
    "phone.mp4": {"rotation": 90},
    "full.mp4": {"pix_fmt": "yuvj420p"},
    "b.ts": {"options": PRESET},
    "h265.mp4": {"codec": "libx265"},
    "main10.mkv": {"codec": "libx265", "pix_fmt": "yuv420p10le"},
    "vp8.mkv": {"codec": "libvpx"},
    "odd.mkv": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
}


def write(folder: Path, name: str) -> Path:
    width, height = (161, 121) if name == "odd.mkv" else (160, 120)
    frames, sound = moving(60, width, height), media.tone()
    return media.write_video(folder / name, frames, 25, gop=20, audio=sound, **FILMS[name])


@pytest.mark.parametrize("name", FILMS)
def test_same_arrays_as_on_the_cpu(
    tmp_path: Path, gpu: Callable[[GpuDecoder], None], name: str
) -> None:
    gpu(NextToGpu())
    path = write(tmp_path, name)
    assert compared(path) is True
    assert compared(path, settings(12, 40, decode="auto", min_frames=8)) is True


def test_the_gpu_of_this_machine(tmp_path: Path, gpu: Callable[[GpuDecoder], None]) -> None:
    real = gpu_decoder(os.getpid())
    if real is None:
        pytest.skip("no CUDA device")
    gpu(real)
    by_gpu = {name: compared(write(tmp_path, name)) for name in FILMS}
    assert by_gpu == dict.fromkeys(FILMS, True)


def test_sizes_that_change_in_mid_stream(tmp_path: Path, gpu: Callable[[GpuDecoder], None]) -> None:
    """Two recordings joined, the second in the size of another camera."""
    gpu(NextToGpu())
    parts = [
        media.write_video(tmp_path / f"{width}.ts", moving(50, width, height), 25).read_bytes()
        for width, height in ((160, 120), (320, 176))
    ]
    path = tmp_path / "a.ts"
    path.write_bytes(b"".join(parts))
    assert compared(path) is True


def test_training_decodes_by_the_same_code(
    tmp_path: Path, gpu: Callable[[GpuDecoder], None]
) -> None:
    path = media.write_video(tmp_path / "a.mp4", moving(50), 25)
    decoder = NextToGpu()
    gpu(decoder)
    on_cpu, on_gpu = (
        read_frames(path, choice=FrameChoice(4), side=32, limits=each)
        for each in (DecodeSettings(), DecodeSettings(hwaccel="cuda"))
    )
    assert np.array_equal(on_cpu, on_gpu)
    assert decoder.downloads == 4


@pytest.mark.parametrize("refuse_at", [1, 5])
def test_what_the_gpu_refuses_the_cpu_decodes(
    tmp_path: Path, gpu: Callable[[GpuDecoder], None], refuse_at: int
) -> None:
    """From the frame on that it refused; one line in the log says so."""
    path = media.write_video(tmp_path / "a.mp4", moving(60), 25, options=PRESET)
    gpu(NextToGpu(refuse_at))
    with structlog.testing.capture_logs() as logs:
        assert compared(path) is False
    assert logs == [
        {
            "event": "decode.gpu_refused",
            "log_level": "warning",
            "file": str(path),
            "codec": "h264",
            "profile": "High",
            "reason": "no surfaces are left",
            "use": "CPU",
        }
    ]


@pytest.mark.parametrize(("name", "damage"), [("a.mp4", "hole"), ("a.ts", "hole"), ("a.ts", "cut")])
def test_damaged_files_are_the_cpus(
    tmp_path: Path, gpu: Callable[[GpuDecoder], None], name: str, damage: str
) -> None:
    """It replaces what is broken; what is cut off is missing on any decoder."""
    path = media.write_video(tmp_path / name, moving(60), 25, options=PRESET)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[len(data) * 19 // 20 :]
    else:
        data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    path.write_bytes(data)
    gpu(NextToGpu())
    assert compared(path) is (damage == "cut")


def test_layouts_that_nobody_knows_are_refused(gpu: Callable[[GpuDecoder], None]) -> None:
    """As 4:4:4, and as what FFmpeg itself decoded in place of the GPU."""
    frame = av.VideoFrame.from_ndarray(media.noise(32, 16), format="rgb24")
    for layout in ("yuv444p", "yuv420p"):
        with pytest.raises(Refused, match=f"^frames are {layout}$"):
            GpuDecoder.download(NextToGpu(), frame.reformat(format=layout))


def test_without_a_gpu_the_log_says_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg itself is asked for the device, in the first file of a process and in no other."""
    if gpu_decoder(os.getpid()) is not None:
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(hwaccel, "LEAST_PIXELS", 0)
    gpu_decoder.cache_clear()
    paths = [media.write_video(tmp_path / f"{i}.mp4", moving(120), 25, gop=250) for i in range(2)]
    with structlog.testing.capture_logs() as logs:
        assert [compared(path) for path in paths] == [False, False]
    assert [(each["event"], each["use"]) for each in logs] == [("decode.no_hwaccel", "CPU")]
    assert "CUDA" in logs[0]["reason"], "FFmpeg's own words"


CASES: dict[str, tuple[dict[str, Any], str, int, bool]] = {
    "worth it": ({}, "a.mp4", 120, True),
    "few frames": ({}, "a.mp4", 99, False),
    "key frames alone": ({"gop": 1}, "a.mp4", 120, False),
    "MPEG-4": ({"codec": "mpeg4"}, "a.mp4", 120, False),
    "AV1": ({"codec": "libsvtav1", "options": {"preset": "12"}}, "a.mp4", 120, False),
}


@pytest.mark.parametrize("name", CASES)
def test_which_videos_are_worth_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Those of a codec that it has, with many frames to decode, of large pictures."""
    options, file, count, expected = CASES[name]
    options = {"gop": 250, **options}
    path = media.write_video(tmp_path / file, moving(count), 25, **options)
    index = index_of(path)
    with open_container(path, check_type(path, "video")) as container:
        stream = find_stream(container, "video")
        assert worth_it(stream, index, [*range(count)[:: count - 1]]) is False, "it is small"
        monkeypatch.setattr(hwaccel, "LEAST_PIXELS", 64 * 48)
        chosen = index.choose(16) if name == "key frames alone" else [0, count - 1]
        assert worth_it(stream, index, chosen) is expected
