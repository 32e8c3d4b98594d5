"""``--skip_bad``: what cannot be learned from is counted, listed and left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train_net
from common.errors import ConfigError
from extractors.feature_file import feature_path, write_features
from tests.support.fusion import runs, support

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
    other = {**support.FINGERPRINTS, "audio": "audio-2"}
    write_features(root, support.features("train0", seed=1), other)  # the first post of all
    found = support.features("train20", seed=1)
    found.arrays["text"][0, 0] = np.nan
    write_features(root, found, support.FINGERPRINTS)


@pytest.mark.parametrize("loaders", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_bad_posts_are_listed_and_left_out(
    loaders: int, few_posts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(few_posts)
    config = runs.config_file(few_posts, trainer={"epochs": 1}, data={"loaders": loaders})
    assert train_net.main(["--model_config", str(config), "--skip_bad"]) == 0
    lines = (few_posts / "run" / "latest" / "log" / "skipped.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert {entry["post_id"]: entry["kind"] for entry in listed} == BAD
    reasons = {entry["post_id"]: entry["reason"] for entry in listed}
    assert "'nope' is not in the label map" in reasons["train3"]
    assert "no such feature file" in reasons["train5"]
    assert "audio was made with audio-2, but audio-1 is needed" in reasons["train0"]
    assert "not finite" in reasons["train20"]
    said = capsys.readouterr().err
    assert said.count("skipped 7 posts (features 6, label 1); listed in") == 1
    epoch = next(e for e in runs.events(few_posts) if e["event"] == "epoch")
    assert epoch["posts"] == 37 - 6


def test_they_end_the_run_otherwise(few_posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the option the first is an error, and no list is written."""
    spoil(few_posts)
    config = runs.config_file(few_posts, trainer={"epochs": 1})
    assert train_net.main(["--model_config", str(config)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "post train3: label 'nope' is not in the label map" in said[0]
    assert not list(few_posts.rglob("skipped.jsonl"))


def test_nothing_is_listed_where_nothing_is_bad(few_posts: Path) -> None:
    """The list is there and empty; the weights are those without the option."""
    runs.run(few_posts, trainer={"epochs": 1})
    plain = runs.weights(few_posts)
    runs.run(few_posts, trainer={"epochs": 1}, data={"skip_bad": True})
    assert (few_posts / "run" / "latest" / "log" / "skipped.jsonl").read_text() == ""
    assert runs.equal(plain, runs.weights(few_posts))


def test_a_split_of_bad_posts_alone_is_an_error(few_posts: Path) -> None:
    """There is nothing to learn from; the line names the file and the first reason."""
    for path in (few_posts / "features").rglob("valid*.safetensors"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"valid\.json: features of no post .* no such feature"):
        runs.run(few_posts, data={"skip_bad": True})
    entries = json.loads((few_posts / "train.json").read_text())
    for entry in entries:
        entry["labels"] = ["nope"]
    (few_posts / "train.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=r"train\.json: holds no posts that can be used"):
        runs.run(few_posts, data={"skip_bad": True})


def test_tags_without_posts_are_named_and_training_goes_on(
    few_posts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning with the tags' names, in the terminal and in the log."""
    entries = json.loads((few_posts / "train.json").read_text())
    for entry in entries:
        entry["labels"] = [name for name in entry["labels"] if name not in {"tag2", "tag5"}]
    (few_posts / "train.json").write_text(json.dumps(entries))
    runs.run(few_posts, trainer={"epochs": 1})
    assert "no post has tag2, tag5; these tags will not be learned" in capsys.readouterr().err
    warnings = [e["text"] for e in runs.events(few_posts) if e["event"] == "warning"]
    assert len(warnings) == 1
