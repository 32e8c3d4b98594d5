"""Options of `infer_net.py`; imports no torch, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from config.infer import InferSettings
from config.load import merge
from config.options import OneLineParser
from fusion.options import add_set, given_options, layered

INFER_CONFIG = Path("config/infer_config.yaml")
_INFER_KEYS = {"n_gpus": "n_gpus"}


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
    add_set(parser)
    return parser.parse_args(arguments)


def infer_settings(options: argparse.Namespace) -> InferSettings:
    """Settings of an inference: the YAML file, then the options, then ``--set``.

    Raises:
        ConfigError: One line that names the file or option, the key and the mistake.
    """
    given = given_options(options, _INFER_KEYS)
    if options.best_model is not None:
        given = merge(given, {"bundle": options.best_model})
    return layered(InferSettings, options.infer_config, INFER_CONFIG, given, options.set)
