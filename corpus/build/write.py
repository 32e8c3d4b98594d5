"""Second reading of the posts: the data files, the label map and what was left out."""

from __future__ import annotations
from common.files import write_whole

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.labels import LabelMap
from extractors.feature_file import feature_path
from corpus.build.index import Index
from corpus.build.sides import SIDES, Split
from corpus.lines import AtomicLines, DataFile, Form
from corpus.records import MEDIA_KEYS, CorpusPost, is_url, local_path, read_posts


@dataclass(frozen=True)
class Target:
    """What is written, and where.

    Attributes:
        out: Folder of the files.
        features: Root of the feature files.
        form: Of the data files.
    """

    out: Path
    features: Path
    labels: LabelMap
    form: Form


def write_files(
    posts: Path, target: Target, found: Index, split: Split, advance: Callable[[], None]
) -> dict[str, Path]:
    """Write ``<side>_cls<N>``, ``idx2name_cls<N>.json``, ``split.jsonl``, ``left_out.jsonl``.

    Returns:
        Side -> its data file.

    Raises:
        OSError: The disk is full, or gone.
    """
    kept = found.dealt()  # in the order of the lines
    following = next(kept, None)
    out, labels, form = target.out, target.labels, target.form
    files = {name: out / f"{name}_cls{len(labels)}.{form}" for name in split.names}
    with ExitStack() as stack:
        lists = {n: stack.enter_context(AtomicLines(path)) for n, path in files.items()}
        data = {name: DataFile(lines, form) for name, lines in lists.items()}
        sides = stack.enter_context(AtomicLines(out / "split.jsonl"))
        rejects = stack.enter_context(AtomicLines(out / "left_out.jsonl"))
        for entry in read_posts(posts):
            advance()
            if following is None or following[0] != entry.line:
                rejects.write(_reject(entry.line, posts, found, getattr(entry, "post", None)))
                continue
            (_, group, side), following = following, next(kept, None)
            if not isinstance(entry, CorpusPost):
                raise OSError(f"{posts}: changed while it was read")
            name = split.names[side]
            data[name].add(_entry(entry, posts, target))
            note = {"post_id": entry.post.post_id, "side": name, "group": group}
            sides.write(json.dumps(note, ensure_ascii=False))
        for each in data.values():
            each.end()
        for lines in (*lists.values(), sides, rejects):
            lines.sync()  # a full disk shows here, while the earlier files are still there
        # The files take their names one after another, the split before its sides: killed in
        # between, sides must be missing, never be of two different splits.
        for old in _earlier(out):
            old.unlink()
    text = json.dumps(labels.as_json(), ensure_ascii=False, indent=2)
    write_whole(out / f"idx2name_cls{len(labels)}.json", text)
    return files


def _earlier(out: Path) -> list[Path]:
    """Data files of an earlier run."""
    sides = [path for name in SIDES for path in out.glob(f"{name}_cls*.json*")]
    return [path for path in sides if path.is_file()]


def _reject(line: int, posts: Path, found: Index, post: Any) -> str:
    left = found.left_out(line)
    if left is None:
        raise OSError(f"{posts}: changed while it was read")
    reason, post_id, detail = left
    content = {
        "line": line,
        "post_id": post.post_id if post is not None else post_id,
        "reason": reason,
        "detail": detail,
    }
    return json.dumps(content, ensure_ascii=False)


def _entry(entry: CorpusPost, posts: Path, target: Target) -> dict[str, Any]:
    post, out, labels = entry.post, target.out, target.labels
    content: dict[str, Any] = {
        "post_id": post.post_id,
        "labels": [name for name in post.labels if name in labels.index],
        "text": post.text,
        "ocr": post.ocr,
    }
    for kind, key in MEDIA_KEYS.items():
        sources = [media.source for media in post.media if media.kind == kind]
        content[key] = [_relative(source, posts, out) for source in sources]
    content["features"] = _beside(feature_path(target.features, post.post_id), out)
    return content


def _relative(source: str, posts: Path, out: Path) -> str:
    path = None if is_url(source) else local_path(source, posts)
    return source if path is None else _beside(path, out)


def _beside(path: Path, out: Path) -> str:
    """The path as it is written in a file of the folder ``out``."""
    return os.path.relpath(path.absolute(), out.absolute())
