"""The command line of ``build_trainval_data.py``, and the files that it writes."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from common.cli import JsonReport, Script, json_report, option, say
from common.errors import ConfigError, TaggingError
from common.files import write_whole
from common.post import MODALITIES
from common.progress import progress_bar
from common.times import since_time
from config.labels import LabelMap
from corpus.build.index import SIDES, Check, Gatherer, Index, Rules, Unknown
from corpus.build.sides import Split, split
from corpus.records import AtomicLines, DataFile, Form, Summary
from extractors.feature_file import feature_path
from fusion.data.data_file import MEDIA_KEYS, CorpusPost, local_path, objects, read_posts


def _write_files(
    options: Options, labels: LabelMap, index: Index, split: Split, advance: Callable[[], None]
) -> list[Path]:
    """Write ``<side>_cls<N>``, ``idx2name_cls<N>.json``, ``split.jsonl``, ``left_out.jsonl``."""
    posts_dealt = index.dealt()  # in the order of the lines
    following = next(posts_dealt, None)
    posts, out, form = options.input, options.out, options.format
    files = {name: out / f"{name}_cls{len(labels)}.{form}" for name in split.names}
    with ExitStack() as stack:
        lists = {n: stack.enter_context(AtomicLines(path)) for n, path in files.items()}
        data = {name: DataFile(lines, form) for name, lines in lists.items()}
        sides = stack.enter_context(AtomicLines(out / "split.jsonl"))
        rejects = stack.enter_context(AtomicLines(out / "left_out.jsonl"))
        for entry in read_posts(posts):
            advance()
            if following is None or following[0] != entry.line:
                rejects.write(_reject(entry.line, posts, index, getattr(entry, "post", None)))
                continue
            (_, group, side), following = following, next(posts_dealt, None)
            if not isinstance(entry, CorpusPost):
                raise OSError(f"{posts}: changed while it was read")
            name = SIDES[side]
            data[name].add(_entry(entry, options, labels))
            note = {"post_id": entry.post.post_id, "side": name, "group": group}
            sides.write(json.dumps(note, ensure_ascii=False))
        for each in data.values():
            each.end()
        for lines in (*lists.values(), sides, rejects):
            lines.sync()  # a full disk shows here, while the earlier files are still there
        # The files take their names one after another, the split before its sides: killed in
        # between, sides must be missing, never be of two different splits.
        for path in [path for side in SIDES for path in out.glob(f"{side}_cls*.json*")]:
            path.unlink()
    text = json.dumps(labels.as_json(), ensure_ascii=False, indent=2)
    write_whole(out / f"idx2name_cls{len(labels)}.json", text)
    return list(files.values())


def _reject(line: int, posts: Path, index: Index, post: Any) -> str:
    rejected = index.left_out(line)
    if rejected is None:
        raise OSError(f"{posts}: changed while it was read")
    reason, post_id, detail = rejected
    known = post.post_id if post is not None else post_id
    content = {"line": line, "post_id": known, "reason": reason, "detail": detail}
    return json.dumps(content, ensure_ascii=False)


def _entry(entry: CorpusPost, options: Options, labels: LabelMap) -> dict[str, Any]:
    post, out = entry.post, options.out
    content: dict[str, Any] = {
        "post_id": post.post_id,
        "labels": [name for name in post.labels if name in labels.index],
        "text": post.text,
        "ocr": post.ocr,
    }
    for kind, key in MEDIA_KEYS.items():
        content[key] = []
        for source in (media.source for media in post.media if media.kind == kind):
            path = local_path(source, options.input)
            content[key].append(source if path is None else _relative(path, out))
    if options.features is not None:
        content["features"] = _relative(feature_path(options.features, post.post_id), out)
    return content


def _relative(path: Path, out: Path) -> str:
    return os.path.relpath(path.absolute(), out.absolute())


_SHOWN_MOVES = 20  # a screen; the rest can be seen by comparing the two split.jsonl
_ABOUT = (
    "Split posts into training, validation and test files, without leakage.\n\n"
    "Labels and features are joined. Posts that share an author, a medium, a text or a group of "
    "near-duplicates are never on two sides."
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line; in code ``features`` may be None, for a split before the extraction."""

    input: Annotated[Path, option("posts, *.jsonl or *.json", "F")]
    features: Annotated[Path | None, option("root of the feature files", "DIR")]
    labels: Annotated[Path, option("label map, idx2name_cls*.json", "F")]
    out: Annotated[Path, option("folder of the data files", "DIR")]
    valid: Annotated[float | None, option("share of validation, 0.1; 0 leaves it out", "X")] = None
    test: Annotated[float | None, option("share of test, 0.1; 0 leaves it out", "X")] = None
    split: Annotated[
        Path | None,
        option(
            'the exact split: {"train": [post_id, ...], "valid": [...], "test": [...]}, or lines '
            "as of split.jsonl; posts that it does not name are left out",
            "F",
        ),
    ] = None
    test_since: Annotated[
        str | None,
        option(
            "test on every post created since then: 2026-01-31[T12:00], or 7d, 12h ago",
            "T",
            "--test_since",
        ),
    ] = None
    seed: Annotated[int, option("of every draw", "N", min=0)] = 0
    manifest: Annotated[Path | None, option("of download_mp: which media are the same", "F")] = None
    duplicates: Annotated[Path | None, option("duplicates.jsonl of analyze_posts", "F")] = None
    keep: Annotated[
        Path | None,
        option(
            "an earlier split.jsonl: its posts keep their side, unless linked with a later one; "
            "those are named before anything is written",
            "F",
        ),
    ] = None
    unknown: Annotated[Unknown, option("what to do with a label that is not in the map")] = "error"
    check: Annotated[Check, option("read the headers of feature files, or every number")] = "quick"
    modalities: Annotated[
        list[str],
        typer.Option(
            metavar="M...",
            default_factory=list,
            show_default=False,
            help="leave out posts without any of these",
        ),
    ]
    format: Annotated[Form, option("of the data files")] = "json"
    as_json: JsonReport = False


def _run(options: Options) -> None:
    with json_report(options.as_json) as report:
        files = build(options)
        say("".join(f"{path}\n" for path in files))
        summary = (options.out / "summary.json").read_text(encoding="utf-8")
        report |= {"files": files, **json.loads(summary)}


SCRIPT = Script(
    "build_trainval_data.py",
    Options,
    _run,
    about=_ABOUT,
    many=("--modalities",),
    interrupted="interrupted; nothing was changed, run it again",
)
main = SCRIPT.main


def build(options: Options) -> list[Path]:
    """Write the data files of a split, show what they hold, and return them."""
    try:
        return _built(options)
    except sqlite3.Error as error:
        where = "index in the temporary folder (TMPDIR names another)"
        raise TaggingError(f"{where}: {error}") from error


def _built(options: Options) -> list[Path]:
    shares = _shares(options)
    labels = LabelMap.load(options.labels)
    odd = [name for name in options.modalities if name not in MODALITIES]
    if odd:
        raise ConfigError(f"--modalities {odd[0]}: must be one of {', '.join(MODALITIES)}")
    modalities = tuple(name for name in MODALITIES if name in options.modalities)
    exact = options.split is not None or options.test_since is not None
    rules = Rules(
        options.unknown,
        options.check,
        modalities,
        exact=options.split is not None,
        test_since=since_time(options.test_since, time.time(), "--test_since"),
    )
    with Index() as index:
        _read_manifest(options.manifest, index)
        for post_id, side in _given_sides(options, shares):
            index.give_side(post_id, side)
        with progress_bar("reading", None) as bar:
            Gatherer(labels, options.features, rules, index).read(options.input, bar.advance)
        if not len(index):
            _show(index, None, labels, options.out)
            raise ConfigError(f"{options.input}: no post can be trained on")
        index.link(_duplicate_groups(options.duplicates), within_sides=exact)
        dealt = split(index, labels, shares, options.seed)
        if not dealt.posts.all():
            empty = next(n for n, c in zip(dealt.names, dealt.posts, strict=True) if not c)
            raise ConfigError(f"{empty}: no usable post is left for it")
        if options.keep is not None and dealt.moved:
            _tell_moves(index, options.keep, _given_sides(options, shares), dealt.moved)
        with progress_bar("writing", None) as bar:
            files = _write_files(options, labels, index, dealt, bar.advance)
        _show(index, dealt, labels, options.out, exact=exact)
    return files


def _shares(options: Options) -> tuple[float, float, float]:
    ways = {"--split": options.split, "--test_since": options.test_since, "--keep": options.keep}
    chosen = [name for name, value in ways.items() if value is not None]
    if len(chosen) > 1:
        raise ConfigError(
            f"{chosen[0]}: not allowed with {chosen[1]}: each of them assigns the sides"
        )
    fixed = {"--split": ("valid", "test"), "--test_since": ("test",)}
    for name in fixed.get(chosen[0], ()) if chosen else ():
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name}: not allowed with {chosen[0]}, which decides its posts")
    if options.split is not None:
        return 0.0, 0.0, 0.0
    valid = 0.1 if options.valid is None else options.valid
    test = 0.1 if options.test is None else options.test
    if options.test_since is not None:
        test = 0.0
    if valid < 0 or test < 0:
        raise ConfigError(f"--valid {valid:g} --test {test:g}: a share is 0 or more, below 1")
    if not valid + test < 1:
        raise ConfigError(f"--valid {valid:g} --test {test:g}: nothing would be left for training")
    return 1 - valid - test, valid, test


def _given_sides(options: Options, shares: tuple[float, float, float]) -> Iterator[tuple[str, int]]:
    """Yield each post of ``--split`` or ``--keep`` with its side; lists by side, or our lines."""
    path = options.split or options.keep
    for where, content in [] if path is None else objects(path):
        line = "post_id" in content and "side" in content
        for name, ids in [(content["side"], [content["post_id"]])] if line else content.items():
            if name not in SIDES or not isinstance(ids, list):
                raise ConfigError(f"{where}: {name!r} must be one of {', '.join(SIDES)}, with IDs")
            side = SIDES.index(name)
            for post_id in ids:
                if not isinstance(post_id, str):
                    raise ConfigError(f"{where}: {name}: a post_id must be a text: got {post_id!r}")
                if options.split is not None or shares[side] > 0:
                    yield post_id, side


def _tell_moves(index: Index, keep: Path, assigned: Iterator[tuple[str, int]], count: int) -> None:
    """Say which posts leave the side of the earlier split, before anything is written."""
    moves = (
        f"  {post_id}: {SIDES[side]} -> {SIDES[now]}\n"
        for post_id, side in assigned
        if (now := index.side_of(post_id)) is not None and now != side
    )
    say(f"--keep {keep}: {count} posts move, linked with posts of a later side\n")
    say("".join(islice(moves, _SHOWN_MOVES)))
    if count > _SHOWN_MOVES:
        say(f"  and {count - _SHOWN_MOVES} more\n")
    sys.stdout.flush()


def _read_manifest(manifest: Path | None, index: Index) -> None:
    """Add the hashes of a manifest's media to the index."""
    for _, content in [] if manifest is None else objects(manifest):
        digest = content.get("sha256")
        if content.get("status") == "ok" and isinstance(digest, str):
            for source in (content.get("source"), content.get("path")):
                if isinstance(source, str):
                    index.add_medium(source, digest)


def _duplicate_groups(path: Path | None) -> Iterator[tuple[str, ...]]:
    """Yield the post IDs of each group of ``duplicates.jsonl``."""
    for where, content in [] if path is None else objects(path):
        members = content.get("members")
        if not isinstance(members, list) or not all(isinstance(m, str) for m in members):
            raise ConfigError(f"{where}: a group must have members, a list of post IDs")
        yield tuple(members)


def _show(
    index: Index, dealt: Split | None, labels: LabelMap, out: Path, *, exact: bool = False
) -> None:
    """Show the summary, and write ``summary.json``."""
    summary = Summary("training data")
    summary.done(len(index))
    for reason, count in index.reasons().items():
        summary.failed(reason, count)
    if index.dropped_tags:
        summary.figures["labels passed over"] = sum(index.dropped_tags.values())
    if dealt is not None:
        for name, count in zip(dealt.names, dealt.posts, strict=True):
            summary.figures[f"{name} posts"] = int(count)
        summary.figures["groups"] = dealt.groups
        summary.figures["largest group"] = dealt.largest_group
        worst, tag = dealt.worst()
        if tag >= 0:
            worst_tag = f"{worst:.1%} ({labels.names[tag]})"
            summary.figures["largest deviation of a tag's share"] = worst_tag
        if exact and (crossing := index.split_links()):
            summary.figures["authors, media and texts on two sides"] = crossing
        if dealt.moved:
            summary.figures["moved by new links"] = dealt.moved
        absent = [n for n, c in zip(labels.names, dealt.counts.sum(axis=0), strict=True) if not c]
        if absent:
            summary.figures["tags without posts"] = ", ".join(absent[:20])
        if dealt.largest_group > 0.5 * min(dealt.posts):
            summary.figures["note"] = "the largest group is over half of the smallest side"
    summary.show()
    if dealt is None:
        return
    by_tag = {
        name: {side: int(dealt.counts[i, tag]) for i, side in enumerate(dealt.names)}
        for tag, name in enumerate(labels.names)
    }
    content = {**summary.as_dict(), "passed_over": dict(sorted(index.dropped_tags.items()))}
    text = json.dumps({**content, "tags": by_tag}, ensure_ascii=False, indent=2)
    write_whole(out / "summary.json", text)
