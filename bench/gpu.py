"""The whole on a machine with a GPU, in under 8 minutes; its floors are the goals for one H100.

``key 2 s, auto``      realistic posts through the daemon (embedded services, ViT-L/16, VGGish, a
                       text network of MiniLM's shape, OCR; random weights, but for OCR), clips with
                       a key frame every 2 s, `features.video.decode: auto`
``key 5 s, accurate``  the same with a key frame every 5 s and `accurate`
``ViT-L/16``           pictures/s through our extractor, next to plain torch (`bench/forward.py`);
                       at the end again with `engine: compile`, which takes longest
``OCR``                pictures/s of the torch engine on the GPU, in as many workers as `auto` has
                       there, and of 8 workers on the CPU
``decode``             clips/s of one process by `accurate`, on the CPU and by NVDEC, and whether
                       the frames are the same
``parity``             the least cosine of features with those of float32 on the CPU

A case that fails, or for which no time is left (``--minutes``), is a row with the reason; rows are
written after each case, and the Kings' logs next to them.
The daemon's workers are placed as `workers: auto` has it here. How busy the GPU is comes from NVML
(`pip install nvidia-ml-py`, if it is there) or nvidia-smi. ``--prepare FOLDER`` makes posts
beforehand, which ``bench/pack_gpu.py`` packs with all packages for a machine without
network. Without a GPU there is ``--small``: tiny models on the CPU, which shows that it all runs.

Run: ``python bench/gpu.py [--media FOLDER] [--posts N] [--minutes N] [--small] [--out FOLDER]``
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

import numpy as np
import torch
from chaos_rig.posts import media_server
from floors import finish
from forward import Clock, items, measure
from results_file import FOLDER, write_results
from rig import median_load, site
from workloads import Workload, workload

from common.errors import one_line
from common.logs import configure_logs
from common.processes import cores, process_pool
from common.tables import print_table
from config.features import ExtractorName, FeatureSettings, OcrSettings
from config.settings import DecodeSettings, Settings
from extractors.media.decode import decode_media
from extractors.suite import ExtractorSuite
from tests.support.tiny_encoders import sentence_bert
from workers.pool.placement import place
from workers.sample_posts import texture

_LOAD_S = 45.0
"""Of a measured load, as the first posts promise: two loads, their starts and the rest take less
than 8 minutes even at a tenth of the goal."""
_WARM, _MOST_POSTS = 48, 4000
_OCR_S = 8.0
_OCR_WORKERS = 8
_LOADING_S = 120.0
"""For all readers of OCR: they take 10 s on 16 cores. One that does not load ends the case."""
_BUSY_EVERY_S = 0.25
_DECODE_ROUNDS = 10

CASES = {
    "key 2 s, auto": ("720p, key 2 s", "auto"),
    "key 5 s, accurate": ("720p, key 5 s", "accurate"),
}
_VIT = {"arch": "vit_large_patch16_224", "weights": "random:0", "batch_size": 128}
_MINILM: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}


def made(case: str, folder: Path, *, small: bool) -> Workload:
    """Return the posts and settings of a case; files that are in the folder already stay."""
    clip, mode = CASES[case]
    folder = folder / mode
    if small:
        features = workload("tiny", folder / "settings").settings.features.model_dump()
        features["ocr"]["enabled"] = True
        return _placed(workload("tiny", folder, features=features))
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    sentence_bert(text, **_MINILM)
    (text / "model.safetensors").unlink()  # random:0 makes the same, and it is large
    features = {
        "preset": "small",
        "video": {**_VIT, "frames": 16, "decode": mode},
        "image": _VIT,
        "audio": {"arch": "vggish", "weights": "random:0"},
        "text": {"arch": str(text), "weights": "random:0", "pooling": "mean"},
    }
    return _placed(workload("realistic", folder, clips=(clip,), features=features))


def _placed(prepared: Workload) -> Workload:
    """Return it with the workers of this host instead of those for comparisons on two cores."""
    values = prepared.settings.model_dump(mode="json", exclude_unset=True)
    del values["workers"], values["decode"]["processes"]
    placement = place(type(prepared.settings).model_validate(values))
    return Workload(placement.settings, prepared.entries, prepared.folder)


@contextmanager
def busy_percent(device: str) -> Iterator[list[float]]:
    """Collect how busy a GPU is while the block runs; nothing where nobody can tell."""
    samples: list[float] = []
    index = int(device.partition(":")[2] or 0)
    if device == "cpu":
        yield samples
        return
    stop = threading.Event()
    ask = _nvml(index) or _smi(index)
    thread = threading.Thread(target=_sample, args=(ask, samples, stop), daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def _sample(ask: Any, samples: list[float], stop: threading.Event) -> None:
    while ask is not None and not stop.wait(_BUSY_EVERY_S):
        with suppress(OSError, ValueError, subprocess.SubprocessError):
            samples.append(float(ask()))


def _nvml(index: int) -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        pynvml.nvmlDeviceGetUtilizationRates(handle)  # a part of a GPU does not tell
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu


def _smi(index: int) -> Any:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--id={index}", "--query-gpu=utilization.gpu"]
    command.append("--format=csv,noheader,nounits")

    def ask() -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()

    return ask


@contextmanager
def short_folder(logs: Path, case: str) -> Iterator[Path]:
    """Give a temporary folder with a path that fits unix sockets; its logs are kept."""
    with tempfile.TemporaryDirectory(prefix="gpu-", dir="/tmp") as name:
        try:
            yield Path(name)
        finally:
            logs.mkdir(parents=True, exist_ok=True)
            for log in Path(name).glob("king-*.log"):
                shutil.copyfile(log, logs / f"{'-'.join(re.findall('[a-z0-9]+', case))}.log")


def run_daemon(
    case: str, prepared: Workload, device: str, posts: int | None, logs: Path, *, small: bool
) -> dict[str, Any]:
    """Return the row of a case: posts/s and the GPU's share while a load goes through."""
    with (
        short_folder(logs, case) as short,
        media_server(prepared.folder) as url,
        site("embedded", prepared.settings, short) as rig,
        rig.kings(),
    ):
        warm = 8 if small else _WARM
        first = rig.load(prepared.documents("warm", warm, url))
        number = posts or min(_MOST_POSTS, max(warm, int(first.posts_per_s * _LOAD_S)))
        number = warm if small else number
        with busy_percent(device) as busy:
            load = rig.load(prepared.documents("post", number, url))
    workers = prepared.settings.workers.extractors
    return {
        "case": case,
        "device": device.partition(":")[0],
        "posts": number,
        **median_load([load]),
        "gpu_busy_percent": round(statistics.mean(busy), 1) if busy else None,
        "decoders": prepared.settings.decode.processes,
        "extractors": [f"{'+'.join(g.extractors)} {g.processes} {g.device}" for g in workers],
    }


def run_forward(case: str, device: str, *, small: bool, compiled: bool = False) -> dict[str, Any]:
    """Return the row of the large encoder."""
    clock = Clock(device, 2 if small else 8)
    preset = "tiny" if small else "classic"
    row = measure(preset, "image", clock, 16 if small else None, compiled=compiled)
    return {"case": case, **row}


_reader: Any = None
_all_ready: Any = None


def _open_reader(settings: OcrSettings, device: str, all_ready: Any) -> None:
    global _reader, _all_ready  # noqa: PLW0603 - one of each process
    configure_logs("json", "error")
    features = FeatureSettings(ocr=settings)
    _reader = ExtractorSuite(features, device, ("ocr",), threads=1)
    _reader.load()
    _all_ready = all_ready


def _read(seconds: float) -> float:
    """Read pictures for some seconds; gives pictures/s."""
    examples = items(FeatureSettings(), "ocr", 4)
    # As in realistic posts, every other picture has words.
    examples += [(np.ascontiguousarray(texture(i, 960, 720)),) for i in range(4)]
    _reader.run("ocr", examples)
    _all_ready.wait()  # so that each process has one task, and all of them at the same time
    began, done = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        _reader.run("ocr", examples)
        done += len(examples)
    return done / (time.monotonic() - began)


def pictures_per_s(settings: OcrSettings, device: str, workers: int, seconds: float) -> float:
    """Return the pictures/s that a number of processes read together."""
    all_ready = get_context("spawn").Barrier(workers, timeout=_LOADING_S)
    with process_pool(workers, _open_reader, settings, device, all_ready) as pool:
        return sum(pool.map(_read, [seconds] * workers))


def run_ocr(device: str, *, small: bool) -> dict[str, Any]:
    """Return the row of OCR."""
    seconds = 1.0 if small else _OCR_S
    workers = 1 if small else min(_OCR_WORKERS, cores())
    on_cpu = pictures_per_s(OcrSettings(), "cpu", workers, seconds)
    group = place(Settings()).settings.workers.extractors[-1]  # on a GPU, that of OCR
    processes = 1 if small else group.processes
    in_torch = pictures_per_s(OcrSettings(engine="torch"), device, processes, seconds)
    return {
        "case": "OCR",
        "device": device.partition(":")[0],
        "torch_per_s": round(in_torch, 2),
        "torch_workers": processes,
        "cpu_per_s": round(on_cpu, 2),
        "cpu_workers": workers,
        "torch_over_cpu": round(in_torch / on_cpu, 3),
    }


def _decode(path: Path, features: FeatureSettings, rounds: int) -> dict[str, Any]:
    """Decode a clip by the CPU and by the GPU in turn, and compare the frames."""
    seconds, arrays, on_gpu = {"none": 0.0, "cuda": 0.0}, [], None
    for k in range(rounds + 1):  # the first one starts CUDA, and does not count
        for hwaccel in seconds:
            limits = DecodeSettings.model_validate({"hwaccel": hwaccel})
            began = time.monotonic()
            decoded = decode_media("video", path, features, limits)
            seconds[hwaccel] += (time.monotonic() - began) * (k > 0)
            arrays.append(np.asarray(decoded.frames))
            on_gpu = decoded.on_gpu
    return {
        "cpu_per_s": round(rounds / seconds["none"], 2),
        "gpu_per_s": round(rounds / seconds["cuda"], 2) if on_gpu else None,
        "same_frames": all(np.array_equal(arrays[0], each) for each in arrays),
    }


def run_decode(prepared: Workload, device: str, *, small: bool) -> dict[str, Any]:
    """Return the row of decoding, by a process of its own: FFmpeg may not share CUDA with torch."""
    path = next(prepared.folder / each for e in prepared.entries for each in e["videos"])
    rounds = 1 if small else _DECODE_ROUNDS
    with process_pool(1, configure_logs, "json", "warning") as pool:
        row = pool.submit(_decode, path, prepared.settings.features, rounds).result()
    return {"case": "decode", "device": device.partition(":")[0], **row}


def run_parity(features: FeatureSettings, device: str) -> list[dict[str, Any]]:
    """Return the least cosine of each modality with float32 on the CPU."""
    exact = {
        name: getattr(features, name).model_copy(update={"precision": "fp32", "engine": "torch"})
        for name in ("image", "audio", "text")
    }
    names: Sequence[ExtractorName] = ("image", "audio", "text")
    rows = []
    for name in names:
        examples = items(features, name, 8)
        arrays = []
        for settings, where in ((features, device), (features.model_copy(update=exact), "cpu")):
            suite = ExtractorSuite(settings, where, (name,), threads=cores())
            suite.load()
            arrays.append(np.concatenate(suite.run(name, examples)).astype(np.float32))
            suite.close()
        one, other = arrays
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        least = float(((one * other).sum(1) / norms.clip(1e-12)).min())
        row = {"case": "parity", "device": device.partition(":")[0], "for": name}
        rows.append({**row, "cosine": round(least, 6)})
    return rows


def machine_of(device: str) -> dict[str, Any]:
    """Return what the results depend on besides the CPU."""
    gpu = None if device == "cpu" else torch.cuda.get_device_name(device)
    return {"torch": torch.__version__, "gpu": gpu}


def run_all(
    steps: Mapping[str, Callable[[], list[dict[str, Any]]]], device: str, out: Path, until: float
) -> list[dict[str, Any]]:
    """Run the cases one after another; gives their rows, which are written after each.

    Args:
        steps: Each gives the rows of a case.
        device: ``cpu`` or ``cuda:N``.
        out: Folder of gpu.json.
        until: When no further case begins, `time.monotonic()`.
    """
    rows: list[dict[str, Any]] = []
    for case, step in steps.items():
        began = time.monotonic()
        try:
            if began > until:
                raise TimeoutError("no time was left (--minutes)")
            done = step()
        except Exception as error:  # noqa: BLE001 - the others are run all the same
            traceback.print_exc()
            said = f"{type(error).__name__}: {one_line(error, 300)}"
            done = [{"case": case, "device": device.partition(":")[0], "error": said}]
        rows += [{**row, "seconds": round(time.monotonic() - began, 1)} for row in done]
        for row in rows[-len(done) :]:
            print(row, file=sys.stderr, flush=True)
        write_results("gpu", 1, rows, out)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--media", type=Path, help="folder of posts (default: a temporary one)")
    parser.add_argument("--posts", type=int, help="of each load (default: 45 s of them)")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="make the posts, and end")
    parser.add_argument("--minutes", type=float, default=8, help="no case begins later (8)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of gpu.json and logs")
    parser.add_argument("--small", action="store_true", help="tiny models, on the CPU")
    options = parser.parse_args()
    if options.small:
        options.device = "cpu"
    elif options.prepare is None and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --small runs it in small on the CPU")
    return options


def main() -> int:
    options = parse()
    configure_logs("json", "error")
    if options.prepare is not None:
        for case in CASES:
            made(case, options.prepare, small=options.small)
        return 0
    device, small, out = options.device, options.small, options.out
    until = time.monotonic() + 60 * options.minutes
    vit = "tiny ViT" if small else "ViT-L/16"
    with tempfile.TemporaryDirectory(prefix="gpu-posts-") as temporary:
        media = options.media or Path(temporary)
        posts = cache(partial(made, folder=media, small=small))
        often, seldom = CASES

        def tagged(case: str) -> list[dict[str, Any]]:
            return [run_daemon(case, posts(case), device, options.posts, out, small=small)]

        # The quick ones first; torch.compile, which may take a minute or two, at the end.
        steps: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "machine": lambda: [{"case": "machine", **machine_of(device)}],
            vit: lambda: [run_forward(vit, device, small=small)],
            "OCR": lambda: [run_ocr(device, small=small)],
            "parity": lambda: run_parity(posts(often).settings.features, device),
            "decode": lambda: [run_decode(posts(seldom), device, small=small)],
        }
        steps |= {case: partial(tagged, case) for case in CASES}
        if not small:
            compiled = f"{vit}, compiled"
            steps[compiled] = lambda: [run_forward(compiled, device, small=small, compiled=True)]
        rows = run_all(steps, device, out, until)
    if small:
        print("in small, on the CPU: nothing here says how fast a GPU is")
    shown = ("error", "posts_per_s", "gpu_busy_percent", "items_per_s", "torch_over_cpu", "cosine")
    columns = ("case", "for", "device", *shown, "cpu_per_s", "gpu_per_s", "same_frames")
    print_table("", columns, [[row.get(column) for column in columns] for row in rows])
    code = finish("gpu", 1, rows, out, check=not small)
    return 1 if any("error" in row for row in rows) else code


if __name__ == "__main__":
    sys.exit(main())
