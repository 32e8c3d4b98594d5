"""Make demo posts with real media: JPEG, PNG, MP4 (H.264 + AAC), WAV, OGG, text in two languages.

Writes ``DIR/posts.json``, in the data-file format with paths relative to DIR, and ``DIR/media/``.
The same seed, split and number of posts give the same posts.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a plain script too

from common.cli import OneLineParser, count, natural, share
from demo.posts.make import DATA_FILE, make_posts
from demo.posts.plan import SPLITS, plan_posts


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(prog="make_demo_posts", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--posts", type=count, required=True, help="number of posts")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train", help="splits share no post")
    parser.add_argument("--noise", type=share, default=0.0, help="disturbance, 0 to 1")
    parser.add_argument(
        "--missing", type=share, default=0.0, help="chance that a needed modality is left out"
    )
    parser.add_argument("--processes", type=count, default=os.cpu_count() or 1)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Make the posts; gives the exit code."""
    options = parse(arguments)
    from common.progress import track

    plans = plan_posts(
        options.posts, options.seed, options.split, noise=options.noise, missing=options.missing
    )
    made = make_posts(options.out, plans, options.processes)
    try:
        for _ in track(made, f"{options.split} posts", len(plans)):
            pass
    except OSError as error:
        print(f"make_demo_posts: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_demo_posts: interrupted", file=sys.stderr)
        return 1
    print(f"{len(plans)} posts: {options.out / DATA_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
