"""``insighttag train``: from posts in files to a bundle, without a database."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Script, json_report, say
from common.errors import ConfigError
from config.load import DEFAULT_CONFIG, did_you_mean, parse_overrides, settings_with
from config.presets import Preset, merge
from config.settings import InferSettings, Settings
from config.train import TrainSettings
from corpus.from_files.options import Options
from scripts.commands.common import configure_quiet_logs

if TYPE_CHECKING:
    from corpus.from_files.training import TrainingFolder
    from fusion.infer.inference import InferReport

# Of the training alone; the data files, save_dir and the like are the command's own.
_TRAINING = set(TrainSettings.model_fields) - {"task"}
_DATA = ("modalities", "loaders", "cache_mb", "skip_bad")


def _run(options: Options) -> None:
    config = options.config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    preset = options.preset or ("small" if options.config is None else None)
    options = replace(options, config=config, preset=preset)
    values = parse_overrides(options.overrides or ())
    with json_report(options.as_json) as report:
        folder, tested = train_own(options, values, "--set", configure_quiet_logs)
        say(
            f"bundle   {folder.bundle}\nreport   {folder.report}\n"
            f"serve    insighttag serve --config {folder.settings}\n"
            f"next     insighttag tag MORE_POSTS --out tags.jsonl --bundle {folder.bundle}\n"
        )
        report |= {
            "bundle": folder.bundle,
            "report": folder.report,
            "settings": folder.settings,
            "metrics": json.loads(folder.metrics.read_text(encoding="utf-8")),
            "test": tested and tested.metrics,
        }


SCRIPT = Script(
    "train",
    Options,
    _run,
    about="Train on your own posts: read, split, extract, train, report, in one folder.\n\n"
    "Interrupted, the same command goes on.",
    interrupted="interrupted; the same command continues where it stopped",
)


def train_own(
    options: Options,
    values: Mapping[str, Any],
    origin: str,
    configure: Callable[[Settings], None],
) -> tuple[TrainingFolder, InferReport | None]:
    """Train as the options say, and tag the test posts where there are any.

    Args:
        options: All but their `overrides` and `as_json`.
        values: Settings over the file's, of the extractors and of the training, nested.
        origin: Names these in errors.
        configure: Sets up the logs.
    """
    from corpus.from_files.training import OwnTraining, train_own_posts

    _ = options.source  # a mistake there is told before those of the settings
    settings, training = _settings_of(options.config, options.preset, values, origin)
    configure(settings)
    folder = train_own_posts(OwnTraining(options, settings, training))
    side = folder.side("test")
    return folder, _measure(side, folder) if side is not None else None


def _settings_of(
    config: Path | None, preset: Preset | None, values: Mapping[str, Any], source: str
) -> tuple[Settings, dict[str, Any]]:
    """Return the settings of the extractors, and the values for the training, out of both's."""
    known = {*_TRAINING, *Settings.model_fields}
    odd = next((key for key in values if key not in known), None)
    if odd is not None:
        raise ConfigError(f"{source}: {odd}: unknown key{did_you_mean(odd, known)}")
    data = values.get("data", {})
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: data: must hold keys and values, of {', '.join(_DATA)}")
    if own := sorted({*data} - {*_DATA}):
        raise ConfigError(
            f"{source}: data.{own[0]}: insighttag train sets it itself; of data it takes "
            f"{', '.join(_DATA)}"
        )
    of_extractors = {key: value for key, value in values.items() if key not in _TRAINING}
    if preset is not None:
        of_extractors = merge({"features": {"preset": preset}}, of_extractors)
    settings = settings_with(config, of_extractors, source)
    return settings, {key: value for key, value in values.items() if key in _TRAINING}


def _measure(posts: Path, folder: TrainingFolder) -> InferReport:
    """Tag the test posts, and say how right the tags are."""
    from fusion.infer.options import InferOptions
    from scripts.inference.run import run

    say("test posts, which were not used to train or to choose anything:\n")
    out = str(folder.root / "test_tags.jsonl")
    settings = InferSettings(
        bundle=folder.bundle, features=folder.features, output=out, progress=False
    )
    return run(settings, InferOptions(input=posts, restart=True, overrides=[]))
