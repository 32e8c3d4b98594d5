"""A label map out of labelled posts: the command line of ``build_label_map.py``."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError, TaggingError
from common.files import write_whole
from common.progress import progress_bar
from config.labels import LabelMap
from common.cli import OneLineParser, count
from corpus.records import BadLine, read_posts

NAME = "build_label_map.py"
_SHOWN = 20


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(
        prog=NAME,
        description="Make a label map, index to name, from the labels of posts. Tags stand in the "
        "order of their number of posts, equal ones by name; with --base the tags of an earlier "
        "map keep their index and new ones follow.",
    )
    add = parser.add_argument
    add(
        "--input", type=Path, nargs="+", required=True, metavar="F", help="posts, *.jsonl or *.json"
    )
    add("--out", type=Path, metavar="F", help="default: config/idx2name_cls<N>.json")
    add("--min_posts", type=count, default=1, metavar="N", help="leave out tags with fewer posts")
    add("--base", type=Path, metavar="F", help="a label map whose indices stay")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Make the map; 0 done, 2 the input is wrong, 1 anything else."""
    options = parse(arguments)
    try:
        counts, broken, bare = count_labels(options.input)
        base = LabelMap.load(options.base) if options.base is not None else None
        labels = order_labels(counts, options.min_posts, base)
    except TaggingError as error:
        sys.stderr.write(f"{NAME}: {error}\n")
        return 2
    out = options.out or Path(f"config/idx2name_cls{len(labels)}.json")
    try:
        write_whole(out, json.dumps(labels.as_json(), ensure_ascii=False, indent=2))
    except OSError as error:
        sys.stderr.write(f"{NAME}: {out}: {error.strerror or error}\n")
        return 1
    _tell(labels, counts, base)
    if broken or bare:
        sys.stdout.write(f"left out: {broken} broken lines, {bare} posts without labels\n")
    sys.stdout.write(f"{len(labels)} tags: {out}\n")
    return 0


def count_labels(files: Sequence[Path]) -> tuple[Counter[str], int, int]:
    """Posts of each tag, broken lines, and posts without labels.

    Raises:
        ConfigError: A file cannot be read.
    """
    counts: Counter[str] = Counter()
    broken = bare = 0
    with progress_bar("posts", None) as bar:
        for file in files:
            for entry in read_posts(file):
                bar.advance()
                if isinstance(entry, BadLine):
                    broken += 1
                elif not entry.post.labels:
                    bare += 1
                else:
                    counts.update(set(entry.post.labels))
    return counts, broken, bare


def order_labels(counts: Counter[str], min_posts: int, base: LabelMap | None = None) -> LabelMap:
    """The map: tags of the base where they were, then the others by number of posts.

    Raises:
        ConfigError: No tag is left.
    """
    known = base.names if base is not None else ()
    new = [name for name, count in counts.items() if count >= min_posts and name not in known]
    new.sort(key=lambda name: (-counts[name], name))
    if not known and not new:
        raise ConfigError(f"no tag has {min_posts} posts or more")
    return LabelMap((*known, *new))


def _tell(labels: LabelMap, counts: Counter[str], base: LabelMap | None) -> None:
    known = len(base) if base is not None else 0
    for index, name in list(enumerate(labels.names))[:_SHOWN]:
        new = "  new" if base is not None and index >= known else ""
        sys.stdout.write(f"{index:>5}  {counts[name]:>9,}  {name}{new}\n")
    if len(labels) > _SHOWN:
        sys.stdout.write(f"  ...  {len(labels) - _SHOWN} more\n")
    rare = [name for name in counts if name not in labels.index]
    if rare:
        rare.sort(key=lambda name: (-counts[name], name))
        shown = ", ".join(f"{name} ({counts[name]})" for name in rare[:_SHOWN])
        sys.stdout.write(f"too few posts: {len(rare)} tags: {shown}\n")
