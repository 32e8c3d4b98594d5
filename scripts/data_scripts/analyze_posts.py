"""Look at posts before training on them: tags, texts, media, duplicates, suspicious labels.

Reads a posts file (*.jsonl) or a data file (*.json). Shows a summary, and writes DIR/report.html
(one file, no network), DIR/analysis.json (the same figures) and DIR/duplicates.jsonl (groups of
posts that share a medium, a picture or a text, for build_trainval_data). With --media the files
are opened; run it again after whatever ended it, and none is opened twice.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a plain script too

from common.cli import Script
from corpus.analyze.command import ANALYSIS, DUPLICATES, REPORT, Options, analyze


def _run(options: Options) -> None:
    analyze(options)
    print(", ".join(str(options.out / name) for name in (REPORT, ANALYSIS, DUPLICATES)))


SCRIPT = Script(
    "analyze_posts",
    Options,
    _run,
    about=__doc__,
    interrupted="interrupted; run it again: what was measured is kept",
)
main = SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
