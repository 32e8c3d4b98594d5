"""A label map out of labelled posts: the command line of ``build_label_map.py``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.cli import Script, option, say
from common.errors import ConfigError
from common.files import write_whole
from common.progress import progress_bar
from config.labels import LabelMap
from fusion.data.data_file import BadLine, read_posts

_ABOUT = (
    "Make a label map, index to name, from the labels of posts.\n\nTags stand in the order of "
    "their number of posts, equal ones by name; with --base the tags of an earlier map keep their "
    "index and new ones follow."
)
_SHOWN = 20  # tags that the terminal shows


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    input: Annotated[list[Path], option("posts, *.jsonl or *.json", "F...")]
    out: Annotated[Path | None, option("default: config/idx2name_cls<N>.json", "F")] = None
    min_posts: Annotated[
        int, option("leave out tags with fewer posts", "N", "--min_posts", min=1)
    ] = 1
    base: Annotated[Path | None, option("a label map whose indices stay", "F")] = None


def _make(options: Options) -> None:
    counts, broken, bare = count_labels(options.input)
    base = LabelMap.load(options.base) if options.base is not None else None
    labels = order_labels(counts, options.min_posts, base)
    out = options.out or Path(f"config/idx2name_cls{len(labels)}.json")
    write_whole(out, json.dumps(labels.as_json(), ensure_ascii=False, indent=2))
    _tell(labels, counts, base)
    if broken or bare:
        say(f"left out: {broken} broken lines, {bare} posts without labels\n")
    say(f"{len(labels)} tags: {out}\n")


SCRIPT = Script("build_label_map.py", Options, _make, about=_ABOUT, many=("--input",))
main = SCRIPT.main


def count_labels(files: Sequence[Path]) -> tuple[Counter[str], int, int]:
    """Count the posts of each tag, broken lines, and posts without labels."""
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
    """Return the map: tags of the base where they were, then the others by number of posts."""
    base_names = base.names if base is not None else ()
    names = (name for name, count in counts.items() if count >= min_posts)
    new = [name for name in names if base is None or name not in base.index]
    new.sort(key=lambda name: (-counts[name], name))
    if not base_names and not new:
        raise ConfigError(f"no tag has {min_posts} posts or more")
    return LabelMap((*base_names, *new))


def _tell(labels: LabelMap, counts: Counter[str], base: LabelMap | None) -> None:
    base_count = len(base) if base is not None else 0
    for index, name in list(enumerate(labels.names))[:_SHOWN]:
        new = "  new" if base is not None and index >= base_count else ""
        say(f"{index:>5}  {counts[name]:>9,}  {name}{new}\n")
    if len(labels) > _SHOWN:
        say(f"  ...  {len(labels) - _SHOWN} more\n")
    rare = [name for name in counts if name not in labels.index]
    if rare:
        rare.sort(key=lambda name: (-counts[name], name))
        shown = ", ".join(f"{name} ({counts[name]})" for name in rare[:_SHOWN])
        say(f"too few posts: {len(rare)} tags: {shown}\n")
