"""Make demo posts with real media: JPEG, PNG, MP4 (H.264 + AAC), WAV, OGG, text in two languages.

Writes ``DIR/posts.json``, in the data-file format with paths relative to DIR, and ``DIR/media/``.
The same seed, split and number of posts give the same posts.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a plain script too

from common.cli import Script, option, share
from common.errors import ConfigError
from demo.posts.plan import DATA_FILE, Split, plan_posts


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line."""

    out: Annotated[Path, option("folder to write to")]
    posts: Annotated[int, option("number of posts", min=1)]
    seed: Annotated[int, typer.Option(min=0)] = 0
    split: Annotated[Split, option("splits share no post")] = "train"
    noise: Annotated[float, option("disturbance, 0 to 1", "X", parser=share)] = 0.0
    missing: Annotated[
        float, option("chance that a needed modality is left out", "X", parser=share)
    ] = 0.0
    processes: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1


def run(line: CommandLine) -> None:
    from common.progress import track
    from demo.posts.make import make_posts

    plans = plan_posts(line.posts, line.seed, line.split, noise=line.noise, missing=line.missing)
    try:
        made = make_posts(line.out, plans, line.processes)
        for _ in track(made, f"{line.split} posts", len(plans)):
            pass
    except OSError as error:
        raise ConfigError(str(error)) from error
    print(f"{len(plans)} posts: {line.out / DATA_FILE}")


main = Script("make_demo_posts", CommandLine, run, about=__doc__).main

if __name__ == "__main__":
    sys.exit(main())
