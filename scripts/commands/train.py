"""``insighttag train``: from posts in files to a bundle, without a database."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.cli import JsonReport, complain, json_report, say
from common.errors import ConfigError
from common.logs import configure_logs
from config.load import DEFAULT_CONFIG, did_you_mean, parse_overrides, settings_with
from config.presets import Preset, merge
from config.settings import InferSettings, Settings
from config.train import TrainSettings
from scripts.commands.common import Config

if TYPE_CHECKING:
    from corpus.from_files.training import TrainingFolder
    from fusion.infer.inference import InferReport

# Of the training alone; data, save_dir and the like are the command's own.
_TRAINING = set(TrainSettings.model_fields) - {"task", "data"}


Posts = Annotated[
    Path | None,
    typer.Argument(
        metavar="POSTS",
        help="A folder of pictures, videos and sounds; or posts as .csv, .jsonl or .json.",
    ),
]
NamedPosts = Annotated[
    Path | None, typer.Option("--posts", metavar="POSTS", help="The same, as an option.")
]
Out = Annotated[
    Path, typer.Option("--out", metavar="FOLDER", help="Takes bundle, report and the rest.")
]
Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        metavar="F.csv",
        help="Of a folder: columns file,labels; several are separated by ; or |.",
    ),
]
Encoders = Annotated[
    Preset | None,
    typer.Option("--preset", help="The encoders; small, where --config names none."),
]
Valid = Annotated[float, typer.Option("--valid", help="Share that chooses thresholds.")]
Test = Annotated[float, typer.Option("--test", help="Share that is only measured on.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the split.")]
MinPosts = Annotated[
    int, typer.Option("--min-posts", min=1, help="Leave out tags with fewer posts.")
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out posts with mistakes, and list them.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew in a folder that was begun.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="a.b=c",
        help="A setting of the extractors (features.image.image_size=160) or of the training "
        "(trainer.epochs=5); repeatable.",
    ),
]


def train(
    posts: Posts = None,
    *,
    named_posts: NamedPosts = None,
    out: Out,
    labels: Labels = None,
    preset: Encoders = None,
    valid: Valid = 0.1,
    test: Test = 0.1,
    seed: Seed = 0,
    min_posts: MinPosts = 1,
    skip_bad: SkipBad = False,
    restart: Restart = False,
    as_json: JsonReport = False,
    config: Config = None,
    overrides: Sets = None,
) -> None:
    """Train on your own posts: read, split, extract, train, report, in one folder.

    Interrupted, the same command goes on.
    """
    source = posts or named_posts
    if source is None or (posts and named_posts):
        raise ConfigError("train: name the posts once: insighttag train POSTS --out FOLDER")
    values = parse_overrides(overrides or ())
    preset = preset or ("small" if config is None else None)
    config = config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    settings, training = settings_of_own(config, preset, values, "--set")
    # Lines of the default level would tear the progress bars.
    level = "warning" if settings.log.level == "info" else settings.log.level
    configure_logs(settings.log.format, level)
    try:
        with json_report(as_json) as report:
            folder, tested = train_and_measure(
                restart=restart,
                source=source,
                labels=labels,
                out=out,
                settings=settings,
                training=training,
                valid=valid,
                test=test,
                seed=seed,
                min_posts=min_posts,
                skip_bad=skip_bad,
            )
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
    except KeyboardInterrupt:
        complain("train", "interrupted; the same command goes on where it stopped", 1)
        raise typer.Exit(1) from None


def settings_of_own(
    config: Path | None, preset: Preset | None, values: Mapping[str, Any], source: str
) -> tuple[Settings, dict[str, Any]]:
    """Return the settings of the extractors, and the values for the training, out of both's."""
    known = {*_TRAINING, *Settings.model_fields}
    odd = next((key for key in values if key not in known), None)
    if odd is not None:
        raise ConfigError(f"{source}: {odd}: unknown key{did_you_mean(odd, known)}")
    of_extractors = {key: value for key, value in values.items() if key not in _TRAINING}
    if preset is not None:
        of_extractors = merge({"features": {"preset": preset}}, of_extractors)
    settings = settings_with(config, of_extractors, source)
    return settings, {key: value for key, value in values.items() if key in _TRAINING}


def train_and_measure(*, restart: bool, **plan: Any) -> tuple[TrainingFolder, InferReport | None]:
    """Train as `OwnTraining` describes it, and tag the test posts where there are any."""
    from corpus.from_files.training import OwnTraining, train_own_posts

    folder = train_own_posts(OwnTraining(**plan), restart=restart)
    side = folder.side("test")
    return folder, _measure(side, folder) if side is not None else None


def _measure(posts: Path, folder: TrainingFolder) -> InferReport:
    """Tag the test posts, and say how right the tags are."""
    from fusion.infer.options import InferOptions
    from scripts.inference.run import run

    say("test posts, which nothing was trained or chosen on:\n")
    out = str(folder.root / "test_tags.jsonl")
    settings = InferSettings(
        bundle=folder.bundle, features=folder.features, output=out, progress=False
    )
    return run(settings, InferOptions(input=posts, restart=True, overrides=[]))
