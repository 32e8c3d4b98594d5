"""Measure the CPU of decoding: 12 kinds of clip, sound and pictures, ours and by other libraries.

Files of moving textures with sound are made once. Each way takes each file in turn, several rounds
long, so that a busy machine slows all of them alike; what counts is the CPU time of the process,
threads too. Ours is `decode_media` with all that the pipeline asks of it. The others do their least
for a picture encoder: up to 16 frames, evenly spread, and shrunk to 224 pixels; or the sound at
16 kHz. decord and torchcodec are left out where they are not installed.

Run: ``python bench/decode.py [--runs N] [--media FOLDER] [--tree FOLDER] [--hwaccel cuda]``;
``--tree`` measures the decoder of another checkout, such as one of an older commit, next to this
one. ``--hwaccel cuda`` adds ours with a GPU that decodes whatever it can, short and small ones too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too
os.environ["OMP_NUM_THREADS"] = "1"

import av
import cv2
import numpy as np
from clips import CLIPS, stereo, write_clip
from results_file import write_results

from common.processes import keep_freed_memory
from workers.sample_posts import texture

FRAMES, SIDE, RATE_HZ = 16, 224, 16_000
WAYS = ("accurate", "auto", "keyframes")
SOUNDS = {"AAC": (".m4a", "aac"), "MP3": (".mp3", "libmp3lame"), "WAV": (".wav", "pcm_s16le")}
PICTURES = {
    "JPEG 1280x960": (".jpg", 1280, 960),
    "JPEG 4000x3000": (".jpg", 4000, 3000),
    "PNG 1280x960": (".png", 1280, 960),
    "WebP 1280x960": (".webp", 1280, 960),
}


def make(folder: Path) -> dict[str, tuple[str, Path]]:
    """Return name -> kind of media and file; those that are there are not made again."""
    from tests.support import media

    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, tuple[str, Path]] = {}
    for k, (name, clip) in enumerate(CLIPS.items()):
        path = folder / f"clip{k}{clip.suffix}"
        files[name] = ("video", path)
        if not path.exists():
            print("making", name, flush=True)
            write_clip(path, clip)
    for name, (suffix, codec) in SOUNDS.items():
        path = folder / f"sound{suffix}"
        files[name] = ("audio", path)
        if not path.exists():
            media.write_aac(path, stereo(), codec=codec)
    for name, (suffix, width, height) in PICTURES.items():
        path = folder / f"picture{width}{suffix}"
        files[name] = ("image", path)
        if not path.exists():
            cv2.imwrite(str(path), texture(1, width, height), [cv2.IMWRITE_JPEG_QUALITY, 88])
    return files


def ours(kind: str, path: Path, hwaccel: str = "none") -> dict[str, Callable[[], int]]:
    """Return our ways to decode a file; each gives the number of its rows."""
    from config.features import FeatureSettings, VideoSettings
    from config.settings import DecodeSettings
    from extractors.media.decode import decode_media

    def way(hwaccel: str = "none", **video: Any) -> Callable[[], int]:
        limits = DecodeSettings.model_validate({"hwaccel": hwaccel} if hwaccel != "none" else {})
        features = FeatureSettings.model_validate(
            {
                "video": {"frames": FRAMES, "image_size": SIDE, **video},
                "image": {"image_size": SIDE},
            }
        )

        def run() -> int:
            decoded: Any = decode_media(kind, path, features, limits)  # type: ignore[arg-type]
            rows = {"video": decoded.frames, "image": decoded.image, "audio": decoded.sound}[kind]
            return len(rows)

        return run

    if kind != "video":
        return {"ours": way()}
    known = str(VideoSettings.model_fields["decode"].annotation)
    ways = {f"ours, {name}": way(decode=name) for name in WAYS if f"'{name}'" in known}
    if hwaccel != "none":
        ways |= {f"ours, {name}, GPU": way(hwaccel, decode=name) for name in ("accurate", "auto")}
    # The same file as a sound: what of the above is its sound's.
    ways["ours, sound alone"] = ours("audio", path)["ours"]
    return ways


def others(kind: str, path: Path) -> dict[str, Callable[[], int]]:
    """Return the ways of other libraries."""
    if kind == "image":
        return {"OpenCV": lambda: len(_small(cv2.imread(str(path)))[None])}
    if kind == "audio":
        return {"PyAV": lambda: _pyav_sound(path)}
    ways = {
        "OpenCV, seeking": lambda: _opencv(path),
        "PyAV, all frames": lambda: _pyav(path),
        "PyAV, sound": lambda: _pyav_sound(path),
    }
    for name, way in (("decord", _decord), ("torchcodec", _torchcodec)):
        if name not in _absent:
            try:
                way(path)
            except (ImportError, OSError, RuntimeError):  # torchcodec looks for FFmpeg at last here
                _absent.add(name)
            else:
                ways[name] = lambda way=way: way(path)  # type: ignore[misc]
    return ways


_absent: set[str] = set()


def _small(pixels: Any) -> Any:
    return cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def _spread(total: int) -> list[int]:
    return [int((k + 0.5) * total / FRAMES) for k in range(FRAMES)]


def _opencv(path: Path) -> int:
    film = cv2.VideoCapture(str(path))
    frames = []
    for at in _spread(int(film.get(cv2.CAP_PROP_FRAME_COUNT))):
        film.set(cv2.CAP_PROP_POS_FRAMES, at)
        good, pixels = film.read()
        if good:
            frames.append(_small(pixels))
    return len(frames)


def _pyav(path: Path) -> int:
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        stream.codec_context.thread_count = 1
        total = stream.frames or round(float(film.duration or 0) / 1e6 * float(stream.average_rate))
        chosen = set(_spread(total))
        decoded = enumerate(film.decode(stream))
        return len([_small(f.to_ndarray(format="rgb24")) for i, f in decoded if i in chosen])


def _pyav_sound(path: Path) -> int:
    with av.open(str(path)) as film:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE_HZ)
        chunks = [
            part.to_ndarray()
            for frame in film.decode(audio=0)
            for part in resampler.resample(frame)
        ]
    return int(np.concatenate(chunks, axis=1).shape[1] // (RATE_HZ * 0.96))


def _decord(path: Path) -> int:
    film = importlib.import_module("decord").VideoReader(str(path), num_threads=1)
    return len([_small(pixels) for pixels in film.get_batch(_spread(len(film))).asnumpy()])


def _torchcodec(path: Path) -> int:
    opened = importlib.import_module("torchcodec.decoders").VideoDecoder
    film = opened(str(path), num_ffmpeg_threads=1, dimension_order="NHWC")
    frames = film.get_frames_at(_spread(film.metadata.num_frames)).data
    return len([_small(pixels.numpy()) for pixels in frames])


class Child:
    """Another process of this script, which runs ways on request; `--tree` names its code."""

    def __init__(self, tree: Path, files: Path) -> None:
        command = [sys.executable, __file__, "--serve", str(files)]
        environment = {**os.environ, "INSIGHTTAG_TREE": str(tree)}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, name: str) -> dict[str, Any]:
        """Return way -> milliseconds of CPU, and rows, of one file."""
        stdin: Any = self._process.stdin
        stdout: Any = self._process.stdout
        stdin.write(name + "\n")
        stdin.flush()
        answer: dict[str, Any] = json.loads(stdout.readline())
        return answer

    def close(self) -> None:
        self._process.communicate("")


def serve(files: dict[str, tuple[str, Path]], ways_of: Callable[..., Any]) -> None:
    """Measure the files that come in by name, each way once."""
    for line in sys.stdin:
        print(json.dumps(measured(ways_of(*files[line.strip()]))), flush=True)


def measured(ways: dict[str, Callable[[], int]]) -> dict[str, list[float]]:
    """Return way -> milliseconds of CPU, rows, and milliseconds of the clock."""
    result = {}
    for way, run in ways.items():
        clock, began = time.monotonic(), time.process_time()
        rows = run()
        cpu_s, wall_s = time.process_time() - began, time.monotonic() - clock
        result[way] = [1000 * cpu_s, rows, 1000 * wall_s]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--media", type=Path, help="where the files are kept between runs")
    parser.add_argument("--tree", type=Path, help="another checkout, measured as `before`")
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--hwaccel", choices=["none", "cuda"], default="none")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    keep_freed_memory()  # as decoders do
    if options.serve:
        sys.path.insert(0, os.environ["INSIGHTTAG_TREE"])
        listed = json.loads(Path(options.serve).read_text(encoding="utf-8"))
        serve({name: (kind, Path(path)) for name, (kind, path) in listed.items()}, ours)
        return
    if options.hwaccel != "none":
        from extractors.media import hwaccel

        if hwaccel.gpu_decoder(os.getpid()) is None:
            raise SystemExit("--hwaccel cuda: no GPU here decodes videos")
        hwaccel.LEAST_PIXELS = hwaccel.LEAST_FRAMES = 0
    with tempfile.TemporaryDirectory() as temporary:
        files = make(options.media or Path(temporary) / "media")
        listing = Path(temporary) / "files.json"
        listing.write_text(
            json.dumps({name: (kind, str(path.resolve())) for name, (kind, path) in files.items()})
        )
        before = Child(options.tree.resolve(), listing) if options.tree else None
        results = []
        for name, (kind, path) in files.items():
            if options.only not in name:
                continue
            ways = {**ours(kind, path, options.hwaccel), **others(kind, path)}
            about = {"file": name, "kind": kind, "kib": round(path.stat().st_size / 1024)}
            results.append({**about, **_compared(name, ways, before, options.runs)})
            print(name, results[-1]["cpu_ms"], results[-1]["rows"], flush=True)
            if options.hwaccel != "none":
                print("by the clock", results[-1]["wall_ms"], flush=True)
        if before is not None:
            before.close()
    if not options.only:
        print(write_results("decode", options.runs, results))


def _compared(
    name: str, ways: dict[str, Callable[[], int]], before: Child | None, runs: int
) -> dict[str, Any]:
    """Return the medians of all ways over some rounds; the round before them only warms up."""
    rounds = []
    for _ in range(runs + 1):
        one: dict[str, Any] = {}
        if before is not None:
            one.update({f"before: {way}": value for way, value in before.ask(name).items()})
        one.update(measured(ways))
        rounds.append(one)

    def medians(at: int) -> dict[str, float]:
        return {k: round(statistics.median(one[k][at] for one in rounds[1:]), 1) for k in rounds[0]}

    return {
        "cpu_ms": medians(0),
        "wall_ms": medians(2),
        "rows": {way: int(values[1]) for way, values in rounds[0].items()},
    }


if __name__ == "__main__":
    main()
