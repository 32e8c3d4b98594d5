"""Bad input to a training: one clear line each, and what was there before stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError, FeatureError, TaggingError
from extractors.feature_file import write_features
from tests.support.fusion import runs, support


def _entries(folder: Path, change: Any) -> None:
    file = folder / "train.json"
    entries = json.loads(file.read_text())
    change(entries)
    file.write_text(json.dumps(entries))


def _other_fingerprint(folder: Path) -> None:
    found = support.features("train50", seed=1)
    write_features(folder / "features", found, {**support.FINGERPRINTS, "audio": "audio-2"})


def _not_finite(folder: Path) -> None:
    found = support.features("train50", seed=1)
    found.arrays["text"][0, 0] = np.inf
    write_features(folder / "features", found, support.FINGERPRINTS)


MISTAKES: dict[str, tuple[Any, str]] = {
    "label": (
        lambda d: _entries(d, lambda e: e[3].update(labels=["nope"])),
        "post train3: label 'nope' is not in the label map",
    ),
    "no file": (
        lambda d: _entries(d, lambda e: e[3].update(features="features/00/x.safetensors")),
        "features/00/x.safetensors",
    ),
    "no path": (
        lambda d: _entries(d, lambda e: e[3].pop("features")),
        "post train3: the data file names no feature file",
    ),
    "empty": (lambda d: (d / "train.json").write_text("[]"), "train.json: holds no posts"),
    "no JSON": (lambda d: (d / "train.json").write_text("[{"), "train.json: not a JSON data file"),
    "no list": (lambda d: (d / "train.json").write_text("{}"), "must have a post_id"),
    "no ID": (lambda d: (d / "train.json").write_text("[{}]"), "entry 1: must have a post_id"),
    "twice": (
        lambda d: _entries(d, lambda e: e.append(e[5])),
        "post 'train5' stands twice",
    ),
    "missing": (lambda d: (d / "valid.json").unlink(), "valid.json: no such data file"),
    "fingerprint": (_other_fingerprint, "audio was made with audio-2, but audio-1 is needed"),
    "not finite": (_not_finite, "post train50: text features are not finite"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_data_is_one_line(name: str, posts: Path) -> None:
    """The line names the file or post, and the bundle that was there stays."""
    spoil, says = MISTAKES[name]
    spoil(posts)
    with pytest.raises(TaggingError) as caught:
        runs.run(posts, trainer={"epochs": 1})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_no_number_stops_the_run(posts: Path) -> None:
    """The epoch and step are named, and the checkpoints from before are intact."""
    runs.run(posts, trainer={"epochs": 1})
    earlier = (posts / "run" / "latest" / "ckpt").resolve()
    before = {path.name: path.read_bytes() for path in earlier.iterdir()}
    with pytest.raises(ConfigError, match=r"epoch 1, step \d+: the loss is"):
        runs.run(posts, trainer={"epochs": 3}, optimizer={"learning_rate": 1e30})
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == before


def test_a_checkpoint_of_another_architecture_is_refused(posts: Path) -> None:
    runs.run(posts, trainer={"epochs": 1})
    with pytest.raises(ConfigError, match=r"made with another model: .*token_transformer"):
        runs.run(posts, resume=posts / "run", model={"name": "concat_se"})


def test_broken_feature_files(tmp_path: Path) -> None:
    support.write_posts(tmp_path, "train", 4, 1)
    support.write_posts(tmp_path, "valid", 4, 2)
    for file in (tmp_path / "features").rglob("*.safetensors"):
        file.write_bytes(b"broken")
    with pytest.raises(FeatureError, match="cannot be read as a feature file"):
        runs.run(tmp_path)


def test_posts_without_the_modalities_asked_for(tmp_path: Path) -> None:
    """There is nothing to learn from; the line names the modalities."""
    for name in ("train", "valid"):
        entries = []
        for i in range(4):
            found = support.features(f"{name}{i}", lengths={"audio": 0, "ocr": 0})
            path = write_features(tmp_path / "features", found, support.FINGERPRINTS)
            entries.append({"post_id": found.post_id, "labels": ["tag1"], "features": str(path)})
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match="no post has features of audio, ocr"):
        runs.run(tmp_path, data={"modalities": ["audio", "ocr"]})
