"""Download the media of posts: many processes and connections, the daemon's own safety limits.

Reads a posts file (*.jsonl) or a data file (*.json). Writes DIR/media (each content once, by its
hash), DIR/manifest.jsonl (a line per media with its status and reason), DIR/posts.jsonl (the posts
with local paths), DIR/rejected.jsonl (lines that are no posts) and DIR/summary.json. Run it again
after whatever ended it, and it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a plain script too

from common.cli import OneLineParser, count, natural, seconds
from common.errors import ConfigError, TaggingError
from config.load import load_settings
from corpus.download.run import download
from corpus.download.values import Options

_NAME = "download_mp"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(
        prog=_NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("posts", type=Path, metavar="POSTS", help="posts file or data file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    parser.add_argument("--processes", type=count, default=2)
    parser.add_argument("--connections", type=count, default=16, help="of each process; 16")
    parser.add_argument(
        "--per_host", type=count, default=8, metavar="N", help="downloads from one host at once; 8"
    )
    parser.add_argument(
        "--retries",
        type=natural,
        default=4,
        metavar="N",
        help="more tries at what may pass, each after a longer wait; 4",
    )
    parser.add_argument(
        "--backoff", type=seconds, default=1.0, metavar="S", help="wait before the first; 1"
    )
    parser.add_argument(
        "--timeout", type=seconds, metavar="S", help="seconds for one file; fetch.total_timeout_s"
    )
    parser.add_argument("--local", action="store_true", help="take local files of POSTS too")
    parser.add_argument("--verify", action="store_true", help="hash files that are there already")
    parser.add_argument(
        "--retry_failed", action="store_true", help="ask again for what was refused before"
    )
    parser.add_argument("--config", type=Path, metavar="F", help="settings, YAML; section fetch")
    parser.add_argument("--set", metavar="a.b=c", action="append", default=[], dest="overrides")
    return parser.parse_args(arguments)


def options_of(parsed: argparse.Namespace) -> Options:
    """The options with the settings' limits.

    Raises:
        ConfigError: One line that names the source, the key and the mistake.
    """
    overrides = list(parsed.overrides)
    if parsed.timeout is not None:
        overrides.append(f"fetch.total_timeout_s={parsed.timeout}")
    return Options(
        posts=parsed.posts,
        out=parsed.out,
        fetch=load_settings(parsed.config, overrides).fetch,
        processes=parsed.processes,
        connections=parsed.connections,
        per_host=parsed.per_host,
        retries=parsed.retries,
        backoff_s=parsed.backoff,
        local=parsed.local,
        verify=parsed.verify,
        retry_failed=parsed.retry_failed,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Download; gives the exit code."""
    parsed = parse(arguments)
    try:
        return download(options_of(parsed))
    except ConfigError as error:
        print(f"{_NAME}: {error}", file=sys.stderr)
        return 2
    except TaggingError as error:
        print(f"{_NAME}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
