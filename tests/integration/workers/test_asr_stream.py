"""The words in sound, from files to tags: one stream more on every path, and none when off."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from config.load import load_settings
from corpus.extract.run import main
from extractors.feature_file import read_features, read_header
from extractors.models.asr import Whisper
from fusion.bundle.bundle import load_bundle
from fusion.data.dataset import FeatureFiles
from fusion.train.training import train
from scripts.cli import run
from tests.support import media
from tests.support.fusion import support
from tests.support.tiny_encoders import talking_whisper
from tests.support.tiny_models import tiny_features
from workers import runner
from workers.local import LocalPool, local_runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Posts whose sound speaks, is silent, or is not there; settings with ASR; a data file."""
    folder = tmp_path_factory.mktemp("asr")
    whisper = talking_whisper(folder / "whisper")
    noise = (np.random.default_rng(0).standard_normal(32_000) * 0.004).astype(np.float32)
    media.write_wav(folder / "speech.wav", noise, subtype="FLOAT")
    media.write_wav(folder / "silence.wav", np.zeros(32_000, np.float32))
    assert media.write_video(folder / "film.mp4", media.grey_steps(20), audio=noise * 5).exists()
    asr = {"enabled": True, "arch": str(whisper), "no_speech": 1, "precision": "fp32"}
    features = tiny_features().model_dump(mode="json") | {"asr": asr}
    values = {"features": features, "cache": {"url": str(folder / "cache")}}
    (folder / "on.yaml").write_text(yaml.safe_dump(values), "utf-8")
    values["features"] = tiny_features().model_dump(mode="json", exclude={"asr"})
    (folder / "off.yaml").write_text(yaml.safe_dump(values), "utf-8")
    posts: list[dict[str, Any]] = [
        {"post_id": "two", "text": "a cat", "audios": ["speech.wav"], "videos": ["film.mp4"]},
        {"post_id": "silent", "text": "a dog", "audios": ["silence.wav"]},
        {"post_id": "none", "text": "a cow"},
    ]
    posts += [{**post, "post_id": f"{post['post_id']}-2"} for post in posts]
    posts = [{**post, "labels": [f"tag{i % 2}"]} for i, post in enumerate(posts)]
    (folder / "posts.json").write_text(json.dumps(posts), "utf-8")
    return folder


@pytest.fixture(autouse=True)
def _models_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ProcessPool", LocalPool)


def test_every_path_gives_the_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon's runner, its cache, and the script of sounds: the same rows, one text a file."""
    from fusion.data.data_file import read_whole_posts

    posts = read_whole_posts(folder / "posts.json")
    settings = load_settings(folder / "on.yaml")
    arguments = ["--config", str(folder / "on.yaml"), "--input", str(folder / "posts.json")]
    assert main("audio", [*arguments, "--features", str(folder / "features")]) == 0
    with local_runner(settings, fuse=False) as first:
        before = [first.run(post).features for post in posts]
        fingerprint = first.fingerprints["asr"]
    monkeypatch.setattr(Whisper, "transcribe", lambda *_: pytest.fail("the cache knows the words"))
    with local_runner(settings, fuse=False) as second:
        after = [second.run(post).features for post in posts]
    assert [f.statuses["asr"] for f in before] == ["ok", "missing", "missing"] * 2
    words = before[0].arrays["asr"]
    assert len(words) > 4  # tokens of two texts
    for again in (after[0], read_features(folder / "features", "two")):
        np.testing.assert_array_equal(again.arrays["asr"], words)
    assert [f.statuses for f in after] == [f.statuses for f in before]
    header = read_header(next((folder / "features").rglob("two.safetensors")))
    assert header.fingerprints["asr"] == fingerprint
    assert {"asr", "audio"} <= set(header.inputs)


def test_off_there_is_no_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither status nor file speaks of it, and Whisper is not loaded."""
    from fusion.data.data_file import read_whole_posts

    monkeypatch.setattr(Whisper, "load", lambda self: pytest.fail("Whisper is loaded"))
    [post, *_] = read_whole_posts(folder / "posts.json")
    with local_runner(load_settings(folder / "off.yaml"), fuse=False) as local:
        features = local.run(post).features
        assert "asr" not in local.fingerprints
    assert set(features.statuses) == {"video", "image", "audio", "text", "ocr"}
    assert "asr" not in features.arrays
    arguments = ["--config", str(folder / "off.yaml"), "--input", str(folder / "posts.json")]
    assert main("audio", [*arguments, "--features", str(folder / "plain")]) == 0
    header = read_header(next((folder / "plain").rglob("two.safetensors")))
    assert "asr" not in {*header.fingerprints, *header.statuses, *header.inputs}


def test_is_trained_reported_and_served(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bundle with it scores each subset, tags, and is refused where ASR is off."""
    data = json.loads((folder / "posts.json").read_text("utf-8"))
    arguments = ["--config", str(folder / "on.yaml"), "--input", str(folder / "posts.json")]
    for kind in ("audio", "text"):
        assert main(kind, [*arguments, "--features", str(folder / "features")]) == 0
    for post in data:
        [path] = (folder / "features").rglob(f"{post['post_id']}.safetensors")
        post["features"] = str(path)
    for name, some in (("train", data[:3]), ("valid", data[3:])):
        (folder / f"{name}.json").write_text(json.dumps(some), "utf-8")
    modalities = ["audio", "text", "asr"]
    settings = support.train_settings(
        folder, data={"modalities": modalities}, trainer={"epochs": 1}, report={"enabled": True}
    )
    report = train(settings, FeatureFiles())
    bundle = load_bundle(report.bundle)
    assert set(bundle.manifest.dims) == {"audio", "text", "asr"}
    assert len(bundle.subsets) == 7
    assert {"asr", "text+asr"} <= set(bundle.subsets)
    served = ["--set", f"fusion.bundle={report.bundle}", "--json"]
    command = ["tag", str(folder / "posts.json"), *served]
    capsys.readouterr()
    assert run([*command, "--config", str(folder / "on.yaml")]) == 0
    assert '"asr": "ok"' in capsys.readouterr().out
    assert run([*command, "--config", str(folder / "off.yaml")]) == 2
    assert "modality asr: the bundle needs" in capsys.readouterr().err


def test_inspect_shows_the_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", str(folder / "on.yaml")]
    for name, words in (("speech.wav", True), ("silence.wav", False)):
        assert run(["inspect", str(folder / name), "--json", *options]) == 0
        [window] = json.loads(capsys.readouterr().out)["speech"]
        assert window["start_s"] == 0
        assert bool(window["text"]) == words
    assert run(["inspect", str(folder / "silence.wav"), *options]) == 0
    assert "speech    from 0 s: no words" in capsys.readouterr().out
