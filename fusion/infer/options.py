"""Options of `infer_net.py`; imports no torch, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import OneLineParser
from common.errors import ConfigError
from config.cli import add_set, given_options, layered
from config.infer import InferSettings, RunSettings
from config.load import load_settings, read_yaml
from config.settings import Settings
from fusion.bundle.legacy import WEIGHT_FILES

INFER_CONFIG = Path("config/infer_config.yaml")
_KEYS = {name: name for name in ("n_gpus", "processes", "format", "skip_bad")}


def infer_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options of `infer_net.py`."""
    parser = OneLineParser(
        prog="infer_net.py",
        description="Tag posts from their feature files, or from raw media.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--infer_config",
        type=Path,
        metavar="F",
        help=f"YAML file; default {INFER_CONFIG}; one with the daemon's keys, such as "
        "config/infer_config_e2e.yaml, tags raw media",
    )
    add(
        "--input",
        type=Path,
        required=True,
        metavar="F",
        help="data file (.json, .jsonl), or a list (.txt) of post IDs or feature files, one a line",
    )
    add(
        "--output",
        metavar="F",
        help="file, or mongodb://HOST/DATABASE.COLLECTION; default standard output",
    )
    add("--format", metavar="X", help="jsonl, csv or mongodb; default by the output's name")
    add("--n_gpus", metavar="N", help="number of GPUs, a process for each; 0 runs on the CPU")
    add("--processes", metavar="N", help="number of processes on the CPU")
    add(
        "--best_model",
        type=Path,
        metavar="M",
        help="folder of a bundle, its model.safetensors, or a .pth with weights for the bundle "
        "of the config",
    )
    add("--skip_bad", action="store_const", const="true", help="leave out bad posts, and list them")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--resume", action="store_true", help="go on where a killed run stopped (the default)"
    )
    where.add_argument(
        "--restart", action="store_true", help="begin anew, whatever is there already"
    )
    add_set(parser)
    return parser.parse_args(arguments)


def infer_settings(options: argparse.Namespace) -> InferSettings | Settings:
    """Settings of an inference: the YAML file, then the options, then ``--set``.

    Which kind it is, features or raw media, is told by the keys of the YAML file.

    Raises:
        ConfigError: One line that names the file or option, the key and the mistake.
    """
    given = given_options(options, _KEYS)
    if options.output is not None:
        given["output"] = options.output
    file = options.infer_config or INFER_CONFIG
    content = read_yaml(file) if options.infer_config is not None or file.exists() else {}
    settings: InferSettings | Settings
    if tags_raw_media(content, file):
        settings = load_settings(file, [*_as_overrides(given), *options.set])
    else:
        settings = layered(InferSettings, options.infer_config, INFER_CONFIG, given, options.set)
    model: Path | None = options.best_model
    # A file with weights alone becomes a bundle later: that takes torch.
    if model is None or model.suffix in WEIGHT_FILES:
        return settings
    return with_bundle(settings, model)


def tags_raw_media(content: dict[str, Any], file: Path) -> bool:
    """Whether a config is the daemon's (raw media to tags), and not one for feature files.

    Raises:
        ConfigError: It has keys of both, or only keys that neither has.
    """
    of_features, of_media = set(InferSettings.model_fields), set(Settings.model_fields)
    raw = set(content) & of_media - of_features
    plain = set(content) & of_features - of_media
    if "features" in content:  # a folder in one, a section in the other
        (raw if isinstance(content["features"], dict) else plain).add("features")
    if raw and plain:
        raise ConfigError(
            f"{file}: {', '.join(sorted(plain))} belong to a config for feature files, "
            f"{', '.join(sorted(raw))} to one for raw media: keep one kind"
        )
    if content and not raw and not plain:
        odd = str(next(iter(content)))
        close = difflib.get_close_matches(odd, sorted(of_features | of_media), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"{file}: {odd}: unknown key{hint}; a config for feature files has keys such as "
            "bundle, one for raw media the daemon's, such as fusion"
        )
    return bool(raw)


def run_settings(settings: InferSettings | Settings) -> RunSettings:
    """What both kinds have in common."""
    return settings if isinstance(settings, InferSettings) else settings.infer


def with_bundle(settings: InferSettings | Settings, bundle: Path) -> InferSettings | Settings:
    """The same settings with another bundle."""
    if isinstance(settings, InferSettings):
        return settings.model_copy(update={"bundle": bundle})
    return settings.model_copy(
        update={"fusion": settings.fusion.model_copy(update={"bundle": bundle})}
    )


def bundle_of(settings: InferSettings | Settings) -> Path:
    """The folder of the bundle that the settings name."""
    return settings.bundle if isinstance(settings, InferSettings) else settings.fusion.bundle


def _as_overrides(given: dict[str, Any]) -> list[str]:
    return [f"infer.{key}={json.dumps(value)}" for key, value in given.items()]
