"""A run that was interrupted goes on as if it had not been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.errors import ConfigError
from config.train import TrainSettings
from fusion.data.dataset import FeatureFiles
from fusion.train.run_log import RunLog
from fusion.train.training import train
from tests.support.fusion import runs, support


class InterruptedRun(Exception):
    """Stands for a kill: nothing of the run goes on."""


def interrupt(settings: TrainSettings, epoch: int, step: int) -> None:
    """Train, and break off in the midst of a step: everything since the last checkpoint is lost."""
    original = RunLog.write

    def write(log: RunLog, event: str, **values: Any) -> None:
        original(log, event, **values)
        if event == "step" and (values["epoch"], values["step"]) == (epoch, step):
            raise InterruptedRun

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "write", write)
        often = settings.trainer.model_copy(update={"log_interval": 1})
        with pytest.raises(InterruptedRun):
            train(settings.model_copy(update={"trainer": often}), FeatureFiles())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_resumed_run_ends_with_the_same_weights(ema: float, posts: Path) -> None:
    options: dict[str, Any] = {"optimizer": {"ema_decay": ema}, "trainer": {"epochs": 4}}
    runs.run(posts, **options)
    whole = runs.weights(posts)
    best = load_file(posts / "bundle" / "model.safetensors")

    settings = support.train_settings(
        posts, **{**options, "trainer": {"epochs": 4, "save_dir": str(posts / "second")}}
    )
    interrupt(settings, epoch=3, step=4)
    torch.manual_seed(12345)  # what the interrupted process had drawn is lost
    train(settings, FeatureFiles(), resume=posts / "second")
    resumed = torch.load(posts / "second" / "latest" / "ckpt" / "last.pt", weights_only=True)
    assert resumed["progress"]["epoch"] == 4
    assert runs.equal(whole, resumed["model"])
    assert runs.equal(best, load_file(posts / "bundle" / "model.safetensors"))


def test_a_run_goes_on_in_another_folder(posts: Path) -> None:
    """The best weights so far come along, also when no later epoch is better."""
    runs.run(posts, trainer={"epochs": 3})
    first = load_file(posts / "bundle" / "model.safetensors")
    other = {"save_dir": str(posts / "other"), "epochs": 3}
    report = runs.run(posts, resume=posts / "run" / "latest" / "ckpt" / "last.pt", trainer=other)
    assert runs.equal(first, load_file(posts / "bundle" / "model.safetensors"))
    assert (posts / "other" / "latest" / "ckpt" / "best.pt").exists()
    assert report.epochs == 3


def test_a_best_checkpoint_is_a_start_of_a_new_run(posts: Path) -> None:
    """It holds weights and no optimizer: training begins at epoch one, further along."""
    runs.run(posts, trainer={"epochs": 4})
    losses = [e["loss"] for e in runs.events(posts) if e["event"] == "epoch"]
    report = runs.run(
        posts, resume=posts / "run" / "latest" / "ckpt" / "best.pt", trainer={"epochs": 1}
    )
    again = [e["loss"] for e in runs.events(posts) if e["event"] == "epoch"]
    assert report.epochs == 1
    assert again[-1] < losses[0]


RUNS: dict[str, dict[str, Any]] = {
    "adam one-cycle": {
        "model": {"name": "nextvlad_se"},
        "optimizer": {"name": "adam", "schedule": "one_cycle", "weight_decay": 0.0},
        "loss": {"name": "focal"},
    },
    "sgd steps accumulated": {
        "model": {"name": "attention_lstm"},
        "optimizer": {
            "name": "sgd",
            "schedule": "step",
            "accumulate": 2,
            "learning_rate": 0.05,
            "group_rates": {"modality": 0.01},
        },
        "loss": {"name": "asymmetric", "label_smoothing": 0.1},
    },
    "rmsprop constant": {
        "model": {"name": "gmu"},
        "optimizer": {"name": "rmsprop", "schedule": "constant", "gradient_clip": None},
        "loss": {"class_balance": 0.9},
    },
    "adamw with everything": {
        "model": {"name": "mbt", "auxiliary": 0.5},
        "optimizer": {"layer_decay": 0.8, "accumulate": 3, "ema_decay": 0.9},
        "loss": {"mixup": 0.5},
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_every_optimizer_resumes_exactly(name: str, tmp_path: Path) -> None:
    for file, count in (("train", 40), ("valid", 16)):
        support.write_posts(tmp_path, file, count, 1)
    finals = []
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        given = support.train_settings(
            tmp_path,
            **RUNS[name],
            trainer={"epochs": 4, "batch_size": 8, "save_dir": str(folder)},
        )
        if interrupted:
            interrupt(given, epoch=3, step=2)
            torch.manual_seed(999)
        train(given, FeatureFiles(), resume=folder if interrupted else None)
        finals.append(torch.load(folder / "latest" / "ckpt" / "last.pt", weights_only=True))
    assert runs.same(*finals)


def test_another_optimizer_does_not_go_on(tmp_path: Path) -> None:
    """Adam's state would be taken for AdamW's without a word; other groups do not fit either."""
    for file, count in (("train", 16), ("valid", 8)):
        support.write_posts(tmp_path, file, count, 1)

    def run(resume: Path | None = None, **optimizer: Any) -> None:
        given = support.train_settings(tmp_path, optimizer=optimizer, trainer={"epochs": 1})
        train(given, FeatureFiles(), resume=resume)

    run(name="adam")
    for name in ("adamw", "sgd"):
        with pytest.raises(ConfigError, match=f"made with optimizer adam, this run has {name}"):
            run(tmp_path / "run", name=name)
    with pytest.raises(ConfigError, match="its optimizer does not fit this run"):
        run(tmp_path / "run", name="adam", group_rates={"head": 0.1})
    run(tmp_path / "run", name="adam")
