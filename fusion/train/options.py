"""Options of `train_net.py`; imports no torch, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.cli import OneLineParser
from common.errors import ConfigError
from config.cli import add_set, given_options, layered
from config.load import merge, parse_overrides, read_yaml
from config.train import BackboneTrainSettings, TrainSettings

TRAIN_CONFIG = Path("config/train_config.yaml")

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
}


def train_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of `train_net.py`."""
    parser = OneLineParser(
        prog="train_net.py",
        description="Train a fusion model on feature files and write its bundle; or a backbone.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_config", type=Path, metavar="F", help=f"YAML file; default {TRAIN_CONFIG}")
    add("--batch_size", metavar="N", help="posts in a training batch")
    add("--learning_rate", metavar="X", help="peak learning rate")
    add(
        "--resume",
        type=Path,
        metavar="F",
        help="a run's folder or checkpoint to go on from; or weights: best.pt, a bundle, a .pth",
    )
    add("--n_gpu", metavar="N", help="number of GPUs; 0 trains on the CPU")
    add("--epoch", metavar="N", help="number of epochs; 0 takes the config's")
    add("--save_dir", type=Path, metavar="DIR", help="folder of the runs; latest leads to one")
    add("--valid_interval", metavar="N", help="epochs between validations; 0 only at the end")
    add("--log_interval", metavar="N", help="batches between two lines of the log")
    add(
        "--fix_random_seed",
        nargs="?",
        const="true",
        metavar="BOOL",
        help="the same seed in every run",
    )
    add(
        "--skip_bad",
        nargs="?",
        const="true",
        metavar="BOOL",
        help="leave out posts that cannot be used, and list them in log/skipped.jsonl",
    )
    add_set(parser)
    return parser.parse_args(arguments)


def train_settings(options: argparse.Namespace) -> TrainSettings | BackboneTrainSettings:
    """Settings of a training: the YAML file, then the options, then ``--set``.

    The file's ``task`` tells what is trained, and with it which keys there are.

    Raises:
        ConfigError: One line that names the file or option, the key and the mistake.
    """
    given = given_options(options, _TRAIN_KEYS)
    if options.save_dir is not None:
        given = merge(given, {"trainer": {"save_dir": options.save_dir}})
    if given.get("trainer", {}).get("epochs") == 0:
        del given["trainer"]["epochs"]
    path = options.model_config
    return layered(_task(path, options.set), path, TRAIN_CONFIG, given, options.set)


def _task(path: Path | None, sets: list[str]) -> type[TrainSettings | BackboneTrainSettings]:
    file = path or TRAIN_CONFIG
    from_file = read_yaml(file) if path is not None or file.exists() else {}
    task = merge(from_file, parse_overrides(sets)).get("task", "fusion")
    if not isinstance(task, str) or task not in _TASKS:
        raise ConfigError(f"{file}: task: must be one of {', '.join(_TASKS)}")
    return _TASKS[task]
