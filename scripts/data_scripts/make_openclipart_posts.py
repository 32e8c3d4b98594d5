"""Make the posts of a real benchmark out of Debian's openclipart packages (public domain).

Writes ``DIR/posts.json``, in the data-file format, and ``DIR/idx2name.json``, the label map. A
post is one drawing: its PNG, its title and description as text, its keywords as labels, and its
author, so that ``build_trainval_data.py`` never puts one author on two sides.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a plain script too

from common.cli import Script, option
from common.errors import ConfigError
from config.labels import LabelMap


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line."""

    out: Annotated[Path, option("folder to write to")]
    source: Annotated[Path, option("folder with svg/ and png/ of the packages")] = Path(
        "/usr/share/openclipart"
    )
    min_posts: Annotated[
        int, option("posts that a label has at least", None, "--min_posts", min=1)
    ] = 20


def run(line: CommandLine) -> None:
    from common.files import write_whole
    from common.progress import notice
    from corpus.openclipart import choose_labels, read_drawings

    drawings, broken = read_drawings(line.source)
    for path in broken:
        notice(f"{path}: left out, not readable as SVG")
    labels = choose_labels(drawings, line.min_posts)
    if not labels:
        raise ConfigError(
            f"--min_posts {line.min_posts}: no keyword of {len(drawings)} drawings has as many"
        )
    labelled = [drawing for drawing in drawings if drawing.keywords & labels.keys()]
    posts = [
        {
            "post_id": drawing.post_id,
            "labels": sorted(drawing.keywords & labels.keys()),
            "text": drawing.text,
            "ocr": None,
            "images": [str(drawing.picture.resolve())],
            "videos": [],
            "audios": [],
            "features": "",
            "author": drawing.author,
        }
        for drawing in labelled
    ]
    line.out.mkdir(parents=True, exist_ok=True)
    names = LabelMap(tuple(labels)).as_json()
    write_whole(line.out / "idx2name.json", json.dumps(names, ensure_ascii=False, indent=1))
    write_whole(line.out / "posts.json", json.dumps(posts, ensure_ascii=False, indent=1))
    authors = {drawing.author or drawing.post_id for drawing in labelled}
    per_post = sum(len(drawing.keywords & labels.keys()) for drawing in labelled) / len(labelled)
    print(
        f"{len(posts)} posts of {len(authors)} authors, {len(labels)} labels, "
        f"{per_post:.2f} a post: {line.out / 'posts.json'}"
    )


main = Script("make_openclipart_posts", CommandLine, run, about=__doc__).main

if __name__ == "__main__":
    sys.exit(main())
