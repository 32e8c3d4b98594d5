"""`train`: from files of posts to a bundle, like the command `insighttag train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ConfigError
from insighttag.posts import path_of
from insighttag.tagger import Overrides, quiet_logs

if TYPE_CHECKING:
    from config.presets import Preset


def train(
    posts: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    preset: Preset | None = None,
    config: str | os.PathLike[str] | None = None,
    overrides: Overrides | None = None,
    valid: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    min_posts: int = 1,
    skip_bad: bool = False,
    restart: bool = False,
) -> Path:
    """Train on posts in files, and return the folder of the bundle.

    Writes the same files as `insighttag train` to `out`: the bundle, ``settings.yaml`` for serving,
    the report, features, and the tags of the test posts. After an interruption the same call
    resumes.

    Args:
        posts: A folder of media, a table ``.csv``, or a data file ``.jsonl`` or ``.json``.
        out: Output folder; it is created if it does not exist.
        labels: For a folder of media: a table with the columns ``file`` and ``labels``.
        preset: The encoders; ``small`` if there is no `config`.
        config: Settings file of the extractors.
        overrides: Settings of the extractors (``{"features.image.image_size": 160}``) or of the
            training (``{"trainer.epochs": 5}``).
        valid: Share of the posts used to choose the epoch and the thresholds.
        test: Share of the posts used only to measure.
        seed: Seed of the split.
        min_posts: Leave out tags with fewer posts.
        skip_bad: Leave out posts with mistakes, and list them.
        restart: Start over in a folder with an earlier training.

    Raises:
        ConfigError: The posts or the settings are wrong, or `out` has a training with others.
    """
    for name, share in (("valid", valid), ("test", test)):
        if not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise ConfigError(f"{name}: must be a share, from 0 to below 1: got {share!r}")
    for name, count, least in (("seed", seed, 0), ("min_posts", min_posts, 1)):
        if not isinstance(count, int) or count < least:
            raise ConfigError(f"{name}: must be a whole number, at least {least}: got {count!r}")
    from config.load import nested
    from corpus.from_files.options import Options
    from scripts.commands.train import train_own

    options = Options(
        posts=path_of(posts, "posts"),
        labels=path_of(labels, "labels") if labels is not None else None,
        out=path_of(out, "out"),
        preset=preset or ("small" if config is None else None),
        config=path_of(config, "config") if config is not None else None,
        valid=valid,
        test=test,
        seed=seed,
        min_posts=min_posts,
        skip_bad=skip_bad,
        restart=restart,
    )
    folder, _ = train_own(options, nested(overrides or {}, "overrides"), "overrides", quiet_logs)
    return folder.bundle
