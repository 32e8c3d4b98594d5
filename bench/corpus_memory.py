"""Memory of every offline script at 1,000, 10,000 and 100,000 posts: does it grow with them?

Posts are small: a few words, one tiny picture that all of them share on the disk, a short sound
and a short video for the scripts that read those; models are tiny and random. Each script runs as
its user runs it, and does all of its work (``--extract N`` leaves the extracting ones but the last
N posts to do). All of its processes are asked several times a second for the memory that they hold
themselves, what several of them share counted once (anonymous and shared memory of their
proportional set size); the highest sum is kept. Code that is mapped from files is not counted: it
is the same for any number of posts, and whoever else runs it changes the figure.

Run: ``python bench/corpus_memory.py [--sizes 1000 10000 100000] [--only pull build]``
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

import numpy as np
import psutil
import yaml
from memory_corpus import Corpus, make, write_media
from pymongo import MongoClient
from results_file import FOLDER, write_results

from common.post import Features, Modality, Status, Stream, modality_of
from config.load import load_settings
from corpus.extract.local import FeatureStore
from corpus.extract.options import parse as parse_extraction
from corpus.extract.work import MODALITIES_OF, Inputs, Kind, Work
from deploy import embedded
from extractors.feature_file import read_features, read_header
from tests.support.processes import serving

ROOT = Path(__file__).resolve().parents[1]
LABELS = ROOT / "config" / "idx2name_cls24.json"
FLAT = 1.25
"""Most that memory may grow from the smallest to the largest corpus."""
_EVERY_S = 0.25
_EVERY_S_AT_FIRST = 0.02  # the smallest corpus takes some scripts less than a second
_fingerprints: dict[str, Mapping[Stream, str]] = {}
_arrays: dict[str, dict[Stream, Any]] = {}


def scripts(corpus: Corpus) -> dict[str, list[str]]:
    """Return the command of each script by name."""
    config, out = ("--config", str(corpus.config)), corpus.folder / "out"
    data = "scripts/data_scripts"
    build = [
        "scripts/build_trainval_data.py",
        "--input",
        str(corpus.urls),
        "--features",
        str(corpus.features),
        "--labels",
        str(LABELS),
        "--format",
        "jsonl",
    ]

    def extract(kind: str) -> list[str]:
        return [
            f"scripts/extract_{kind}_features.py",
            *config,
            "--input",
            str(corpus.local),
            "--features",
            str(out / kind),
            "--workers",
            "1",
        ]

    return {
        "pull": [f"{data}/pull_posts.py", *config, "--out", str(out / "posts.jsonl")],
        "pull, sample and rare tags": [
            f"{data}/pull_posts.py",
            *config,
            "--out",
            str(out / "sample.jsonl"),
            "--sample",
            str(corpus.size // 2),
            "--min_posts_per_tag",
            "5",
        ],
        "build_label_map": [
            "scripts/build_label_map.py",
            "--input",
            str(corpus.urls),
            "--out",
            str(out / "l.json"),
        ],
        "download": [
            f"{data}/download_mp.py",
            str(corpus.urls),
            "--out",
            str(out / "media"),
            *config,
            "--per_host",
            "32",
        ],
        "analyze": [
            f"{data}/analyze_posts.py",
            str(corpus.local),
            "--out",
            str(out / "analysis"),
            "--media",
            str(corpus.local.parent),
        ],
        "build": [*build, "--out", str(out / "data")],
        "build, grown corpus": [
            *build,
            "--out",
            str(out / "grown"),
            "--manifest",
            str(corpus.folder / "known.jsonl"),
            "--duplicates",
            str(corpus.folder / "duplicates.jsonl"),
            "--keep",
            str(corpus.folder / "split.jsonl"),
        ],
        **{f"extract {kind}": extract(kind) for kind in ("text", "image", "audio", "video")},
    }


def settings(folder: Path) -> Any:
    """Write ``settings.yaml``: tiny models, everything on this machine."""
    visual = {"arch": "test_resnet", "weights": "random:1", "image_size": 32, "precision": "fp32"}
    content = {
        "store": {"database": "memory", "fields": {"author": "author"}},
        "embedded": {"folder": str(folder / "embedded")},
        "fetch": {"allow_private_hosts": True, "spool": str(folder / "spool")},
        "log": {"level": "error"},
        "features": {
            "video": {**visual, "frames": 1},
            "image": visual,
            "audio": {"arch": "test_resnet", "weights": "random:1", "precision": "fp32"},
            "text": {"arch": "tiny", "weights": "random:1", "max_tokens": 16, "precision": "fp32"},
            "ocr": {"enabled": False},
        },
    }
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return load_settings(path, [])


def fill(client: MongoClient[dict[str, Any]], corpus: Corpus) -> None:
    """Put the posts into the database."""
    posts = client["memory"]["posts"]
    batch: list[dict[str, Any]] = []
    with corpus.urls.open() as lines:
        for line in lines:
            content = json.loads(line)
            batch.append({"_id": content.pop("post_id"), **content})
            if len(batch) == 2000:
                posts.insert_many(batch)
                batch = []
    if batch:
        posts.insert_many(batch)


def extract_before(corpus: Corpus, kind: Kind, count: int) -> None:
    """Leave features of the first posts, as an earlier run would have."""
    if kind not in _fingerprints:
        command = [*scripts(corpus)[f"extract {kind}"], "--limit", "1"]
        subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=True)
        root = corpus.folder / "out" / kind
        header = read_header(next(root.glob("*/*.safetensors")))
        arrays = read_features(root, header.post_id).arrays
        _fingerprints[kind] = header.fingerprints
        _arrays[kind] = {stream: np.zeros_like(values) for stream, values in arrays.items()}
    options = parse_extraction(kind, scripts(corpus)[f"extract {kind}"][1:])
    modalities = MODALITIES_OF[kind]
    store = FeatureStore(options.features, modalities, _fingerprints[kind])
    arrays = _arrays[kind]
    statuses: dict[Modality, Status] = {
        m: "ok" if m in {modality_of(s) for s in arrays} else "missing" for m in modalities
    }
    for work in Inputs(corpus.local, options.settings, modalities):
        if work.index >= count:
            return
        if isinstance(work, Work):
            store.put(work, Features(post_id=work.post.post_id, arrays=arrays, statuses=statuses))


@contextlib.contextmanager
def pictures(path: Path) -> Iterator[str]:
    """Yield a server that gives one picture under every name."""
    content = path.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        yield f"http://127.0.0.1:{server.server_port}"


def measure(name: str, command: Sequence[str], size: int, limit_s: float) -> dict[str, Any]:
    """Run a script; ``{posts, peak_mb, seconds, exit}``."""
    started, peak = time.monotonic(), 0
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed below
    child = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )
    process, stopped = psutil.Process(child.pid), False
    try:
        while child.poll() is None:
            peak = max(peak, tree_bytes(process))
            seconds = time.monotonic() - started
            sys.stderr.write(f"\r{name:<28} {size:>7,} posts {seconds:6.0f} s {peak >> 20:6} MB ")
            if seconds > limit_s:
                stopped = True
                child.terminate()
                child.wait(60)
            time.sleep(_EVERY_S if seconds > 10 else _EVERY_S_AT_FIRST)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    sys.stderr.write("\n")
    if child.returncode and not stopped:
        log.seek(0)
        print(log.read()[-2000:])
    log.close()
    return {
        "posts": size,
        "peak_mb": round(peak / 2**20, 1),
        "seconds": round(time.monotonic() - started, 1),
        "exit": child.returncode,
        "stopped": stopped,
    }


def tree_bytes(process: psutil.Process) -> int:
    """Return the bytes of memory that a process and all its descendants hold themselves."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
                sizes = dict(line.split(":", 1) for line in lines[1:])
                total += sum(int(sizes[kind].split()[0]) for kind in ("Pss_Anon", "Pss_Shmem"))
    return total * 1024


def run_size(
    folder: Path, size: int, is_chosen: Callable[[str], bool], options: argparse.Namespace
) -> dict[str, Any]:
    """Run every script on one corpus."""
    runs = {}
    online_settings = settings(folder)
    with contextlib.ExitStack() as stack:
        write_media(folder / "m0")
        url = stack.enter_context(pictures(folder / "m0" / "p.png"))
        print(f"making {size:,} posts", flush=True)
        corpus = make(folder / "corpus", size, url, with_features=is_chosen("build"))
        shutil.copy(folder / "settings.yaml", corpus.config)
        (corpus.folder / "out").mkdir()
        if is_chosen("pull"):
            online = embedded.ensure(online_settings, ("mongo",))
            stack.callback(embedded.stop, online_settings)
            with MongoClient[dict[str, Any]](online["mongo"].url) as client:
                fill(client, corpus)
        for name, command in scripts(corpus).items():
            if is_chosen(name):
                if name.startswith("extract ") and options.extract < size:
                    kind = cast("Kind", name.removeprefix("extract "))
                    extract_before(corpus, kind, size - options.extract)
                runs[name] = measure(name, command, size, options.limit_s)
    return runs


def summary(runs_of: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row for each script: peaks, their growth, and by how many bytes a post."""
    rows = []
    for name, runs in runs_of.items():
        whole = [run for run in runs if not run["exit"]]
        if not whole:
            rows.append(
                {"script": name, "runs": runs, "ratio": 0.0, "bytes_per_post": 0, "flat": False}
            )
            continue
        first, last = whole[0], whole[-1]
        more_posts = max(1, last["posts"] - first["posts"])
        more = last["peak_mb"] - first["peak_mb"]
        ratio = last["peak_mb"] / first["peak_mb"]
        rows.append(
            {
                "script": name,
                "runs": runs,
                "ratio": round(ratio, 3),
                "bytes_per_post": round(more * 2**20 / more_posts),
                "flat": ratio <= FLAT,
            }
        )
    return rows


def main() -> int:
    """Measure, print, write ``bench/results/corpus_memory.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--only", nargs="+", help="scripts whose names begin so")
    parser.add_argument(
        "--extract",
        type=int,
        default=100_000,
        help="extract only this many posts, the last ones: the others count as extracted already",
    )
    parser.add_argument("--limit_s", type=float, default=3600, help="of one run")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--name", default="corpus_memory")
    options = parser.parse_args()

    def is_chosen(name: str) -> bool:
        return not options.only or any(name.startswith(each) for each in options.only)

    runs_of: dict[str, list[dict[str, Any]]] = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory(prefix="insighttag-memory-") as name:
            for script, run in run_size(Path(name), size, is_chosen, options).items():
                runs_of.setdefault(script, []).append(run)
        rows = summary(runs_of)
        write_results(options.name, 1, rows, options.out)
    for row in rows:
        peaks = "  ".join(f"{run['posts']:>7,}: {run['peak_mb']:7.1f} MB" for run in row["runs"])
        print(
            f"{row['script']:<28} {peaks}  ratio {row['ratio']:.2f}  "
            f"{row['bytes_per_post']:>6} bytes a post"
        )
    return 0 if all(row["flat"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
