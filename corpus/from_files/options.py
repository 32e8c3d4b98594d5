"""The options of ``insighttag train``, in a module of its own so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.cli import JsonReport, argument, flag, option
from common.errors import ConfigError
from config.presets import Preset


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line, and the arguments of `insighttag.train`.

    Attributes:
        labels: As in `corpus.from_files.posts.read_own_posts`.
        overrides: Values over the file's; those of the training over the defaults of its settings.
    """

    posts: Annotated[
        Path | None,
        argument(
            "A folder of pictures, videos and sounds; or posts as .csv, .jsonl or .json.", "POSTS"
        ),
    ] = None
    named_posts: Annotated[Path | None, option("The same, as an option.", "POSTS", "--posts")] = (
        None
    )
    out: Annotated[Path, option("Takes bundle, report and the rest.", "FOLDER")]
    labels: Annotated[
        Path | None,
        option("Of a folder: columns file,labels; several are separated by ; or |.", "F.csv"),
    ] = None
    preset: Annotated[Preset | None, option("The encoders; small unless --config names some.")] = (
        None
    )
    valid: Annotated[float, option("Share of the posts that chooses thresholds.")] = 0.1
    test: Annotated[float, option("Share of the posts that is only measured on.")] = 0.1
    seed: Annotated[int, option("Of the split.", min=0)] = 0
    min_posts: Annotated[int, option("Leave out tags with fewer posts.", min=1)] = 1
    skip_bad: Annotated[
        bool, flag("--skip-bad", "Leave out posts with mistakes, and list them.")
    ] = False
    restart: Annotated[bool, flag("--restart", "Start over in the folder of an earlier run.")] = (
        False
    )
    as_json: JsonReport = False
    config: Annotated[
        Path | None,
        option("Settings, YAML; default: config/infer_config_e2e.yaml.", "F", "--config"),
    ] = None
    overrides: Annotated[
        list[str] | None,
        option(
            "A setting of the extractors (features.image.image_size=160) or of the training "
            "(trainer.epochs=5); repeatable.",
            "a.b=c",
            "--set",
        ),
    ] = None

    @property
    def source(self) -> Path:
        """Return the posts, which must be named once."""
        source = self.posts or self.named_posts
        if source is None or (self.posts and self.named_posts):
            raise ConfigError("name the posts once: insighttag train POSTS --out FOLDER")
        return source
