"""Training from feature files to a bundle: it learns, and every switch does what it says."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import infer_net
import train_net
from common.post_set import PostSet
from config.fusion_models import DEFAULT_MODEL, ModelSettings
from fusion.bundle.about import read_about
from fusion.data.dataset import FeatureFiles
from fusion.infer.inferer import Inferer
from fusion.metrics import ranking as metrics
from fusion.models import MODELS, build_model, chosen
from fusion.train.checkpoint import model_signature
from fusion.train.losses import Objective, TaggingLoss
from fusion.train.prepare import HeldOut, prepare
from fusion.train.trainer import Trainer
from tests.support.fusion import runs, support

EPOCHS = {
    "concat_mlp": 12,
    "late": 20,
    "linear_probe": 1,
    "knn": 1,
    "tag_text": 40,
    "token_transformer": 8,
    "gmu": 8,
    "attention_lstm": 6,
}
ONE: dict[str, Any] = {"epochs": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "concat_mlp": {"loss": {"name": "focal", "focal": {"alpha": 0.5}}},
    "concat_se": {"model": {"concat_se": {"pooling": "nextvlad"}}},
    "gmu": {"loss": {"name": "asymmetric", "class_balance": 0.9}},
    "nextvlad_se": {"model": {"auxiliary": 1.0}},
    "attention_lstm": {},
    "mbt": {"loss": {"label_smoothing": 0.1}, "model": {"auxiliary": 0.3}},
    "ml_decoder": {"loss": {"name": "two_way"}},
    "late": {},
    "linear_probe": {"optimizer": {"ema_decay": 0.9}},
    "knn": {"optimizer": {"ema_decay": 0.9}},
    "tag_text": {},
    "token_transformer": {"loss": {"mixup": 0.3}, "optimizer": {"schedule": "one_cycle"}},
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_learns_and_is_served_as_it_was_measured(name: str, posts: Path) -> None:
    """Planted tags are found on new posts; the bundle's scores give the GAP of the training."""
    epochs = EPOCHS.get(name, 5)
    options: dict[str, Any] = {key: dict(value) for key, value in OPTIONS[name].items()}
    report = runs.run(
        posts,
        model={**options.pop("model", {}), "name": name},
        optimizer={**options.pop("optimizer", {}), "learning_rate": 0.01},
        trainer={"epochs": epochs, "valid_interval": 0},
        bundle={
            "calibration": "isotonic" if name in ("gmu", "mbt") else "temperature",
            "precision": 0.8,
            "min_positives": 3,
        },
        **options,
    )
    assert report.metrics["gap"] > 0.9
    events = runs.events(posts)
    assert report.version == events[-1]["version"]
    kinds = [event["event"] for event in events]
    assert (kinds.count("epoch"), kinds.count("valid")) == (epochs, 1)
    shares = [event["data_wait"] for event in events if event["event"] == "epoch"]
    assert 0 <= min(shares) <= report.data_wait <= max(shares) <= 1
    entries = json.loads((posts / "valid.json").read_text())
    files = FeatureFiles()
    features = [files.features(e["post_id"], posts / e["features"], None) for e in entries]
    predictions = Inferer.load(report.bundle).predict(features)
    truth = [[n in e["labels"] for n in support.LABELS.names] for e in entries]
    gap = metrics.global_average_precision([tags.scores for tags in predictions], truth)
    assert gap == pytest.approx(report.metrics["gap"], abs=1e-9)
    right = [truth[i][int(tag.id)] for i, tags in enumerate(predictions) for tag in tags.tags]
    assert np.mean(right) >= 0.8


def test_a_linear_probe_keeps_its_best_penalty(few_posts: Path) -> None:
    """One solution an epoch, each validated; a run that is resumed solves the rest."""
    model = {"name": "linear_probe", "linear_probe": {"penalties": [1e4, 1.0, 1e3]}}
    report = runs.run(few_posts, model=model, trainer={"epochs": 2, "valid_interval": 0})
    assert (report.epochs, report.best_epoch) == (2, 2)
    resumed = runs.run(few_posts, few_posts / "run", model=model, trainer={"epochs": 9})
    assert (resumed.epochs, resumed.best_epoch) == (3, 2)
    gaps = [event["gap"] for event in runs.events(few_posts) if event["event"] == "valid"]
    assert len(gaps) == 3
    assert max(gaps) == gaps[1]


def test_weights_of_neighbours_are_a_start_of_any_length(few_posts: Path) -> None:
    """Training posts are buffers: those of a checkpoint count, and not the ones of the model."""
    model = {"name": "knn", "knn": {"neighbours": [3]}}
    report = runs.run(few_posts, model=model, trainer=ONE)
    again = runs.run(few_posts, few_posts / "run", model=model, trainer={"epochs": 2})
    assert (report.epochs, again.epochs) == (1, 1)
    assert again.metrics["gap"] == report.metrics["gap"]
    runs.run(
        few_posts,
        few_posts / "bundle",
        model=model,
        trainer={**ONE, "save_dir": str(few_posts / "more")},
    )


@pytest.mark.parametrize(
    ("name", "own"),
    [
        (DEFAULT_MODEL, {}),
        ("late", {}),
        ("linear_probe", {}),
        ("linear_probe", {"alone": True}),
        ("linear_probe", {"alone": True, "unit": True, "calibrate": True}),
        ("knn", {}),
    ],
)
def test_modalities_together_are_no_worse(name: str, own: dict[str, Any], posts: Path) -> None:
    """At least the average of what each tells alone, which is that of the late model's heads."""
    options: dict[str, Any] = {"optimizer": {"learning_rate": 0.01}, "report": {"enabled": True}}
    model = {"name": name, name: own} if own else {"name": name}
    report = runs.run(posts, model=model, trainer={"epochs": 8}, **options)
    alone = [gap for subset, gap in read_about(report.bundle).subsets.items() if "+" not in subset]
    assert len(alone) == 5
    assert report.metrics["gap"] >= np.mean(alone)


def test_auto_takes_a_model_by_the_size_of_the_data() -> None:
    """Few posts without order are for the linear probe; a model that is named stays."""
    auto = ModelSettings(name="auto", auto_posts=100)
    assert chosen(auto, 99, ordered=False).name == "linear_probe"
    assert chosen(auto, 100, ordered=False).name == DEFAULT_MODEL
    assert chosen(auto, 99, ordered=True).name == DEFAULT_MODEL
    assert chosen(ModelSettings(name="gmu"), 9, ordered=False).name == "gmu"


def test_a_training_with_auto_writes_the_model_that_it_took(few_posts: Path) -> None:
    """Features of several frames have an order; a bundle names a model that can be built."""
    runs.run(few_posts, model={"name": "auto"}, trainer=ONE)
    assert read_about(few_posts / "bundle").model.name == DEFAULT_MODEL
    runs.run(few_posts, model={"name": "auto"}, trainer=ONE, data={"modalities": ["image"]})
    assert read_about(few_posts / "bundle").model.name == "linear_probe"


def test_training_and_inference_agree(few_posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All options of training; then GAP of validation, inference and the written scores agree."""
    folder = few_posts
    options = ["--model_config", str(runs.config_file(folder)), "--batch_size", "12"]
    options += ["--learning_rate", "4e-3", "--n_gpu", "0", "--epoch", "4"]
    options += ["--save_dir", str(folder / "run"), "--valid_interval", "2", "--log_interval", "2"]
    options += ["--fix_random_seed", "True", "--set", "trainer.progress=true"]
    assert train_net.main(options) == 0
    said, told = capsys.readouterr()
    [log] = re.findall(r"(?m)^log: (.*)", told)  # before the first epoch, whoever looks on
    assert Path(log).is_file()
    assert f"bundle {folder / 'bundle'}" in said
    assert "waiting for data" in said
    events = runs.events(folder)
    assert [e["epoch"] for e in events if e["event"] == "valid"] == [2, 4]
    assert {e["step"] for e in events if e["event"] == "step"} == {2}
    gap = next(e for e in reversed(events) if e["event"] == "bundle")["gap"]

    (folder / "infer.yaml").write_text(f"progress: false\nfeatures: {folder / 'features'}\n")
    arguments = ["--infer_config", str(folder / "infer.yaml"), "--n_gpus", "0"]
    arguments += ["--best_model", str(folder / "bundle")]
    output = folder / "out" / "tags.jsonl"
    again = [*arguments, "--input", str(folder / "valid.json"), "--output", str(output)]
    assert infer_net.main(again) == 0
    assert f"gap {gap:.4f}" in capsys.readouterr().out
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    targets = [[name in line["labels"] for name in support.LABELS.names] for line in lines]
    scores = [line["scores"] for line in lines]
    assert metrics.global_average_precision(scores, targets) == pytest.approx(gap, abs=1e-9)

    listed = [lines[0]["post_id"], json.loads((folder / "valid.json").read_text())[1]["features"]]
    (folder / "list.txt").write_text("\n".join(listed) + "\n\n")
    assert infer_net.main([*arguments, "--input", str(folder / "list.txt")]) == 0
    listed_lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [f["post_id"] for f in listed_lines] == [line["post_id"] for line in lines[:2]]
    np.testing.assert_allclose(listed_lines[0]["scores"], scores[0], atol=1e-5)
    assert "labels" not in listed_lines[0]


# Switches


@pytest.mark.usefixtures("quick_processes")
def test_a_fixed_seed_gives_the_same_weights_and_another_seed_others(few_posts: Path) -> None:
    """Bit-equal on a CPU, also when another process reads; without a fixed seed they differ."""
    states = []
    for trainer, loaders in (({}, 0), ({}, 1), ({"fix_random_seed": False}, 0)):
        runs.run(few_posts, trainer={**ONE, **trainer}, data={"loaders": loaders, "valid": None})
        states.append(runs.weights(few_posts))
    assert runs.equal(states[0], states[1])
    assert not runs.equal(states[0], states[2])


def test_early_stopping(few_posts: Path) -> None:
    still = {"learning_rate": 1e-9}
    assert runs.run(few_posts, trainer={"epochs": 30, "patience": 2}, optimizer=still).epochs <= 6


def test_without_validation(few_posts: Path) -> None:
    """The last epoch is kept, thresholds are 0.5, and early stopping does not apply."""
    report = runs.run(few_posts, data={"valid": None}, trainer={"epochs": 2, "patience": 1})
    assert (report.epochs, report.best_epoch, report.metrics) == (2, 2, {})


def test_images_as_frames_train_in_bfloat16(few_posts: Path) -> None:
    """The bundle remembers the switch and both fingerprints; its weights are whole."""
    trainer = {**ONE, "precision": "bf16"}
    report = runs.run(few_posts, data={"image_as_frames": True}, trainer=trainer)
    inferer = Inferer.load(report.bundle)
    assert inferer.image_as_frames
    assert inferer.fingerprints == support.FINGERPRINTS
    state = load_file(report.bundle / "model.safetensors")
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float32}


def test_tensorboard_gets_one_curve_of_a_run_that_goes_on(few_posts: Path) -> None:
    for epochs, resume in ((1, None), (2, few_posts / "run")):
        runs.run(few_posts, resume, trainer={"log_interval": 1, "epochs": epochs})
    curves = EventAccumulator(str(few_posts / "run" / "latest" / "log" / "tensorboard"))
    curves.Reload()
    steps = [point.step for point in curves.Scalars("step/loss")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(curves.Scalars("valid/gap")) == 2


def test_an_epoch_of_accumulated_batches_takes_fewer_steps(few_posts: Path) -> None:
    """The schedule ends where the run does: 37 posts by 8, three together, are two steps."""
    options = {"accumulate": 3, "warm_up": 0.0, "learning_rate": 0.01}
    runs.run(few_posts, optimizer=options, trainer={"epochs": 2, "batch_size": 8})
    schedule = runs.checkpoint(few_posts)["schedule"]
    assert schedule["last_epoch"] == 4
    assert schedule["_last_lr"][0] == pytest.approx(0, abs=1e-9)


def test_the_end_of_an_epoch_can_be_watched(few_posts: Path) -> None:
    """The watcher gets the averaged weights of each epoch, which are those that are validated."""
    seen: list[tuple[int, runs.State]] = []

    def watch(epoch: int, model: torch.nn.Module) -> None:
        seen.append((epoch, {k: v.detach().clone() for k, v in model.state_dict().items()}))

    settings = support.train_settings(
        few_posts, trainer={"epochs": 3}, optimizer={"ema_decay": 0.9}
    )
    fabric = Fabric(accelerator="cpu", devices=1)
    prepared = prepare(settings, FeatureFiles(), fabric)
    mark = model_signature(settings.model, prepared.manifest, prepared.schema, prepared.labels)
    data = prepared.data(settings, prepared.posts, HeldOut(prepared.valid), PostSet())
    torch.manual_seed(0)
    model = build_model(prepared.schema, settings.model)
    trainer = Trainer(
        fabric, settings.trainer, settings.optimizer, signature=mark, seed=0, on_epoch_end=watch
    )
    loss = TaggingLoss(settings.loss, torch.ones(support.CLASSES))
    progress = trainer.fit(Objective(model, loss), data)
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    assert runs.equal(dict(model.state_dict()), seen[progress.best_epoch - 1][1])
    assert runs.equal(torch.load(trainer.last, weights_only=True)["average"]["state"], seen[-1][1])
