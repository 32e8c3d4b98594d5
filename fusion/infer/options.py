"""Options of `infer_net.py`; imports no torch, so that ``--help`` is quick."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from common.cli import JsonReport, Overrides, flag, option
from common.errors import ConfigError
from config.load import did_you_mean, given_options, layered, load_settings, read_yaml
from config.settings import InferSettings, RunSettings, Settings
from fusion.bundle.folder import WEIGHT_FILES

INFER_CONFIG = Path("config/infer_config.yaml")
_KEYS = {name: name for name in ("n_gpus", "processes", "format")}


@dataclass(frozen=True, kw_only=True)
class InferOptions:
    """The command line of `infer_net.py`; the settings check the values."""

    infer_config: Annotated[
        Path | None,
        option(
            f"YAML file; default {INFER_CONFIG}; one with the daemon's keys, such as "
            "config/infer_config_e2e.yaml, tags raw media",
            "F",
            "--config",
            "--infer_config",
        ),
    ] = None
    input: Annotated[
        Path,
        option(
            "data file (.json, .jsonl), or a list (.txt) of post IDs or feature files, one a line",
            "F",
            "--input",
        ),
    ]
    output: Annotated[
        str | None,
        option(
            "file, or mongodb://HOST/DB.COLLECTION; default standard output",
            "F",
            "--out",
            "--output",
        ),
    ] = None
    format: Annotated[
        str | None, option("jsonl, csv or mongodb; default by the output's name", "X", "--format")
    ] = None
    n_gpus: Annotated[
        str | None,
        option(
            "number of GPUs, a process for each; 0 runs on the CPU",
            "N",
            "--gpus",
            "--n_gpus",
            "--n_gpu",
        ),
    ] = None
    processes: Annotated[
        str | None, option("number of processes on the CPU", "N", "--processes")
    ] = None
    best_model: Annotated[
        Path | None,
        option(
            "folder of a bundle, its model.safetensors, or a .pth with weights for the bundle of "
            "the config",
            "M",
            "--bundle",
            "--best_model",
        ),
    ] = None
    skip_bad: Annotated[bool, flag("--skip_bad", "leave out bad posts, and list them")] = False
    resume: Annotated[
        bool, flag("--resume", "continue where a killed run stopped (the default)")
    ] = False
    restart: Annotated[bool, flag("--restart", "start over, whatever is there already")] = False
    as_json: JsonReport = False
    overrides: Overrides

    def __post_init__(self) -> None:
        if self.resume and self.restart:
            raise ConfigError("--restart: not allowed with --resume")


def infer_settings(options: InferOptions) -> InferSettings | Settings:
    """Return the settings of an inference: the YAML file, then the options, then ``--set``.

    The keys of the YAML file tell features from raw media.
    """
    values = given_options(options, _KEYS)
    if options.skip_bad:
        values["skip_bad"] = True
    if options.output is not None:
        values["output"] = options.output
    file = options.infer_config or INFER_CONFIG
    content = read_yaml(file) if options.infer_config is not None or file.exists() else {}
    settings: InferSettings | Settings
    if tags_raw_media(content, file):
        over = [f"infer.{key}={json.dumps(value)}" for key, value in values.items()]
        settings = load_settings(file, [*over, *options.overrides])
    else:
        settings = layered(
            InferSettings, options.infer_config, INFER_CONFIG, values, options.overrides
        )
    model: Path | None = options.best_model
    # A file with weights alone becomes a bundle later: that takes torch.
    if model is None or model.suffix in WEIGHT_FILES:
        return settings
    return with_bundle(settings, model)


def tags_raw_media(content: dict[str, Any], file: Path) -> bool:
    """Return True for the daemon's config (raw media to tags), False for feature files."""
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
        hint = did_you_mean(odd, sorted(of_features | of_media))
        raise ConfigError(
            f"{file}: {odd}: unknown key{hint}; a config for feature files has keys such as "
            "bundle, one for raw media the daemon's, such as fusion"
        )
    return bool(raw)


def run_settings(settings: InferSettings | Settings) -> RunSettings:
    return settings if isinstance(settings, InferSettings) else settings.infer


def with_bundle(settings: InferSettings | Settings, bundle: Path) -> InferSettings | Settings:
    if isinstance(settings, InferSettings):
        return settings.model_copy(update={"bundle": bundle})
    return settings.model_copy(
        update={"fusion": settings.fusion.model_copy(update={"bundle": bundle})}
    )


def bundle_of(settings: InferSettings | Settings) -> Path:
    return settings.bundle if isinstance(settings, InferSettings) else settings.fusion.bundle
