"""Pull posts from the database into a posts file (JSON lines), in the order of _id.

store.fields of the settings says where a document has its text and its media. Next to POSTS.jsonl
it writes POSTS.rejected.jsonl (documents that are not posts, with the reason) and
POSTS.summary.json (how many were left out, and why). If it was interrupted, run it again: it
continues where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a plain script too

from common.cli import Script
from common.logs import configure_logs
from config.load import load_settings
from corpus.pull.command import Options, pull, query_of


def _run(options: Options) -> int:
    from deploy.embedded import resolve

    settings = load_settings(options.config, options.overrides)
    configure_logs(settings.log.format, settings.log.level)
    query_of(options)  # before a service is started for it
    return pull(options, resolve(settings, ("mongo",)).store)


SCRIPT = Script("pull_posts", Options, _run, about=__doc__)
main = SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
