"""``insighttag train``: from posts in files to a bundle, without a database."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from common.cli import complain, say
from common.errors import ConfigError
from common.logs import configure_logs
from config.load import did_you_mean, load_settings, parse_overrides
from config.presets import Preset
from config.settings import InferSettings, Settings
from config.train import TrainSettings
from scripts.commands.common import Config

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
    config: Config = None,
    overrides: Sets = None,
) -> None:
    """Train on your own posts: read, split, extract, train, report, in one folder.

    Interrupted, the same command goes on.
    """
    source = posts or named_posts
    if source is None or (posts and named_posts):
        raise ConfigError("train: name the posts once: insighttag train POSTS --out FOLDER")
    settings, training = _settings(config, preset, overrides or ())
    # Lines of the default level would tear the progress bars.
    level = "warning" if settings.log.level == "info" else settings.log.level
    configure_logs(settings.log.format, level)
    from corpus.from_files.training import OwnTraining, train_own_posts

    plan = OwnTraining(
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
    try:
        folder = train_own_posts(plan, restart=restart)
        if (side := folder.side("test")) is not None:
            _measure(side, folder.bundle, folder.features, out / "test_tags.jsonl")
    except KeyboardInterrupt:
        complain("train", "interrupted; the same command goes on where it stopped", 1)
        raise typer.Exit(1) from None
    say(
        f"bundle   {folder.bundle}\nreport   {folder.report}\nserve    --config {folder.settings}\n"
        f"next     insighttag tag MORE_POSTS --out tags.jsonl --bundle {folder.bundle}\n"
    )


def _settings(
    config: Path | None, preset: Preset | None, overrides: Sequence[str]
) -> tuple[Settings, dict[str, Any]]:
    """Return the settings of the extractors, and the values for the training."""
    of_training = [each for each in overrides if _section(each) in _TRAINING]
    of_extractors = [each for each in overrides if each not in of_training]
    known = {*_TRAINING, *Settings.model_fields}
    odd = next((_section(each) for each in of_extractors if _section(each) not in known), None)
    if odd is not None:
        raise ConfigError(f"--set: {odd}: unknown key{did_you_mean(odd, known)}")
    if preset is None and config is None:
        preset = "small"
    first = [f"features.preset={preset}"] if preset is not None else []
    settings = load_settings(config, [*first, *of_extractors])
    return settings, parse_overrides(of_training)


def _section(override: str) -> str:
    return override.partition("=")[0].partition(".")[0].strip()


def _measure(posts: Path, bundle: Path, features: Path, out: Path) -> None:
    """Tag the test posts, and say how right the tags are."""
    from fusion.infer.options import InferOptions
    from scripts.inference.run import run

    say("test posts, which nothing was trained or chosen on:\n")
    settings = InferSettings(bundle=bundle, features=features, output=str(out), progress=False)
    run(settings, InferOptions(input=posts, restart=True, overrides=[]))
