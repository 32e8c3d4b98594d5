"""Posts that a part of the model was trained on never make a figure that looks like new ones."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import infer_net
import train_net
from common.post import Stream
from extractors.feature_file import read_features, write_features
from fusion.bundle.bundle import load_bundle
from tests.support.fusion import runs, support

# What the charts show is tested with the report.

REPORT: dict[str, Any] = {"report": {"enabled": True, "subset_posts": 20}}
ONE: dict[str, Any] = {**REPORT, "trainer": {"epochs": 1}, "bundle": {"calibration": "temperature"}}
FOLDS: dict[str, Any] = {**ONE, "ensemble": {"folds": 3}}
TRAIN = tuple(f"train{i}" for i in range(37))
VALID = tuple(f"valid{i}" for i in range(15))


def learn(folder: Path, post_ids: Iterable[str], stream: Stream = "image") -> None:
    """Let the weights behind a stream be trained on posts."""
    for post_id in post_ids:
        features = read_features(folder / "features", post_id)
        write_features(folder / "features", features, support.FINGERPRINTS, (stream,))


@pytest.mark.parametrize(
    ("sections", "learned", "figures"),
    [
        (ONE, TRAIN, VALID),
        (ONE, VALID[:5], VALID[5:]),
        (FOLDS, TRAIN, VALID),
        (FOLDS, (*TRAIN, *VALID[:9]), VALID[9:]),
        ({**FOLDS, "ensemble": {"folds": 2, "pool_valid": False}}, (*TRAIN, VALID[0]), VALID[1:]),
    ],
)
def test_figures_are_of_posts_that_no_part_has_learned_from(
    few_posts: Path, sections: dict[str, Any], learned: tuple[str, ...], figures: tuple[str, ...]
) -> None:
    """Backbones that know a fold's posts would claim too much; only the others are measured on."""
    learn(few_posts, learned)
    report = runs.run(few_posts, **sections)
    assert set(runs.predictions(few_posts).post_ids) == set(figures)
    assert report.seen_posts == 0
    bundle = load_bundle(report.bundle)
    assert set(TRAIN) == {post for post in (*TRAIN, *VALID) if post in bundle.learned_from} or (
        "ensemble" in sections
    )
    left_out = len(set(learned) & ({*TRAIN, *VALID} if "ensemble" in sections else set(VALID)))
    warned = [e["text"] for e in runs.events(few_posts) if e["event"] == "warning"]
    assert bool(left_out) == any("left out of validation" in text for text in warned)


def _shared_with_train(folder: Path) -> dict[str, Any]:
    return {**ONE, "data": {"valid": str(folder / "train.json")}}


def _learned_by_backbone(folder: Path) -> dict[str, Any]:
    learn(folder, VALID)
    return ONE


def _folds_of_learned_posts(folder: Path) -> dict[str, Any]:
    learn(folder, (*TRAIN, *VALID), "video")
    return FOLDS


@pytest.mark.parametrize(
    "prepare", [_shared_with_train, _learned_by_backbone, _folds_of_learned_posts]
)
def test_where_all_are_seen_posts_everything_says_so(
    few_posts: Path, prepare: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Summary, log, page, numbers and bundle; and neither thresholds nor calibration are fitted."""
    config = runs.config_file(few_posts, **prepare(few_posts))
    assert train_net.main(["--model_config", str(config)]) == 0
    said = capsys.readouterr()
    assert "of training posts: gap " in said.out
    assert "are training posts" in said.err
    run = few_posts / "run" / "latest"
    logs = [*run.glob("log/train.jsonl"), *run.glob("fold-*/log/train.jsonl")]
    events = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    figures = [e for e in events if e["event"] in ("valid", "bundle") and "gap" in e]
    assert len(figures) >= 2
    assert all(event["seen_posts"] > 0 for event in figures)
    page = (run / "report" / "report.html").read_text()
    assert "Training posts." in page
    assert 'id="modalities"' not in page.lower()
    assert json.loads((run / "report" / "report.json").read_text())["seen_posts"] > 0
    about = yaml.safe_load((few_posts / "bundle" / "bundle.yaml").read_text())
    assert about["seen_posts"] > 0
    assert about["subsets"] == {}
    assert about["calibration"] is None
    assert set(about["thresholds"]) == {0.5}


def test_weights_that_have_learned_from_the_validation_posts(few_posts: Path) -> None:
    """A run that starts from another run's weights knows what these were trained on."""
    swapped = {"train": str(few_posts / "valid.json"), "valid": None}
    runs.run(few_posts, trainer={"epochs": 1}, data=swapped, bundle={"out": str(few_posts / "b")})
    for start in (few_posts / "b", few_posts / "run" / "latest" / "ckpt" / "best.pt"):
        report = runs.run(few_posts, start, trainer={"epochs": 1, "save_dir": str(few_posts / "r")})
        assert report.seen_posts == len(VALID)
        learned = load_bundle(report.bundle).learned_from
        assert all(post in learned for post in (*TRAIN, *VALID))


@pytest.mark.parametrize(
    ("posts", "learned", "says"),
    [
        (("train",), (), "posts 37  labelled 37  of training posts: gap "),
        (("valid",), (), "posts 15  labelled 15  gap "),
        (("valid",), VALID, "posts 15  labelled 15  of training posts: gap "),
        (("train", "valid"), VALID[:5], "figures are on 10 posts: the bundle or the weights"),
    ],
)
def test_inference_tells_seen_posts_from_new_ones(
    few_posts: Path,
    posts: tuple[str, ...],
    learned: tuple[str, ...],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the bundle's own posts and by the feature files; the same for rows of an earlier run."""
    report = runs.run(few_posts, trainer={"epochs": 1})
    learn(few_posts, learned)
    entries = [e for name in posts for e in json.loads((few_posts / f"{name}.json").read_text())]
    (few_posts / "some.json").write_text(json.dumps(entries))
    command = ["--input", str(few_posts / "some.json"), "--best_model", str(report.bundle)]
    command += ["--output", str(few_posts / "tags.jsonl"), "--n_gpus", "0", "--set", "threads=1"]
    for _ in range(2):  # the second takes the first one's rows
        assert infer_net.main(command) == 0
        assert says in capsys.readouterr().out
    figures = [e["post_id"] for e in entries if e["post_id"] in {*VALID} - {*learned}]
    if figures:
        lines = map(json.loads, (few_posts / "tags.jsonl").read_text().splitlines())
        scores = {line["post_id"]: line["scores"] for line in lines}
        assert np.isfinite([scores[post_id] for post_id in figures]).all()
