"""k-fold training that leaks nothing, and snapshots of one training, as one bundle."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError
from extractors.feature_file import read_features
from fusion.bundle import bundle
from fusion.data.posts import PostList
from fusion.infer.inferer import Inferer
from fusion.metrics import ranking as metrics
from fusion.train import fold_training
from fusion.train.trainer import TrainData, Trainer
from tests.support.fusion import runs, support

# What the charts show is tested with the report.

FOLDS: dict[str, Any] = {
    "ensemble": {"folds": 3},
    "trainer": {"epochs": 1},
    "report": {"enabled": True, "subset_posts": 0},
}


class Killed(Exception):
    """Stands for a kill in the midst of a training."""


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The IDs of the posts that each fold is trained on; under ``kill`` the fold that is killed."""
    learned: dict[str, set[str]] = {}
    original = Trainer.fit

    def fit(self: Trainer, objective: Any, data: TrainData, start: Any = None) -> Any:
        fold = self.last.parent.parent.name
        if fold in learned.get("kill", set()):
            raise Killed
        learned[fold] = {data.train[row].post_id for row in range(data.train_count)}
        return original(self, objective, data, start)

    monkeypatch.setattr(Trainer, "fit", fit)
    return learned


def test_folds_leak_nothing_and_outlive_kills(few_posts: Path, fits: dict[str, set[str]]) -> None:
    """Each post is held out once and scored by the model that was not trained on it.

    Folds that are done are not trained again; the bundle is that of an undisturbed run.
    """
    report = runs.run(few_posts, **FOLDS)
    everything = set().union(*fits.values())
    left_out = [everything - fits[f"fold-{fold}"] for fold in (1, 2, 3)]
    assert sorted(i for some in left_out for i in some) == sorted(everything)
    assert all(abs(len(some) - 52 / 3) <= 3 for some in left_out)
    predictions = runs.predictions(few_posts)
    whole = bundle.load_bundle(report.bundle)
    start = 0
    for some, one in zip(left_out, whole.members, strict=True):
        rows = slice(start, start + len(some))
        ids = list(predictions.post_ids[rows])
        assert set(ids) == some
        support.write_bundle(few_posts / "one", model=one)
        features = [read_features(few_posts / "features", i, support.FINGERPRINTS) for i in ids]
        scores = Inferer.load(few_posts / "one").scores(features)
        np.testing.assert_allclose(predictions.raw[rows], scores, atol=1e-6)
        start += len(some)
    assert start == len(predictions.post_ids)
    gap = metrics.global_average_precision(predictions.scores, predictions.targets)
    assert report.metrics["gap"] == gap

    fits.clear()
    fits["kill"] = {"fold-2"}
    with pytest.raises(Killed):
        runs.run(few_posts, **FOLDS)
    killed = (few_posts / "run" / "latest").resolve()
    assert list(fits) == ["kill", "fold-1"]
    fits.clear()
    runs.run(few_posts, resume=few_posts / "run", **FOLDS)
    assert list(fits) == ["fold-2", "fold-3"]
    assert (few_posts / "run" / "latest").resolve() == killed
    again = bundle.load_bundle(few_posts / "bundle")
    assert again.metrics == whole.metrics
    for one, other in zip(again.members, whole.members, strict=True):
        assert runs.equal(one.state_dict(), other.state_dict())
    with pytest.raises(ConfigError, match=r"had other posts, folds or settings"):
        runs.run(few_posts, resume=few_posts / "run", **{**FOLDS, "ensemble": {"folds": 4}})
    for folder in (few_posts, few_posts / "bundle"):
        with pytest.raises(ConfigError, match="takes the folder of a k-fold run"):
            runs.run(few_posts, resume=folder, **FOLDS)


def test_validation_posts_may_be_left_out(few_posts: Path, fits: dict[str, set[str]]) -> None:
    """Then the ensemble is measured on them, and no fold is trained on them."""
    runs.run(few_posts, **{**FOLDS, "ensemble": {"folds": 2, "pool_valid": False}})
    valid = [record.post_id for record in PostList.read(few_posts / "valid.json", support.LABELS)]
    assert list(runs.predictions(few_posts).post_ids) == valid
    assert not set().union(*fits.values()) & set(valid)


def test_snapshots_are_the_ends_of_the_cycles(few_posts: Path) -> None:
    """The bundle's members are the weights after each cycle, where the learning rate is lowest."""
    report = runs.run(
        few_posts,
        ensemble={"snapshots": 2},
        trainer={"epochs": 4, "log_interval": 1},
        report={"enabled": True, "subset_posts": 0},
    )
    members = bundle.load_bundle(report.bundle).members
    assert len(members) == 2
    assert runs.equal(members[1].state_dict(), runs.weights(few_posts)), "the end of the run"
    steps = [e for e in runs.events(few_posts) if e["event"] == "step"]
    rates = [e["learning_rate"] for e in steps]
    end = next(i for i, e in enumerate(steps) if e["epoch"] == 3)
    # A line has the rate of the step that follows.
    assert rates[end - 2] < rates[end] / 2
    predictions = runs.predictions(few_posts)
    features = [
        read_features(few_posts / "features", i, support.FINGERPRINTS) for i in predictions.post_ids
    ]
    np.testing.assert_array_equal(Inferer.load(report.bundle).scores(features), predictions.scores)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"trainer": {"epochs": 5}}, "5 epochs are not a multiple of 2"),
        ({"trainer": {"epochs": 4, "patience": 1}}, "trainer.patience must be 0"),
        (
            {"trainer": {"epochs": 4}, "optimizer": {"schedule": "step"}},
            "optimizer.schedule must be cosine",
        ),
    ],
)
def test_snapshots_that_cannot_be(sections: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        support.train_settings(tmp_path, ensemble={"snapshots": 2}, **sections)


def test_a_fold_that_cannot_be_written(few_posts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fold_training, "write_whole", full)
    with pytest.raises(ConfigError, match=r"folds\.json: cannot be written: .*No space left"):
        runs.run(few_posts, ensemble={"folds": 2}, trainer={"epochs": 1})
