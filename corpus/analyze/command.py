"""The whole command: measure the media, read the posts, write the files, show the summary."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from common.cli import argument, option, share
from common.errors import ConfigError, TaggingError
from common.files import write_whole
from common.post import Post
from common.progress import Bars, notice, progress_bars
from config.labels import LabelMap
from corpus.analyze.advice import Files
from corpus.analyze.duplicates import GroupTally, find_groups, group_line
from corpus.analyze.media import MediaBase
from corpus.analyze.page import Cards, render
from corpus.analyze.report import show
from corpus.analyze.tally import Tally
from corpus.records import AtomicLines
from corpus.runs import only_one
from fusion.data.data_file import BadLine, CorpusPost, count_lines, read_posts

ANALYSIS, DUPLICATES, REPORT = "analysis.json", "duplicates.jsonl", "report.html"


def _threshold(text: str) -> float:
    value = share(text)
    if not value:
        raise typer.BadParameter(f"{text}: must be above 0 and at most 1")
    return value


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line of an analysis."""

    posts: Annotated[Path, argument("posts file or data file", "POSTS")]
    out: Annotated[Path, option("output folder", "DIR")]
    media: Annotated[
        Path | None,
        option(
            "where the media are: output of download_mp, or a folder; without it they are "
            "counted, not opened",
            "DIR",
        ),
    ] = None
    labels: Annotated[Path | None, option("label map to check the tags against", "F")] = None
    rare: Annotated[int, option("a tag with fewer posts is rare", "N", min=1)] = 10
    text_threshold: Annotated[
        float,
        option(
            "share of three-character sequences that similar texts have in common",
            "X",
            "--text_threshold",
            parser=_threshold,
        ),
    ] = 0.9
    hash_distance: Annotated[
        int,
        option(
            "bits of 64 in which similar pictures may differ", "N", "--hash_distance", min=0, max=16
        ),
    ] = 6
    processes: Annotated[int, option("that open media", "N", min=1)] = min(4, os.cpu_count() or 1)


def analyze(options: Options) -> None:
    """Analyse a posts file, write the three files, and show the summary."""
    names = None if options.labels is None else LabelMap.load(options.labels).names
    if options.media is not None and not options.media.is_dir():
        raise ConfigError(f"{options.media}: no such folder")
    if not options.posts.is_file():
        raise ConfigError(f"{options.posts}: no such file")
    state = options.out / ".state"
    with only_one(state / "lock", str(options.out)):
        for leftover in state.glob("work-*"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            facts = _analyze(options, state, names)
        except (sqlite3.Error, OSError) as error:
            text = getattr(error, "strerror", None) or str(error)
            raise TaggingError(
                f"stopped: {text}; make room, then run it again: what was measured is kept"
            ) from error
    show(facts)


def _analyze(options: Options, state: Path, taxonomy: tuple[str, ...] | None) -> dict[str, Any]:
    with (
        progress_bars() as bars,
        tempfile.TemporaryDirectory(prefix="work-", dir=state) as work,
        _media(options, state, bars) as media,
        closing(Tally(Path(work) / "tally.sqlite", media.fact if media else None)) as tally,
    ):
        groups = GroupTally(tally.labels_of)
        with AtomicLines(options.out / DUPLICATES) as lines:
            duplicates = find_groups(
                _counted(options.posts, tally, _ticker(bars, "posts", options.posts)),
                media.any_fact if media is not None else lambda source: None,
                text_threshold=options.text_threshold,
                hash_distance=options.hash_distance,
                file=Path(work) / "posts.sqlite",
            )
            tick = _ticker(bars, "groups", None)
            for group in duplicates:
                lines.write(group_line(group))
                groups.add(group)
                tick()
        facts = {
            "source": options.posts.name,
            "media_opened": media is not None,
            **tally.as_dict(),
            "labels": tally.labels.as_dict(options.rare, taxonomy),
            "duplicates": {
                "text_threshold": options.text_threshold,
                "hash_distance": options.hash_distance,
                **groups.as_dict(),
            },
        }
        files = Files(options.posts, options.out, options.media, options.labels)
        page = render(facts, files, Cards(tally, media))
    write_whole(options.out / ANALYSIS, json.dumps(facts, ensure_ascii=False, indent=1))
    write_whole(options.out / REPORT, page)
    return facts


@contextmanager
def _media(options: Options, state: Path, bars: Bars) -> Iterator[MediaBase | None]:
    """Return the media, measured; None where none are to be opened."""
    if options.media is None:
        yield None
        return
    base = MediaBase(state / "media.sqlite", options.posts, options.media)
    try:
        base.read_manifest(_ticker(bars, "manifest", options.media / "manifest.jsonl"))
        tick = _ticker(bars, "media of posts", options.posts)
        base.measure(_posts(options.posts, tick), options.processes)
        if base.measured:
            notice(f"{base.measured:,} files measured in this run")
        yield base
    finally:
        base.close()


def _posts(posts: Path, tick: Callable[[], None]) -> Iterator[Post]:
    for entry in read_posts(posts):
        tick()
        if isinstance(entry, CorpusPost):
            yield entry.post


def _counted(posts: Path, tally: Tally, tick: Callable[[], None]) -> Iterator[CorpusPost]:
    """Yield the posts that are counted, each post_id once."""
    for entry in read_posts(posts):
        tick()
        if isinstance(entry, BadLine):
            tally.reject(entry)
        elif tally.add(entry):
            yield entry


def _ticker(bars: Bars, what: str, lines: Path | None) -> Callable[[], None]:
    """Return what advances a bar by one; its end is known for a file of lines."""
    counted = lines is not None and lines.suffix.lower() != ".json" and lines.is_file()
    return bars.add(what, count_lines(lines) if lines and counted else None).advance
