"""Download the media of posts: many connections at once, the daemon's own safety limits.

Reads a posts file (*.jsonl) or a data file (*.json). Writes DIR/media (each content once, by its
hash), DIR/manifest.jsonl (a line per media with its status and reason), DIR/posts.jsonl (the posts
with local paths), DIR/rejected.jsonl (lines that are no posts) and DIR/summary.json. Run it again
after whatever ended it, and it goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a plain script too

from common.cli import ConfigFile, Overrides, exit_code, read_options, seconds
from config.load import load_settings

_NAME = "download_mp"


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line."""

    posts: Annotated[Path, typer.Argument(metavar="POSTS", help="posts file or data file")]
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="output folder")]
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="times --connections: downloads at once")
    ] = 2
    connections: Annotated[int, typer.Option("--connections", min=1)] = 16
    per_host: Annotated[
        int, typer.Option("--per_host", min=1, metavar="N", help="downloads from one host at once")
    ] = 8
    retries: Annotated[
        int,
        typer.Option(
            "--retries",
            min=0,
            metavar="N",
            help="more tries at what may pass, each after a longer wait",
        ),
    ] = 4
    backoff: Annotated[
        float,
        typer.Option("--backoff", parser=seconds, metavar="S", help="wait before the first one"),
    ] = 1.0
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            parser=seconds,
            metavar="S",
            help="seconds for one file; fetch.total_timeout_s",
        ),
    ] = None
    local: Annotated[bool, typer.Option("--local", help="take local files of POSTS too")] = False
    verify: Annotated[bool, typer.Option("--verify", help="hash files that are there already")] = (
        False
    )
    retry_failed: Annotated[
        bool, typer.Option("--retry_failed", help="ask again for what was refused before")
    ] = False
    config: ConfigFile = None
    overrides: Overrides


def run(line: CommandLine) -> int:
    """Download with the settings' limits; return the exit code."""
    from corpus.download.run import download
    from corpus.download.values import Options

    overrides = list(line.overrides)
    if line.timeout is not None:
        overrides.append(f"fetch.total_timeout_s={line.timeout}")
    return download(
        Options(
            posts=line.posts,
            out=line.out,
            fetch=load_settings(line.config, overrides).fetch,
            processes=line.processes,
            connections=line.connections,
            per_host=line.per_host,
            retries=line.retries,
            backoff_s=line.backoff,
            local=line.local,
            verify=line.verify,
            retry_failed=line.retry_failed,
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Download; return the exit code."""
    return exit_code(_NAME, lambda: run(read_options(CommandLine, _NAME, arguments, about=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
