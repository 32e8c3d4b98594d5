r"""Pull posts out of the database into a posts file (JSON lines), in the order of _id.

What stands where in a document is told by store.fields of the settings. Beside POSTS.jsonl it
writes POSTS.rejected.jsonl (documents that are no posts, with the reason) and POSTS.summary.json
(how many of what were left out, and why). Run it again after whatever ended it, and it goes on
where it stopped.

    python scripts/data_scripts/pull_posts.py --query '{"lang": "en"}' --since 2026-01-01 \
        --min_posts_per_tag 50 --out workshop/posts.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a plain script too

from common.cli import OneLineParser, count, natural
from common.errors import ConfigError, TaggingError
from common.logs import configure_logs
from config.load import load_settings

_NAME = "pull_posts"


def _seed(text: str) -> int:
    value = natural(text)
    if value >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text}: must be below 2^63")
    return value


def _lines_file(text: str) -> Path:
    if not text.endswith(".jsonl"):
        raise argparse.ArgumentTypeError(f"{text}: must end in .jsonl")
    return Path(text)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(
        prog=_NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=_lines_file, required=True, metavar="POSTS.jsonl", help="file to write")
    add("--query", default="{}", metavar="JSON", help="MongoDB filter, extended JSON")
    add("--since", metavar="T", help="posts from then on: 2026-01-31[T12:00], or 7d, 12h ago")
    add("--until", metavar="T", help="posts before then")
    add("--sample", type=count, metavar="N", help="so many, picked by a hash of the ID")
    add("--seed", type=_seed, default=0, metavar="N", help="another seed, another sample")
    add(
        "--min_posts_per_tag",
        type=count,
        default=0,
        metavar="N",
        help="leave out tags with fewer posts, and posts without any other tag; a sample keeps "
        "so many posts of each tag",
    )
    add("--limit", type=count, metavar="N", help="stop after so many posts")
    add("--untagged", action="store_true", help="only posts without a result")
    add("--page", type=count, default=1000, metavar="N", help="documents read at a time; 1000")
    add("--restart", action="store_true", help="forget an unfinished pull into the same file")
    add("--config", type=Path, metavar="F", help="settings, YAML; section store")
    add("--set", metavar="a.b=c", action="append", default=[], dest="overrides")
    return parser.parse_args(arguments)


def run(parsed: argparse.Namespace) -> int:
    """Pull; gives the exit code.

    Raises:
        TaggingError: One line that says what is wrong.
    """
    from corpus.pull.command import pull, query_of
    from corpus.pull.values import Options
    from deploy.embedded import SCHEME, resolve

    settings = load_settings(parsed.config, parsed.overrides)
    configure_logs(settings.log.format, settings.log.level)
    options = Options(
        store=settings.store,
        out=parsed.out,
        query=parsed.query,
        since=parsed.since,
        until=parsed.until,
        sample=parsed.sample,
        min_posts_per_tag=parsed.min_posts_per_tag,
        seed=parsed.seed,
        limit=parsed.limit,
        untagged=parsed.untagged,
        page=parsed.page,
        restart=parsed.restart,
    )
    query_of(options)  # before a service is started for it
    store = settings.store
    if store.url.startswith(SCHEME):
        # The queue is not needed: a URL of its own keeps it from being started.
        broker = settings.broker.model_copy(update={"url": "redis://unused"})
        store = resolve(settings.model_copy(update={"broker": broker})).store
    return pull(options, store)


def main(arguments: Sequence[str] | None = None) -> int:
    """Pull; gives the exit code."""
    parsed = parse(arguments)
    try:
        return run(parsed)
    except ConfigError as error:
        print(f"{_NAME}: {error}", file=sys.stderr)
        return 2
    except TaggingError as error:
        print(f"{_NAME}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
