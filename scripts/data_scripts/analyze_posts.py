"""Look at posts before training on them: tags, texts, media, duplicates, suspicious labels.

Reads a posts file (*.jsonl) or a data file (*.json). Shows a summary, and writes DIR/report.html
(one file, no network), DIR/analysis.json (the same figures) and DIR/duplicates.jsonl (groups of
posts that share a medium, a picture or a text, for build_trainval_data). With --media the files
are opened; run it again after whatever ended it, and none is opened twice.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a plain script too

from common.cli import OneLineParser, count, number, whole_number
from common.errors import ConfigError, TaggingError
from corpus.analyze.command import ANALYSIS, DUPLICATES, REPORT, Options, analyze

_NAME = "analyze_posts"


def _threshold(text: str) -> float:
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most 1")
    return value


def _bits(text: str) -> int:
    value = whole_number(text)
    if not 0 <= value <= 16:
        raise argparse.ArgumentTypeError(f"{text}: must lie in 0 to 16")
    return value


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = OneLineParser(
        prog=_NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("posts", type=Path, metavar="POSTS", help="posts file or data file")
    add("--out", type=Path, required=True, metavar="DIR", help="output folder")
    add("--media", type=Path, metavar="DIR", help="where the media lie: output of download_mp, "
        "or a folder; without it they are counted, not opened")  # fmt: skip
    add("--labels", type=Path, metavar="F", help="label map to hold the tags against")
    add("--rare", type=count, default=10, metavar="N", help="fewer posts are rare; 10")
    add("--text_threshold", type=_threshold, default=0.9, metavar="X",
        help="share of their runs of three characters that alike texts share; 0.9")  # fmt: skip
    add("--hash_distance", type=_bits, default=6, metavar="N",
        help="bits of 64 in which pictures that look alike may differ; 6")  # fmt: skip
    add("--processes", type=count, default=min(4, os.cpu_count() or 1), metavar="N",
        help="that open media")  # fmt: skip
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Analyse; gives the exit code."""
    options = parse(arguments)
    try:
        analyze(options)
    except ConfigError as error:
        print(f"{_NAME}: {error}", file=sys.stderr)
        return 2
    except TaggingError as error:
        print(f"{_NAME}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{_NAME}: interrupted; run it again: what is measured stays", file=sys.stderr)
        return 1
    print(", ".join(str(options.out / name) for name in (REPORT, ANALYSIS, DUPLICATES)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
