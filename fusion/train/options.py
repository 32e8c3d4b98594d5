"""Options of `train_net.py`; imports no torch, so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

from common.cli import Overrides, option
from common.errors import ConfigError
from config.load import given_options, layered, parse_overrides, read_yaml
from config.presets import merge
from config.train import BackboneTrainSettings, TrainSettings

TRAIN_CONFIG = Path("config/train_config.yaml")
Text: TypeAlias = str | None

_TRAIN_KEYS = {
    "batch_size": "trainer.batch_size",
    "learning_rate": "optimizer.learning_rate",
    "n_gpu": "trainer.n_gpu",
    "epoch": "trainer.epochs",
    "valid_interval": "trainer.valid_interval",
    "log_interval": "trainer.log_interval",
    "fix_random_seed": "trainer.fix_random_seed",
    "skip_bad": "data.skip_bad",
}
_TASKS: dict[str, type[TrainSettings | BackboneTrainSettings]] = {
    "fusion": TrainSettings,
    "image_backbone": BackboneTrainSettings,
    "video_backbone": BackboneTrainSettings,
    "audio_backbone": BackboneTrainSettings,
    "text_backbone": BackboneTrainSettings,
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The command line of `train_net.py`; the settings check the values."""

    model_config: Annotated[
        Path | None, option(f"YAML file; default {TRAIN_CONFIG}", "F", "--config", "--model_config")
    ] = None
    batch_size: Annotated[Text, option("posts in a training batch", "N", "--batch_size")] = None
    learning_rate: Annotated[Text, option("peak learning rate", "X", "--learning_rate")] = None
    resume: Annotated[
        Path | None,
        option(
            "a run's folder or checkpoint to resume; or starting weights: best.pt, bundle, .pth",
            "F",
            "--resume",
        ),
    ] = None
    n_gpu: Annotated[
        Text, option("number of GPUs; 0 trains on the CPU", "N", "--gpus", "--n_gpu", "--n_gpus")
    ] = None
    epoch: Annotated[
        Text, option("number of epochs; 0 takes the config's", "N", "--epochs", "--epoch")
    ] = None
    save_dir: Annotated[
        Path | None,
        option("folder of the runs; latest points to the newest", "DIR", "--out", "--save_dir"),
    ] = None
    valid_interval: Annotated[
        Text, option("epochs between validations; 0 only at the end", "N", "--valid_interval")
    ] = None
    log_interval: Annotated[
        Text, option("batches between two log lines", "N", "--log_interval")
    ] = None
    fix_random_seed: Annotated[
        Text, option("the same seed in every run", "[BOOL]", "--fix_random_seed")
    ] = None
    skip_bad: Annotated[
        Text,
        option(
            "leave out posts that cannot be used, and list them in log/skipped.jsonl",
            "[BOOL]",
            "--skip_bad",
        ),
    ] = None
    overrides: Overrides


def train_settings(options: TrainOptions) -> TrainSettings | BackboneTrainSettings:
    """Return the settings of a training: the YAML file, then the options, then ``--set``.

    The file's ``task`` tells what is trained, and with it which keys there are.
    """
    overrides = given_options(options, _TRAIN_KEYS)
    if options.save_dir is not None:
        overrides = merge(overrides, {"trainer": {"save_dir": options.save_dir}})
    if overrides.get("trainer", {}).get("epochs") == 0:
        del overrides["trainer"]["epochs"]
    path = options.model_config
    return layered(_task(path, options.overrides), path, TRAIN_CONFIG, overrides, options.overrides)


def _task(path: Path | None, sets: list[str]) -> type[TrainSettings | BackboneTrainSettings]:
    file = path or TRAIN_CONFIG
    from_file = read_yaml(file) if path is not None or file.exists() else {}
    task = merge(from_file, parse_overrides(sets)).get("task", "fusion")
    if not isinstance(task, str) or task not in _TASKS:
        raise ConfigError(f"{file}: task: must be one of {', '.join(_TASKS)}")
    return _TASKS[task]
