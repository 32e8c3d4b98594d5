"""Features of the posts that a backbone is trained on: out of fold, or marked as trained on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from common.post_set import PostSet
from config.features import ImageSettings
from corpus.extract import out_of_fold
from corpus.extract.run import main as extract
from extractors.feature_file import feature_path, read_features, read_header
from extractors.learned import posts_of_weights
from fusion.backbones import training
from tests.support.fusion.media_posts import write_labels, write_pictures
from tests.support.tiny_models import TINY_CNN, tiny_features
from workers import runner
from workers.local import LocalPool


@pytest.fixture(autouse=True)
def _models_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ProcessPool", LocalPool)


@pytest.fixture
def posts(tmp_path: Path) -> Path:
    """Pictures, and the settings of their backbone and of its extractor."""
    write_labels(tmp_path)
    write_pictures(tmp_path, "train", 12)
    image = ImageSettings(arch=TINY_CNN, image_size=32, precision="fp32")
    content = {"features": tiny_features(image=image).model_dump(mode="json")}
    (tmp_path / "tiny.yaml").write_text(json.dumps(content))
    training: dict[str, Any] = {
        "task": "image_backbone",
        "data": {
            "train": str(tmp_path / "train.json"),
            "valid": None,
            "labels": str(tmp_path / "labels.json"),
        },
        "backbone": {"arch": TINY_CNN, "image_size": 32},
        "trainer": {
            "epochs": 1,
            "batch_size": 6,
            "n_gpu": 0,
            "threads": 1,
            "save_dir": str(tmp_path / "run"),
            "progress": False,
            "tensorboard": False,
        },
    }
    (tmp_path / "backbone.yaml").write_text(yaml.safe_dump(training))
    return tmp_path


def command(folder: Path, *more: str) -> int:
    paths = {"model_config": "backbone.yaml", "config": "tiny.yaml", "features": "features"}
    named = [part for key, name in paths.items() for part in (f"--{key}", str(folder / name))]
    return out_of_fold.main([*named, "--folds", "3", *more])


def _extracted(folder: Path, posts: Path, features: Path, weights: Path) -> None:
    config = ["--config", str(folder / "tiny.yaml"), "--set", f"features.image.weights={weights}"]
    assert extract("image", ["--input", str(posts), "--features", str(features), *config]) == 0


def test_each_post_is_extracted_by_weights_that_do_not_know_it(
    posts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the fingerprint of the weights that serve; a second run finds everything there."""
    assert command(posts) == 0
    work, root = posts / "run" / "out_of_fold", posts / "features"
    serving = work / "all" / "weights" / f"{TINY_CNN}.safetensors"
    assert str(serving) in capsys.readouterr().out
    ids = [entry["post_id"] for entry in json.loads((posts / "train.json").read_text())]
    assert np.array_equal(posts_of_weights(serving).hashes, PostSet.of(ids).hashes)
    _extracted(posts, posts / "train.json", posts / "plain", serving)
    made_with = read_header(feature_path(posts / "plain", ids[0])).fingerprints
    for fold in (1, 2, 3):
        weights = work / f"fold-{fold}" / "weights" / f"{TINY_CNN}.safetensors"
        lines = (work / f"fold-{fold}" / "fold.jsonl").read_text().splitlines()
        own = [json.loads(line)["post_id"] for line in lines]
        assert len(own) == 4
        learned = posts_of_weights(weights)
        assert [post_id in learned for post_id in ids] == [i not in own for i in ids]
        _extracted(posts, work / f"fold-{fold}" / "fold.jsonl", posts / f"own{fold}", weights)
        for post_id in own:
            array = read_features(root, post_id, made_with).arrays["image"]
            expected = read_features(posts / f"own{fold}", post_id).arrays["image"]
            np.testing.assert_array_equal(array, expected)
            assert read_header(feature_path(root, post_id)).learned_from == ()
            assert read_header(feature_path(posts / "plain", post_id)).learned_from == ("image",)
    monkeypatch.setattr(training, "train_backbones", None)
    assert command(posts) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--folds", "7"), "12 posts are too few"),
        (("--model_config", "config/train_config.yaml"), "must be image_backbone or video"),
        (("--model_set", "data.train=none.json"), "no such data file"),
    ],
)
def test_mistakes_end_with_2_and_one_line(
    posts: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(posts, *more) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_folds_of_other_settings_are_not_mixed(
    posts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train_backbones", stop)
    assert command(posts) != 0
    assert command(posts, "--seed", "1") == 2
    printed = capsys.readouterr().err
    assert "belong to other posts, folds or settings: name another --work" in printed
