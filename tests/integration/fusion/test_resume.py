"""A run that was interrupted goes on as if it had not been; weights begin a new run."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_net
from common.errors import ConfigError
from config.train import TrainSettings
from fusion.bundle.bundle import load_bundle
from fusion.data.dataset import FeatureFiles
from fusion.train.run_log import RunLog
from fusion.train.training import train
from tests.support import forked
from tests.support.fusion import runs, support

STATE = ("progress", "model", "optimizer", "schedule", "average")


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
def test_a_run_resumes_exactly(name: str, few_posts: Path) -> None:
    finals = []
    for interrupted in (False, True):
        folder = few_posts / str(interrupted)
        trainer = {"epochs": 2, "batch_size": 6, "save_dir": str(folder)}
        settings = support.train_settings(few_posts, **RUNS[name], trainer=trainer)
        if interrupted:
            interrupt(settings, epoch=2, step=1)
            torch.manual_seed(999)  # what the interrupted process had drawn is lost
        train(settings, FeatureFiles(), resume=folder if interrupted else None)
        bundle = load_file(few_posts / "bundle" / "model.safetensors")
        finals.append((runs.checkpoint(few_posts, str(interrupted)), bundle))
    assert runs.same(*finals)


def test_a_run_that_is_killed_goes_on_exactly(few_posts: Path) -> None:
    """Killed with SIGKILL at a random step; weights, optimizer, average and bundle are bit-equal.

    With moving average, accumulation, mixup, dropout, and checkpoints inside the epochs.
    """
    trainer = {"epochs": 4, "batch_size": 4, "log_interval": 1, "tensorboard": False}
    sections: dict[str, Any] = {
        "optimizer": {"ema_decay": 0.9, "accumulate": 2},
        "loss": {"mixup": 0.4},
        "model": {"modality_dropout": 0.2, "token_transformer": {"dropout": 0.1}},
    }
    runs.run(few_posts, **sections, trainer={**trainer, "save_dir": str(few_posts / "whole")})
    bundle = load_file(few_posts / "bundle" / "model.safetensors")

    interrupted = {**sections, "trainer": {**trainer, "checkpoint_interval": 2}}
    command = ["--model_config", str(runs.config_file(few_posts, **interrupted))]
    process = forked.start(train_net.main, command)
    log = few_posts / "run" / "latest" / "log" / "train.jsonl"
    steps = random.Random().randint(3, 12)  # of 20; behind the first checkpoint
    deadline = time.monotonic() + 240
    try:
        while not log.exists() or log.read_text().count('"event": "step"') < steps:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.join()
    stands = runs.checkpoint(few_posts)["progress"]
    assert stands["epoch"] < 4, "it was killed before its end"
    runs.run(few_posts, few_posts / "run", **interrupted)
    one, other = runs.checkpoint(few_posts, "whole"), runs.checkpoint(few_posts)
    for part in STATE:
        assert runs.same(one[part], other[part]), f"{part}: killed after {steps} steps ({stands})"
    assert runs.equal(bundle, load_file(few_posts / "bundle" / "model.safetensors"))
    [resumed] = [e for e in runs.events(few_posts) if e["event"] == "resumed"]
    assert resumed["step"] % 2 == 0


def test_a_run_goes_on_in_another_folder(few_posts: Path) -> None:
    """The best weights so far come along, also when no later epoch is better."""
    runs.run(few_posts, trainer={"epochs": 2})
    first = load_file(few_posts / "bundle" / "model.safetensors")
    last = few_posts / "run" / "latest" / "ckpt" / "last.pt"
    other = {"save_dir": str(few_posts / "other"), "epochs": 2}
    report = runs.run(few_posts, resume=last, trainer=other)
    assert runs.equal(first, load_file(few_posts / "bundle" / "model.safetensors"))
    assert (few_posts / "other" / "latest" / "ckpt" / "best.pt").exists()
    assert report.epochs == 2
    runs.run(few_posts, resume=few_posts / "run", trainer={**other, "epochs": 3})
    done = [e["epoch"] for e in runs.events(few_posts, "other") if e["event"] == "epoch"]
    assert done == [3], "epochs that are done are not done again"


def test_another_optimizer_does_not_go_on(few_posts: Path) -> None:
    """Adam's state would be taken for AdamW's without a word; other groups do not fit either."""
    run, one = few_posts / "run", {"epochs": 1}
    runs.run(few_posts, optimizer={"name": "adam"}, trainer=one)
    for name in ("adamw", "sgd"):
        with pytest.raises(ConfigError, match=f"made with optimizer adam, this run has {name}"):
            runs.run(few_posts, run, optimizer={"name": name}, trainer=one)
    groups = {"name": "adam", "group_rates": {"head": 0.1}}
    with pytest.raises(ConfigError, match="its optimizer does not fit this run"):
        runs.run(few_posts, run, optimizer=groups, trainer=one)


# Weights


def test_weights_begin_a_new_run(few_posts: Path) -> None:
    """From every kind of file, at epoch 1, with just these: with a rate of almost 0 they stay."""
    runs.run(few_posts, trainer={"epochs": 1})
    start = (few_posts / "bundle").rename(few_posts / "old")
    state = load_bundle(start).model.state_dict()
    save_file(state, few_posts / "plain.safetensors")
    legacy = {"state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save(legacy, few_posts / "weights.pth")
    best = (few_posts / "run" / "latest" / "ckpt" / "best.pt").resolve()
    still = {"learning_rate": 1e-12, "weight_decay": 0.0}
    files = ("plain.safetensors", "weights.pth", "old/model.safetensors")
    for number, path in enumerate([best, start, *(few_posts / file for file in files)]):
        trainer = {"epochs": 1, "save_dir": str(few_posts / str(number))}
        runs.run(few_posts, path, optimizer=still, trainer=trainer)
        assert runs.apart(state, runs.weights(few_posts, str(number))) < 1e-6, path
        events = runs.events(few_posts, str(number))
        assert [e["epoch"] for e in events if e["event"] == "epoch"] == [1], path


def test_what_does_not_fit_is_one_line(few_posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.run(few_posts, trainer={"epochs": 1})
    save_file({"x": torch.zeros(1)}, few_posts / "plain.safetensors")
    other = runs.config_file(few_posts, model={"name": "gmu"})
    bad = {
        "bundle": "made with another model",
        "bundle/model.safetensors": "made with another model",
        "run": "made with another model",
        "plain.safetensors": "does not fit this model",
        "none": "no such checkpoint",
        "none.pth": "none.pth",
    }
    for path, says in bad.items():
        capsys.readouterr()
        options = ["--model_config", str(other), "--resume", str(few_posts / path)]
        assert train_net.main(options) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert says in said[0]
