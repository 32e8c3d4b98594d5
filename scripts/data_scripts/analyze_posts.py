"""Look at posts before training on them: tags, texts, media, duplicates, suspicious labels.

Reads a posts file (*.jsonl) or a data file (*.json). Shows a summary, and writes DIR/report.html
(one file, no network), DIR/analysis.json (the same figures) and DIR/duplicates.jsonl (groups of
posts that share a medium, a picture or a text, for build_trainval_data). With --media the files
are opened; run it again after whatever ended it, and none is opened twice.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a plain script too

from common.cli import exit_code, read_options
from corpus.analyze.command import ANALYSIS, DUPLICATES, REPORT, Options, analyze

_NAME = "analyze_posts"


def _run(options: Options) -> None:
    analyze(options)
    print(", ".join(str(options.out / name) for name in (REPORT, ANALYSIS, DUPLICATES)))


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code(
        _NAME,
        lambda: _run(read_options(Options, _NAME, arguments, about=__doc__)),
        interrupted="interrupted; run it again: what is measured stays",
    )


if __name__ == "__main__":
    sys.exit(main())
