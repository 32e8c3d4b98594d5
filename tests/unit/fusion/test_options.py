"""Options of the commands become settings; a mistake in them is one line."""

import json
from pathlib import Path
from typing import Any

import pytest

import infer_net
import train_net
from common.errors import ConfigError
from config.settings import InferSettings
from config.train import BackboneTrainSettings, TrainSettings
from fusion.infer.options import infer_settings
from fusion.train.options import train_settings
from tests.support.fusion import runs


def train_options(*options: str) -> TrainSettings:
    settings = train_settings(train_net.SCRIPT.read(options))
    assert isinstance(settings, TrainSettings)
    return settings


def test_folders_are_taken_as_they_are_written(tmp_path: Path) -> None:
    """A folder may be named by a number or a date, which YAML would make something else of."""
    (tmp_path / "empty.yaml").write_text("")
    config = str(tmp_path / "empty.yaml")
    trainer = train_options("--model_config", config, "--save_dir", "2026", "--epoch", "3").trainer
    assert (trainer.save_dir, trainer.epochs) == (Path("2026"), 3)
    asked = ["--infer_config", config, "--input", "x.json", "--best_model", "2026-01-31"]
    settings = infer_settings(infer_net.SCRIPT.read([*asked, "--n_gpus", "0"]))
    assert isinstance(settings, InferSettings)
    assert (settings.bundle, settings.n_gpus) == (Path("2026-01-31"), 0)


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (["--epoch", "0"], "trainer.epochs", 7),
        (["--epoch", "9", "--set", "trainer.epochs=2"], "trainer.epochs", 2),
        (["--set", "model.name=gmu"], "model.name", "gmu"),
        (["--fix_random_seed"], "trainer.fix_random_seed", True),
        (["--fix_random_seed", "True"], "trainer.fix_random_seed", True),
        (["--fix_random_seed", "False"], "trainer.fix_random_seed", False),
    ],
)
def test_options_go_over_the_file_and_set_over_options(
    options: list[str], key: str, value: Any, tmp_path: Path
) -> None:
    """An epoch of 0 takes the file's; a switch may be bare or have a value."""
    file = tmp_path / "c.yaml"
    file.write_text("{trainer: {epochs: 7}}")
    setting: Any = train_options("--model_config", str(file), *options)
    for name in key.split("."):
        setting = getattr(setting, name)
    assert setting == value


def test_the_task_chooses_what_is_trained(tmp_path: Path) -> None:
    """Options keep their keys for a backbone; a task that is none is one line."""
    for task, kind in (("fusion", TrainSettings), ("image_backbone", BackboneTrainSettings)):
        file = tmp_path / "c.yaml"
        file.write_text(json.dumps({"task": task}))
        options = ["--batch_size", "7", "--learning_rate", "0.5", "--epoch", "9", "--skip_bad"]
        options += ["--n_gpu", "0", "--valid_interval", "3", "--log_interval", "4"]
        settings = train_settings(train_net.SCRIPT.read(["--model_config", str(file), *options]))
        assert isinstance(settings, kind)
        assert (settings.trainer.batch_size, settings.trainer.epochs) == (7, 9)
        assert (settings.optimizer.learning_rate, settings.data.skip_bad) == (0.5, True)
        assert (settings.trainer.valid_interval, settings.trainer.log_interval) == (3, 4)
    with pytest.raises(ConfigError, match="task: must be one of fusion, image_backbone, video"):
        train_settings(train_net.SCRIPT.read(["--set", "task=magic"]))


def test_the_sample_config_is_whole() -> None:
    file = runs.ROOT / "config" / "train_config.yaml"
    assert train_options("--model_config", str(file)).bundle.name == "insight"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model_config", "none.yaml"], "none.yaml: no such file"),
        (["--batch_size", "many"], "options: trainer.batch_size"),
        (["--learning_rate", "-1"], "options: optimizer.learning_rate"),
        (["--n_gpu", "99"], "trainer.n_gpu: 99 GPUs requested, but this machine has"),
        (["--set", "trainer.epoch=3"], "unknown key; did you mean 'epochs'?"),
        (["--set", "model.name=magic"], "--set: model.name"),
        (["--set", "data.train=none.json", "--set", "data.labels=none.json"], "none.json"),
        (["--nothing"], "--nothing"),
    ],
)
def test_a_mistake_in_the_options_exits_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_net.main(arguments) == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert len(printed.splitlines()) == 1


def test_an_unknown_option_of_inference_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert infer_net.main(["--nothing"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
