"""Extraction: the scripts as people run them, with real media, models and processes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.post import Post
from config.load import load_settings
from corpus.extract.run import main
from corpus.extract.work import MODALITIES_OF, Inputs, Kind, Work
from extractors.feature_file import feature_path, features_bytes, read_features, read_header
from tests.support.corpus.extraction_corpus import (
    feature_files,
    files,
    write_config,
    write_corpus,
    write_pictures,
)
from workers.local import local_runner

# Only runs that are interrupted have workers of their own: others would test nothing more.
pytestmark = pytest.mark.usefixtures("models_in_this_process")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``posts.jsonl``, ``tiny.yaml``, and ``features`` from all scripts."""
    folder = tmp_path_factory.mktemp("corpus")
    posts = write_corpus(folder)
    config = write_config(folder)
    for kind in MODALITIES_OF:
        assert main(kind, arguments(config, posts, folder / "features")) == 0
    return folder


def arguments(config: Path, posts: Path, features: Path) -> list[str]:
    return ["--config", str(config), "--input", str(posts), "--features", str(features)]


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def posts_of(corpus: Path) -> list[Post]:
    settings = load_settings(corpus / "tiny.yaml")
    entries = Inputs(corpus / "posts.jsonl", settings, MODALITIES_OF["image"])
    return [entry.post for entry in entries if isinstance(entry, Work)]


def test_the_features_are_those_of_the_daemon(corpus: Path) -> None:
    """Bit for bit those that all modalities at once, in one process, give."""
    compared = 0
    with local_runner(load_settings(corpus / "tiny.yaml"), fuse=False) as local:
        for post in posts_of(corpus):
            path = feature_path(corpus / "features", post.post_id)
            if post.post_id == "broken" or post.post_id == "lost":  # noqa: PLR1714
                continue  # below: which script names what is broken
            expected, features = (
                local.run(post).features,
                read_features(corpus / "features", post.post_id),
            )
            for stream, array in expected.arrays.items():
                np.testing.assert_array_equal(features.arrays[stream], array)
            inputs = read_header(path).inputs
            assert path.read_bytes() == features_bytes(expected, local.fingerprints, inputs)
            compared += 1
    assert compared == 4


def test_what_failed_is_told_with_its_reason(corpus: Path) -> None:
    """In the order of the input, by each script for its own modality."""
    failed = lines(corpus / "features" / "failures_image.jsonl")
    assert [(f["post_id"], f["modality"], f["stage"], f["type"]) for f in failed] == [
        ("two", "image", "decode", "MediaError"),
        ("broken", "image", "decode", "MediaError"),
        (None, None, "input", "BadLine"),
        ("lost", "image", "fetch", "FetchRefused"),
    ]
    assert "none.jpg: no such file" in failed[3]["message"]
    assert [f["type"] for f in lines(corpus / "features" / "failures_video.jsonl")] == ["BadLine"]
    summary = json.loads((corpus / "features" / "summary_image.json").read_text(encoding="utf-8"))
    assert summary["failed"] == {
        "image: decode MediaError": 2,
        "image: fetch FetchRefused": 1,
        "post: input BadLine": 1,
    }
    assert (summary["done"], summary["skipped"]) == (3, {"the same post_id again": 1})
    # What is broken in one picture leaves the others of the post.
    assert read_features(corpus / "features", "two").statuses["image"] == "ok"
    assert read_features(corpus / "features", "lost").statuses["video"] == "ok"


def test_a_second_run_only_says_the_same(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = corpus / "features"
    before, stamps = files(root), {p: p.stat().st_mtime_ns for p in root.rglob("*.safetensors")}
    words = [*arguments(corpus / "tiny.yaml", corpus / "posts.jsonl", root), "--json"]
    capsys.readouterr()
    assert main("image", words) == 0
    assert files(root) == before
    report = json.loads(capsys.readouterr().out)
    assert (report["features"], report["done"]) == (str(root), 0)
    assert report["total"] == len((corpus / "posts.jsonl").read_bytes().splitlines())
    assert report["failures"] == str(root / "failures_image.jsonl")
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*.safetensors")} == stamps


def _started(kind: Kind, options: list[str]) -> subprocess.Popen[bytes]:
    script = str(ROOT / "scripts" / f"extract_{kind}_features.py")
    return subprocess.Popen([sys.executable, script, *options], stderr=subprocess.PIPE)


def _stop_after(process: subprocess.Popen[bytes], root: Path, count: int, number: int) -> int:
    """Send a signal once so many feature files are there; the exit status."""
    end = time.monotonic() + 120
    while sum(1 for _ in root.glob("*/*.safetensors")) < count and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


def test_killed_runs_go_on_and_end_the_same(tmp_path: Path) -> None:
    posts, config = write_pictures(tmp_path / "in", 150), write_config(tmp_path)
    assert main("image", arguments(config, posts, tmp_path / "whole")) == 0
    root = tmp_path / "killed"
    stamps: dict[Path, int] = {}
    for number in (signal.SIGKILL, signal.SIGTERM):
        done = len(stamps)
        process = _started("image", arguments(config, posts, root))
        status = _stop_after(
            process, root, done + int(np.random.default_rng().integers(1, 40)), number
        )
        assert status in (-number, 1)
        now = {path: path.stat().st_mtime_ns for path in root.glob("*/*.safetensors")}
        assert len(now) > done
        assert {path: now[path] for path in stamps} == stamps, "made again"
        stamps = now
        assert not list(root.glob("*.json*"))  # they tell of all posts, or are not there
    assert main("image", arguments(config, posts, root)) == 0
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    summary = (root / "summary_image.json").read_bytes()
    assert summary == (tmp_path / "whole" / "summary_image.json").read_bytes()
    assert feature_files(root) == feature_files(tmp_path / "whole")
    assert [p.name for p in root.rglob("*") if ".part" in p.name] == []
    failures = (root / "failures_image.jsonl").read_bytes()
    assert failures == (tmp_path / "whole" / "failures_image.jsonl").read_bytes()


def test_no_readable_post_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 and one line that names the file and why; nothing is written, no model is loaded."""
    posts, config = tmp_path / "posts.jsonl", write_config(tmp_path)
    posts.write_text("{\n[]\n", encoding="utf-8")
    assert main("image", arguments(config, posts, tmp_path / "f")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    said = "holds no readable post: all 2 lines are broken; line 1: not JSON"
    assert line.startswith(f"extract_image_features: {posts}: {said}")
    assert not (tmp_path / "f").exists()
