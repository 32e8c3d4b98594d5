"""Look at posts before training on them: tags, texts, media, duplicates, suspicious labels.

Reads a posts file (*.jsonl) or a data file (*.json). Shows a summary, and writes DIR/report.html
(one file, no network), DIR/analysis.json (the same figures) and DIR/duplicates.jsonl (groups of
posts that share a medium, a picture or a text, for build_trainval_data). With --media the files
are opened; run it again after whatever ended it, and none is opened twice.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a plain script too

from common.cli import exit_code, read_options, share
from corpus.analyze.command import ANALYSIS, DUPLICATES, REPORT, Options, analyze

_NAME = "analyze_posts"


def _threshold(text: str) -> float:
    value = share(text)
    if not value:
        raise typer.BadParameter(f"{text}: must be above 0 and at most 1")
    return value


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line."""

    posts: Annotated[Path, typer.Argument(metavar="POSTS", help="posts file or data file")]
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="output folder")]
    media: Annotated[
        Path | None,
        typer.Option(
            "--media",
            metavar="DIR",
            help="where the media lie: output of download_mp, or a folder; without it they are "
            "counted, not opened",
        ),
    ] = None
    labels: Annotated[
        Path | None,
        typer.Option("--labels", metavar="F", help="label map to hold the tags against"),
    ] = None
    rare: Annotated[
        int, typer.Option("--rare", min=1, metavar="N", help="fewer posts are rare")
    ] = 10
    text_threshold: Annotated[
        float,
        typer.Option(
            "--text_threshold",
            parser=_threshold,
            metavar="X",
            help="share of their runs of three characters that alike texts share",
        ),
    ] = 0.9
    hash_distance: Annotated[
        int,
        typer.Option(
            "--hash_distance",
            min=0,
            max=16,
            metavar="N",
            help="bits of 64 in which pictures that look alike may differ",
        ),
    ] = 6
    processes: Annotated[
        int, typer.Option("--processes", min=1, metavar="N", help="that open media")
    ] = min(4, os.cpu_count() or 1)


def run(arguments: Sequence[str] | None) -> None:
    """Analyse, and name the files.

    Raises:
        TaggingError: One line that says what is wrong.
    """
    line = read_options(CommandLine, _NAME, arguments, about=__doc__)
    analyze(Options(**vars(line)))
    print(", ".join(str(line.out / name) for name in (REPORT, ANALYSIS, DUPLICATES)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Analyse; return the exit code."""
    return exit_code(
        _NAME,
        lambda: run(arguments),
        interrupted="interrupted; run it again: what is measured stays",
    )


if __name__ == "__main__":
    sys.exit(main())
