"""Training from feature files to a bundle: it learns, and every switch does what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file

from fusion.data.dataset import FeatureFiles, PostDataset
from fusion.data.posts import PostList
from fusion.infer.inferer import Inferer
from fusion.metrics import ranking as metrics
from fusion.metrics.thresholds import best_f1_threshold, fit_thresholds
from fusion.models import build_model
from fusion.train.checkpoint import model_signature
from fusion.train.losses import TaggingLoss, binary_cross_entropy
from fusion.train.objective import Objective
from fusion.train.prepare import prepare
from fusion.train.trainer import Trainer
from tests.support.fusion import runs, support


@pytest.mark.parametrize("name", ["token_transformer", "concat_se"])
def test_it_learns_and_writes_a_bundle(name: str, posts: Path) -> None:
    """Tags whose evidence is planted in five modalities are found on posts never seen."""
    epochs = {"token_transformer": 8, "concat_se": 14}[name]
    report = runs.run(posts, model={"name": name}, trainer={"epochs": epochs})
    assert report.metrics["gap"] > 0.9
    assert report.version == runs.events(posts)[-1]["version"]
    assert (report.bundle / "bundle.yaml").exists()
    events = [e["event"] for e in runs.events(posts)]
    assert events.count("epoch") == events.count("valid") == epochs


def test_a_fixed_seed_gives_the_same_weights_and_another_seed_others(posts: Path) -> None:
    """Two runs are bit-equal on a CPU; without a fixed seed they differ."""
    runs.run(posts, trainer={"epochs": 1})
    first = runs.weights(posts)
    runs.run(posts, trainer={"epochs": 1})
    assert runs.equal(first, runs.weights(posts))
    runs.run(posts, trainer={"epochs": 1, "fix_random_seed": False})
    assert not runs.equal(first, runs.weights(posts))


def test_early_stopping(posts: Path) -> None:
    report = runs.run(
        posts,
        trainer={"epochs": 30, "patience": 2},
        optimizer={"learning_rate": 1e-9},
    )
    assert report.epochs <= 6


def test_without_validation(posts: Path) -> None:
    """The last epoch is kept, thresholds are 0.5, and early stopping does not apply."""
    report = runs.run(posts, data={"valid": None}, trainer={"epochs": 2, "patience": 1})
    assert (report.epochs, report.best_epoch, report.metrics) == (2, 2, {})


def test_bfloat16_trains(posts: Path) -> None:
    report = runs.run(posts, trainer={"epochs": 1, "precision": "bf16"})
    state = load_file(report.bundle / "model.safetensors")
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float32}


def test_images_as_frames_train(posts: Path) -> None:
    """The bundle remembers the switch, and both fingerprints."""
    report = runs.run(posts, data={"image_as_frames": True}, trainer={"epochs": 1})
    inferer = Inferer.load(report.bundle)
    assert inferer.image_as_frames
    assert inferer.fingerprints == support.FINGERPRINTS


@pytest.mark.slow
def test_loader_processes_read_the_same(posts: Path) -> None:
    runs.run(posts, trainer={"epochs": 1})
    first = runs.weights(posts)
    runs.run(posts, trainer={"epochs": 1}, data={"loaders": 1})
    assert runs.equal(first, runs.weights(posts))


def test_the_loss_is_the_logits_form() -> None:
    """It equals the definition in float64 and stays finite where probabilities would not."""
    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, generator=chance)
    targets = (torch.rand(7, 5, generator=chance) < 0.4).float()
    p = torch.sigmoid(logits.double())
    wanted = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    assert float(binary_cross_entropy(logits, targets)) == pytest.approx(float(wanted), abs=1e-6)
    assert float(binary_cross_entropy(torch.tensor([[200.0]]), torch.tensor([[0.0]]))) == 200.0


def test_a_threshold_lies_between_what_it_parts() -> None:
    """The best F1 by trying every threshold, and midway between the two scores beside it."""
    chance = np.random.default_rng(0)
    for _ in range(20):
        scores, targets = chance.random(40), chance.random(40) < 0.4
        found = best_f1_threshold(scores, targets)
        tried = [metrics.f1_scores(scores[:, None], targets[:, None], t).micro for t in scores]
        here = metrics.f1_scores(scores[:, None], targets[:, None], found).micro
        assert here >= max(tried) - 1e-12 or found in (0.05, 0.95)
    assert best_f1_threshold([0.9, 0.8, 0.3, 0.2], [1, 1, 0, 0]) == pytest.approx(0.55)
    assert best_f1_threshold([0.9, 0.8], [0, 0]) == 0.5


def test_rare_tags_take_the_common_threshold() -> None:
    scores = np.array([[0.9, 0.2], [0.8, 0.1], [0.3, 0.15], [0.2, 0.05]])
    targets = np.array([[1, 1], [1, 0], [0, 0], [0, 0]])
    fitted = fit_thresholds(scores, targets, min_positives=2)
    assert fitted[0] == pytest.approx(0.55)
    assert fitted[1] == pytest.approx(best_f1_threshold(scores, targets), abs=1e-6)
    own = fit_thresholds(scores, targets, min_positives=1)
    assert own[1] == pytest.approx(0.175)


def test_the_end_of_an_epoch_can_be_watched(few_posts: Path) -> None:
    """Whoever asks sees the averaged weights of each epoch, which are those that are validated."""
    seen: list[tuple[int, runs.State]] = []

    def watch(epoch: int, model: torch.nn.Module) -> None:
        seen.append((epoch, {k: v.detach().clone() for k, v in model.state_dict().items()}))

    settings = support.train_settings(
        few_posts, trainer={"epochs": 3}, optimizer={"ema_decay": 0.9}
    )
    fabric = Fabric(accelerator="cpu", devices=1)
    prepared = prepare(settings, FeatureFiles(), fabric)
    mark = model_signature(settings.model, prepared.manifest, prepared.schema, prepared.labels)
    data = prepared.data(settings, prepared.posts, prepared.valid)
    torch.manual_seed(0)
    model = build_model(prepared.schema, settings.model)
    trainer = Trainer(
        fabric, settings.trainer, settings.optimizer, signature=mark, seed=0, on_epoch_end=watch
    )
    loss = TaggingLoss(settings.loss, torch.ones(support.CLASSES))
    progress = trainer.fit(Objective(model, loss), data)
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    assert runs.equal(dict(model.state_dict()), seen[progress.best_epoch - 1][1])
    average = torch.load(trainer.last, weights_only=True)["average"]["state"]
    assert runs.equal(average, seen[-1][1])


def test_kept_features_stay_within_their_budget(few_posts: Path) -> None:
    """A post that does not fit is read anew each time; what comes is the same."""

    class Counting(FeatureFiles):
        reads = 0

        def features(self, *given: Any) -> Any:
            Counting.reads += 1
            return super().features(*given)

    posts = PostList.read(few_posts / "train.json", support.LABELS)
    for cache_mb, reads in ((0, 74), (1, 37)):
        Counting.reads = 0
        build = PostDataset(
            posts, Counting(), support.manifest(), support.schema(), cache_mb=cache_mb
        )
        first, again = ([build[i] for i in range(37)] for _ in range(2))
        assert Counting.reads == reads
        for one, other in zip(first, again, strict=True):
            assert one.post_id == other.post_id
            assert one.arrays.keys() == other.arrays.keys()
            assert all(np.array_equal(one.arrays[s], other.arrays[s]) for s in one.arrays)
