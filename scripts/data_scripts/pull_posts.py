r"""Pull posts out of the database into a posts file (JSON lines), in the order of _id.

store.fields of the settings says where in a document what lies. Beside POSTS.jsonl it
writes POSTS.rejected.jsonl (documents that are no posts, with the reason) and POSTS.summary.json
(how many of what were left out, and why). Run it again after whatever ended it, and it goes on
where it stopped.

    python scripts/data_scripts/pull_posts.py --query '{"lang": "en"}' --since 2026-01-01 \
        --min_posts_per_tag 50 --out workshop/posts.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a plain script too

from common.cli import ConfigFile, Overrides, exit_code, read_options
from common.logs import configure_logs
from config.load import load_settings

_NAME = "pull_posts"


def _lines_file(text: str) -> Path:
    if not text.endswith(".jsonl"):
        raise typer.BadParameter(f"{text}: must end in .jsonl")
    return Path(text)


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line."""

    out: Annotated[
        Path,
        typer.Option("--out", parser=_lines_file, metavar="POSTS.jsonl", help="file to write"),
    ]
    query: Annotated[
        str, typer.Option("--query", metavar="JSON", help="MongoDB filter, extended JSON")
    ] = "{}"
    since: Annotated[
        str | None,
        typer.Option(
            "--since", metavar="T", help="posts from then on: 2026-01-31[T12:00], or 7d, 12h ago"
        ),
    ] = None
    until: Annotated[str | None, typer.Option("--until", metavar="T", help="posts before then")] = (
        None
    )
    sample: Annotated[
        int | None,
        typer.Option("--sample", min=1, metavar="N", help="this many, picked by a hash of the ID"),
    ] = None
    seed: Annotated[
        int,
        typer.Option(
            "--seed", min=0, max=(1 << 63) - 1, metavar="N", help="another seed, another sample"
        ),
    ] = 0
    min_posts_per_tag: Annotated[
        int,
        typer.Option(
            "--min_posts_per_tag",
            min=0,
            metavar="N",
            help="leave out tags with fewer posts, and posts without any other tag; a sample keeps "
            "this many posts of each tag",
        ),
    ] = 0
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="stop after this many posts")
    ] = None
    untagged: Annotated[bool, typer.Option("--untagged", help="only posts without a result")] = (
        False
    )
    page: Annotated[
        int, typer.Option("--page", min=1, metavar="N", help="documents read at a time")
    ] = 1000
    restart: Annotated[
        bool, typer.Option("--restart", help="forget an unfinished pull into the same file")
    ] = False
    config: ConfigFile = None
    overrides: Overrides


def run(line: CommandLine) -> int:
    """Pull; return the exit code.

    Raises:
        TaggingError: One line that says what is wrong.
    """
    from corpus.pull.command import Options, pull, query_of
    from deploy.embedded import resolve

    settings = load_settings(line.config, line.overrides)
    configure_logs(settings.log.format, settings.log.level)
    options = Options(
        store=settings.store,
        out=line.out,
        query=line.query,
        since=line.since,
        until=line.until,
        sample=line.sample,
        min_posts_per_tag=line.min_posts_per_tag,
        seed=line.seed,
        limit=line.limit,
        untagged=line.untagged,
        page=line.page,
        restart=line.restart,
    )
    query_of(options)  # before a service is started for it
    return pull(options, resolve(settings, ("mongo",)).store)


def main(arguments: Sequence[str] | None = None) -> int:
    """Pull; return the exit code."""
    return exit_code(_NAME, lambda: run(read_options(CommandLine, _NAME, arguments, about=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
