"""Download the media of posts: many connections at once, the daemon's own safety limits.

Reads a posts file (*.jsonl) or a data file (*.json). Writes DIR/media (each content once, by its
hash), DIR/manifest.jsonl (a line per media with its status and reason), DIR/posts.jsonl (the posts
with local paths), DIR/rejected.jsonl (lines that are no posts) and DIR/summary.json. Run it again
after whatever ended it, and it goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a plain script too

from common.cli import Script, json_report
from corpus.download.values import Options


def _run(options: Options) -> None:
    _ = options.fetch  # a wrong setting is told before anything is made
    from corpus.download.run import download

    with json_report(options.as_json) as report:
        download(options, report)


SCRIPT = Script("download_mp", Options, _run, about=__doc__)
main = SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
