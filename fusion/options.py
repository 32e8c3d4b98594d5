"""Options of `train_net.py` and `infer_net.py`; imports no torch, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from config.load import merge, parse_overrides, read_yaml, validate
from config.options import OneLineParser
from config.train import InferSettings, TrainSettings

Chosen = TypeVar("Chosen", TrainSettings, InferSettings)

TRAIN_CONFIG = Path("config/train_config.yaml")
INFER_CONFIG = Path("config/infer_config.yaml")

_TRAIN_KEYS = {
    "batch_size": "trainer.batch_size",
    "learning_rate": "optimizer.learning_rate",
    "n_gpu": "trainer.n_gpu",
    "epoch": "trainer.epochs",
    "valid_interval": "trainer.valid_interval",
    "log_interval": "trainer.log_interval",
    "fix_random_seed": "trainer.fix_random_seed",
}
_INFER_KEYS = {"n_gpus": "n_gpus"}


def train_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of `train_net.py`."""
    parser = OneLineParser(
        prog="train_net.py",
        description="Train a fusion model on feature files and write its bundle.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_config", type=Path, metavar="F", help=f"YAML file; default {TRAIN_CONFIG}")
    add("--batch_size", metavar="N", help="posts in a training batch")
    add("--learning_rate", metavar="X", help="peak learning rate")
    add("--resume", type=Path, metavar="F", help="checkpoint to go on from, or a run's folder")
    add("--n_gpu", metavar="N", help="number of GPUs; 0 trains on the CPU")
    add("--epoch", metavar="N", help="number of epochs; 0 takes the config's")
    add("--save_dir", type=Path, metavar="DIR", help="folder for ckpt/ and log/")
    add("--valid_interval", metavar="N", help="epochs between validations; 0 only at the end")
    add("--log_interval", metavar="N", help="batches between two lines of the log")
    add(
        "--fix_random_seed",
        nargs="?",
        const="true",
        metavar="BOOL",
        help="the same seed in every run",
    )
    _add_set(parser)
    return parser.parse_args(arguments)


def infer_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of `infer_net.py`."""
    parser = OneLineParser(
        prog="infer_net.py",
        description="Tag posts from their feature files; JSON lines out.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--infer_config", type=Path, metavar="F", help=f"YAML file; default {INFER_CONFIG}")
    add(
        "--input",
        type=Path,
        required=True,
        metavar="F",
        help="data file (.json), or a list (.txt) of post IDs or feature files, one a line",
    )
    add("--output", type=Path, metavar="F", help="JSON lines; default standard output")
    add("--n_gpus", metavar="N", help="number of GPUs, 0 or 1")
    add("--best_model", type=Path, metavar="DIR", help="folder of the bundle")
    _add_set(parser)
    return parser.parse_args(arguments)


def train_settings(options: argparse.Namespace) -> TrainSettings:
    """Settings of a training: the YAML file, then the options, then ``--set``.

    Raises:
        ConfigError: One line that names the file or option, the key and the mistake.
    """
    given = _given(options, _TRAIN_KEYS)
    if options.save_dir is not None:
        given = merge(given, {"trainer": {"save_dir": options.save_dir}})
    if given.get("trainer", {}).get("epochs") == 0:
        del given["trainer"]["epochs"]
    return _layers(TrainSettings, options.model_config, TRAIN_CONFIG, given, options.set)


def infer_settings(options: argparse.Namespace) -> InferSettings:
    """Settings of an inference: the YAML file, then the options, then ``--set``.

    Raises:
        ConfigError: One line that names the file or option, the key and the mistake.
    """
    given = _given(options, _INFER_KEYS)
    if options.best_model is not None:
        given = merge(given, {"bundle": options.best_model})
    return _layers(InferSettings, options.infer_config, INFER_CONFIG, given, options.set)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="any key of the config; may be given many times",
    )


def _given(options: argparse.Namespace, keys: dict[str, str]) -> dict[str, Any]:
    values = {key: getattr(options, name) for name, key in keys.items()}
    return parse_overrides(f"{key}={value}" for key, value in values.items() if value is not None)


def _layers(
    model: type[Chosen], path: Path | None, default: Path, given: dict[str, Any], sets: list[str]
) -> Chosen:
    file = path or default
    from_file = read_yaml(file) if path is not None or file.exists() else {}
    validate(model, from_file, str(file))  # so that a mistake is blamed on the right source
    validate(model, merge(from_file, given), "options")
    return validate(model, merge(from_file, given, parse_overrides(sets)), "--set")
