"""Ensembles: the mean of their members, in one bundle; and k-fold training that leaks nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from common.errors import BundleError, ConfigError
from extractors.feature_file import read_features
from fusion.bundle import bundle
from fusion.bundle.bundle import Averaging, Ensemble, averaged
from fusion.data.dataset import FeatureFiles
from fusion.data.posts import PostList, PostPool, stratified_folds
from fusion.infer.inferer import Inferer
from fusion.metrics import ranking as metrics
from fusion.report.predictions import Predictions
from fusion.train import fold_training
from fusion.train.trainer import TrainData, Trainer
from fusion.train.training import TrainReport, train
from tests.support.fusion import support
from tests.unit.fusion.test_bundle import write


def member(seed: int) -> Any:
    """A small model with weights of its own."""
    torch.manual_seed(seed)
    return support.model("token_transformer")


def run(folder: Path, resume: Path | None = None, **sections: Any) -> TrainReport:
    """One small training."""
    return train(support.train_settings(folder, **sections), FeatureFiles(), resume=resume)


@pytest.fixture
def posts(tmp_path: Path) -> Path:
    """A folder with 40 posts to learn from and 20 to validate on."""
    support.write_posts(tmp_path, "train", 40, 1)
    support.write_posts(tmp_path, "valid", 20, 2)
    return tmp_path


# The bundle


@pytest.mark.parametrize("averaging", ["probabilities", "logits"])
def test_an_ensemble_is_the_mean_of_its_members(averaging: Averaging, tmp_path: Path) -> None:
    """Served from one bundle it equals the members, each served alone and averaged by hand."""
    members = [member(seed) for seed in range(3)]
    version = write(tmp_path / "all", model=Ensemble(members, averaging))
    found = sorted(str(p.relative_to(tmp_path / "all")) for p in (tmp_path / "all").rglob("*.*"))
    assert found == [
        "bundle.yaml",
        "labels.json",
        "members/1.safetensors",
        "members/2.safetensors",
        "model.safetensors",
    ]
    features = [support.features(f"p{i}", seed=i, lengths={"ocr": i % 2}) for i in range(7)]
    each = []
    for i, one in enumerate(members):
        write(tmp_path / str(i), model=one)
        each.append(Inferer.load(tmp_path / str(i)).scores(features).astype(np.float64))
    if averaging == "probabilities":
        wanted = np.mean(each, axis=0)
    else:
        wanted = 1 / (1 + np.exp(-np.mean([np.log(s / (1 - s)) for s in each], axis=0)))
    inferer = Inferer.load(tmp_path / "all")
    np.testing.assert_allclose(inferer.scores(features), wanted, atol=2e-6)
    assert np.abs(each[0] - each[1]).max() > 1e-3
    assert inferer.version == version
    assert len(bundle.load_bundle(tmp_path / "all").members) == 3


def test_sure_members_do_not_tie() -> None:
    """Probabilities that float32 rounds to 1 keep their order in the ensemble's logits."""
    logits = torch.tensor([[40.0, 50.0, -60.0], [30.0, 60.0, -70.0]])  # (members, tags)
    found = averaged(logits, "probabilities")
    assert torch.isfinite(found).all()
    assert found[1] > found[0] > 0 > found[2]
    p = torch.sigmoid(torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64))
    wanted = torch.logit(p.mean(dim=0))
    torch.testing.assert_close(averaged(torch.logit(p), "probabilities"), wanted)


def test_the_version_knows_every_member(tmp_path: Path) -> None:
    versions = [
        write(tmp_path / str(seed), model=Ensemble([member(0), member(seed)])) for seed in (1, 2)
    ]
    assert versions[0][-8:] != versions[1][-8:]


def test_a_member_that_is_missing_or_another_is_refused(tmp_path: Path) -> None:
    """The file is named; a bundle never answers with a part of its members."""
    folder = tmp_path / "b"
    write(folder, model=Ensemble([member(0), member(1)]))
    other = folder / "members" / "1.safetensors"
    shutil.copy(folder / "model.safetensors", other)
    with pytest.raises(BundleError, match=r"members/1.safetensors: is truncated, or not"):
        bundle.load_bundle(folder)
    other.unlink()
    with pytest.raises(BundleError, match=r"members/1.safetensors: is missing"):
        bundle.load_bundle(folder)


def test_a_bundle_of_before_ensembles_loads(tmp_path: Path) -> None:
    """Without the newer keys it is one model, with no subsets measured."""
    write(tmp_path / "b", subsets={"text": 0.5})
    assert bundle.load_bundle(tmp_path / "b").subsets == {"text": 0.5}
    about = tmp_path / "b" / "bundle.yaml"
    content = yaml.safe_load(about.read_text())
    for key in ("subsets", "averaging", "members_sha256"):
        del content[key]
    about.write_text(yaml.safe_dump(content))
    found = bundle.load_bundle(tmp_path / "b")
    assert (len(found.members), found.subsets) == (1, {})


# Training


@pytest.mark.parametrize("pool_valid", [True, False])
def test_folds_leak_nothing(pool_valid: bool, posts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No post that a fold's model learned from is close to one it scores; each is held out once."""
    by_fold: dict[str, set[str]] = {}
    original = Trainer.fit

    def fit(self: Trainer, objective: Any, data: TrainData, start: Any = None) -> Any:
        learned = by_fold.setdefault(self.last.parent.parent.name, set())
        rows = range(data.train_count)
        learned.update(data.train[row].post_id for row in rows)
        return original(self, objective, data, start)

    monkeypatch.setattr(Trainer, "fit", fit)
    run(
        posts,
        ensemble={"folds": 3, "pool_valid": pool_valid},
        trainer={"epochs": 1},
        report={"enabled": True, "subset_posts": 0},
    )
    lists = [PostList.read(posts / f"{n}.json", support.LABELS) for n in ("train", "valid")]
    pool = PostPool(lists if pool_valid else lists[:1])
    everything = {record.post_id for record in pool}
    assert list(by_fold) == ["fold-1", "fold-2", "fold-3"]
    left_out = [everything - learned for learned in by_fold.values()]
    assert sorted(i for some in left_out for i in some) == sorted(everything)
    assert all(abs(len(some) - len(everything) / 3) <= 3 for some in left_out)
    predictions = Predictions.load(posts / "run" / "latest" / "report" / "scores.npz")
    if pool_valid:
        # Rows are the folds one after another, each the posts that its model had not seen.
        ends = np.cumsum([0, *map(len, left_out)])
        for fold, some in enumerate(left_out):
            assert set(predictions.post_ids[ends[fold] : ends[fold + 1]]) == some
    else:
        assert list(predictions.post_ids) == [record.post_id for record in lists[1]]


def test_folds_are_scored_by_their_own_model(posts: Path) -> None:
    report = run(posts, ensemble={"folds": 3}, trainer={"epochs": 1}, report={"enabled": True})
    predictions = Predictions.load(posts / "run" / "latest" / "report" / "scores.npz")
    lists = [PostList.read(posts / f"{n}.json", support.LABELS) for n in ("train", "valid")]
    pool = PostPool(lists)
    ends, labels = pool.label_rows()
    parts = stratified_folds(ends, labels, support.CLASSES, 3, seed=0)
    whole = bundle.load_bundle(report.bundle)
    start = 0
    for fold, one in enumerate(whole.members):
        ids = [pool[row].post_id for row in np.flatnonzero(parts == fold).tolist()]
        write(posts / "one", model=one)
        features = [read_features(posts / "features", i, support.FINGERPRINTS) for i in ids]
        scores = Inferer.load(posts / "one").scores(features)
        here = slice(start, start + len(ids))
        assert list(predictions.post_ids[here]) == ids
        np.testing.assert_allclose(predictions.raw[here], scores, atol=1e-6)
        start += len(ids)
    assert report.metrics["gap"] == metrics.global_average_precision(
        predictions.scores, predictions.targets
    )
    assert len(predictions.post_ids) == 60


def test_a_killed_run_goes_on_with_its_fold(posts: Path) -> None:
    """Folds that are done are not trained again; the bundle is that of an undisturbed run."""
    wanted: dict[str, Any] = {"ensemble": {"folds": 3}, "trainer": {"epochs": 2}}
    run(posts, **wanted)
    whole = bundle.load_bundle(posts / "bundle")
    shutil.rmtree(posts / "run")

    class Killed(Exception):
        pass

    original = Trainer.fit
    epochs: list[str] = []

    def fit(self: Trainer, objective: Any, data: TrainData, start: Any = None) -> Any:
        fold = self.last.parent.parent.name
        if fold == "fold-2" and not epochs.count(fold):
            epochs.append(fold)
            raise Killed
        epochs.append(fold)
        return original(self, objective, data, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", fit)
        with pytest.raises(Killed):
            run(posts, **wanted)
        run(posts, resume=posts / "run", **wanted)
    assert epochs == ["fold-1", "fold-2", "fold-2", "fold-3"]
    again = bundle.load_bundle(posts / "bundle")
    assert again.metrics == whole.metrics
    for one, other in zip(again.members, whole.members, strict=True):
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key])
    with pytest.raises(ConfigError, match=r"had other posts, folds or settings"):
        run(posts, resume=posts / "run", ensemble={"folds": 4}, trainer={"epochs": 2})
    with pytest.raises(ConfigError, match="takes the folder of a k-fold run"):
        run(posts, resume=posts / "bundle", **wanted)


def test_snapshots_are_the_ends_of_the_cycles(posts: Path) -> None:
    """The bundle's members are the weights after each cycle, where the learning rate is lowest."""
    report = run(
        posts,
        ensemble={"snapshots": 2},
        trainer={"epochs": 4, "log_interval": 1},
        report={"enabled": True, "subset_posts": 0},
    )
    members = bundle.load_bundle(report.bundle).members
    assert len(members) == 2
    last = torch.load(posts / "run" / "latest" / "ckpt" / "last.pt", weights_only=True)["model"]
    for key, value in members[1].state_dict().items():
        assert torch.equal(value, last[key]), "the last snapshot is the end of the run"
    lines = (posts / "run" / "latest" / "log" / "train.jsonl").read_text().splitlines()
    steps = [e for e in map(json.loads, lines) if e["event"] == "step"]
    rates = [e["learning_rate"] for e in steps]
    end = next(i for i, e in enumerate(steps) if e["epoch"] == 3)
    # A line has the rate of the step that follows.
    assert rates[end - 2] < rates[end] / 2
    predictions = Predictions.load(posts / "run" / "latest" / "report" / "scores.npz")
    features = [
        read_features(posts / "features", i, support.FINGERPRINTS) for i in predictions.post_ids
    ]
    found = Inferer.load(report.bundle).scores(features)
    np.testing.assert_array_equal(found, predictions.scores)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"trainer": {"epochs": 5}}, "5 epochs are no multiple of 2"),
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


def test_more_folds_than_posts(posts: Path) -> None:
    with pytest.raises(ConfigError, match=r"ensemble.folds: 60 posts are too few for 31"):
        run(posts, ensemble={"folds": 31})


def test_files_of_a_fold_that_cannot_be_written(
    posts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fold_training, "write_whole", full)
    with pytest.raises(ConfigError, match=r"folds\.json: cannot be written: .*No space left"):
        run(posts, ensemble={"folds": 2}, trainer={"epochs": 1})
