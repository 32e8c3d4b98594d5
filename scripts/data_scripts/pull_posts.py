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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a plain script too

from common.cli import exit_code, read_options
from common.logs import configure_logs
from config.load import load_settings
from corpus.pull.command import Options, pull, query_of

_NAME = "pull_posts"


def _run(options: Options) -> int:
    from deploy.embedded import resolve

    settings = load_settings(options.config, options.overrides)
    configure_logs(settings.log.format, settings.log.level)
    query_of(options)  # before a service is started for it
    return pull(options, resolve(settings, ("mongo",)).store)


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code(_NAME, lambda: _run(read_options(Options, _NAME, arguments, about=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
