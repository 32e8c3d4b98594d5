"""Bad input to a training: one clear line each, or with ``--skip_bad`` left out and listed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train_net
from common.errors import ConfigError, TaggingError
from extractors.feature_file import feature_path, write_features
from tests.support.fusion import runs, support
from tests.support.mistakes import one_line

ONE: dict[str, Any] = {"epochs": 1}


def _entries(folder: Path, change: Any) -> None:
    file = folder / "train.json"
    entries = json.loads(file.read_text())
    change(entries)
    file.write_text(json.dumps(entries))


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
    "missing": (lambda d: (d / "valid.json").unlink(), "valid.json: no such data file"),
    "fingerprint": (
        lambda d: support.spoil_features(d, "train30", audio="audio-2"),
        "audio was made with audio-2, but audio-1 is needed",
    ),
    "broken": (
        lambda d: feature_path(d / "features", "train0").write_bytes(b"x"),
        "cannot be read as a feature file",
    ),
    "not finite": (
        lambda d: support.spoil_features(d, "train30", value=np.inf),
        "post train30: text features are not finite",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_data_is_one_line(name: str, few_posts: Path) -> None:
    """The line names the file or post, and no list of skipped posts is written."""
    spoil, says = MISTAKES[name]
    spoil(few_posts)
    with one_line(TaggingError, says):
        runs.run(few_posts, trainer=ONE)
    assert not list(few_posts.rglob("skipped.jsonl"))


def test_a_loss_that_is_no_number_stops_the_run(few_posts: Path) -> None:
    """The epoch and step are named, and the checkpoints from before are intact."""
    runs.run(few_posts, trainer=ONE)
    earlier = (few_posts / "run" / "latest" / "ckpt").resolve()
    before = {path.name: path.read_bytes() for path in earlier.iterdir()}
    with pytest.raises(ConfigError, match=r"epoch 1, step \d+: the loss is"):
        runs.run(few_posts, trainer={"epochs": 3}, optimizer={"learning_rate": 1e30})
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == before


def test_posts_without_the_modalities_asked_for(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        entries = []
        for i in range(4):
            post = support.features(f"{name}{i}", lengths={"audio": 0, "ocr": 0})
            path = write_features(tmp_path / "features", post, support.FINGERPRINTS)
            entries.append({"post_id": post.post_id, "labels": ["tag1"], "features": str(path)})
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match="no post has features of audio, ocr"):
        runs.run(tmp_path, data={"modalities": ["audio", "ocr"]})


# Left out

BAD = {"train3": "label", "train5": "features", "train9": "features", "train20": "features"}
BAD |= {"train0": "features", "train31": "features", "valid2": "features"}


def spoil(folder: Path) -> None:
    """An unknown label; features gone, broken, made otherwise and not finite; one of valid."""
    file = folder / "train.json"
    entries: list[dict[str, Any]] = json.loads(file.read_text())
    entries[3]["labels"] = ["nope"]
    entries[31].pop("features")
    file.write_text(json.dumps(entries))
    root = folder / "features"
    feature_path(root, "train5").unlink()
    feature_path(root, "train9").write_bytes(b"broken")
    feature_path(root, "valid2").write_bytes(b"")
    support.spoil_features(folder, "train0", audio="audio-2")  # the first post of all
    support.spoil_features(folder, "train20")


def test_bad_posts_are_only_listed(few_posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(few_posts)
    config = runs.config_file(few_posts, trainer=ONE)
    assert train_net.main(["--model_config", str(config), "--skip_bad"]) == 0
    lines = (few_posts / "run" / "latest" / "log" / "skipped.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert {entry["post_id"]: entry["kind"] for entry in listed} == BAD
    reasons = {entry["post_id"]: entry["reason"] for entry in listed}
    assert "'nope' is not in the label map" in reasons["train3"]
    assert "no such feature file" in reasons["train5"]
    assert "audio was made with audio-2, but audio-1 is needed" in reasons["train0"]
    assert "not finite" in reasons["train20"]
    assert capsys.readouterr().err.count("skipped 7 posts (features 6, label 1); listed in") == 1
    assert next(e for e in runs.events(few_posts) if e["event"] == "epoch")["posts"] == 37 - 6


def test_nothing_is_listed_where_nothing_is_bad(few_posts: Path) -> None:
    runs.run(few_posts, trainer=ONE)
    plain = runs.weights(few_posts)
    runs.run(few_posts, trainer=ONE, data={"skip_bad": True})
    assert (few_posts / "run" / "latest" / "log" / "skipped.jsonl").read_text() == ""
    assert runs.equal(plain, runs.weights(few_posts))


def test_a_split_of_bad_posts_alone_is_an_error(few_posts: Path) -> None:
    for path in (few_posts / "features").rglob("valid*.safetensors"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"valid\.json: features of no post .* no such feature"):
        runs.run(few_posts, data={"skip_bad": True})


def test_tags_without_posts_are_named(few_posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A warning with the tags' names, in the terminal and in the log."""
    entries = json.loads((few_posts / "train.json").read_text())
    for entry in entries:
        entry["labels"] = [name for name in entry["labels"] if name not in {"tag2", "tag5"}]
    (few_posts / "train.json").write_text(json.dumps(entries))
    runs.run(few_posts, trainer=ONE)
    assert "no post has tag2, tag5; these tags will not be learned" in capsys.readouterr().err
    assert len([e["text"] for e in runs.events(few_posts) if e["event"] == "warning"]) == 1
