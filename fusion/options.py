"""Options of `train_net.py`; imports no torch, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from config.load import merge, parse_overrides, read_yaml, validate
from config.options import OneLineParser
from config.train import TrainSettings

Chosen = TypeVar("Chosen", bound=BaseModel)

TRAIN_CONFIG = Path("config/train_config.yaml")

_TRAIN_KEYS = {
    "batch_size": "trainer.batch_size",
    "learning_rate": "optimizer.learning_rate",
    "n_gpu": "trainer.n_gpu",
    "epoch": "trainer.epochs",
    "valid_interval": "trainer.valid_interval",
    "log_interval": "trainer.log_interval",
    "fix_random_seed": "trainer.fix_random_seed",
}


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
    add_set(parser)
    return parser.parse_args(arguments)


def train_settings(options: argparse.Namespace) -> TrainSettings:
    """Settings of a training: the YAML file, then the options, then ``--set``.

    Raises:
        ConfigError: One line that names the file or option, the key and the mistake.
    """
    given = given_options(options, _TRAIN_KEYS)
    if options.save_dir is not None:
        given = merge(given, {"trainer": {"save_dir": options.save_dir}})
    if given.get("trainer", {}).get("epochs") == 0:
        del given["trainer"]["epochs"]
    return layered(TrainSettings, options.model_config, TRAIN_CONFIG, given, options.set)


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add ``--set a.b=c``."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="any key of the config; may be given many times",
    )


def given_options(options: argparse.Namespace, keys: dict[str, str]) -> dict[str, Any]:
    """Nested settings out of the options that were given; ``keys`` maps options to keys."""
    values = {key: getattr(options, name) for name, key in keys.items()}
    return parse_overrides(f"{key}={value}" for key, value in values.items() if value is not None)


def layered(
    model: type[Chosen], path: Path | None, default: Path, given: dict[str, Any], sets: list[str]
) -> Chosen:
    """Settings out of a YAML file, then options, then ``--set``; each is checked by itself.

    Raises:
        ConfigError: One line that names the file or option, the key and the mistake.
    """
    file = path or default
    from_file = read_yaml(file) if path is not None or file.exists() else {}
    validate(model, from_file, str(file))  # so that a mistake is blamed on the right source
    validate(model, merge(from_file, given), "options")
    return validate(model, merge(from_file, given, parse_overrides(sets)), "--set")
