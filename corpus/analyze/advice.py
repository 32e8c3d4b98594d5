"""The steps to take after an analysis, derived from its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common.html import Advice, command, counted
from corpus.analyze.media import NO_FILE

# Steps that a person takes before looking again; more are not read.
_MOST = 6
_SHOWN = 4
# A larger share of posts without tags is worth a sentence.
_UNTAGGED = 0.02


class Files(NamedTuple):
    """The arguments of the analysis's command line."""

    posts: Path
    out: Path
    media: Path | None = None
    labels: Path | None = None


def next_steps(facts: Mapping[str, Any], files: Files) -> list[Advice]:
    """Return the steps that follow from the figures of ``analysis.json``, the most useful first."""
    map_of = files.labels or "LABELS.json"
    split = command(
        *("python", "scripts/build_trainval_data.py", "--input", files.posts),
        *("--features", "FEATURES", "--labels", map_of, "--out", "DATA"),
        *("--duplicates", files.out / "duplicates.jsonl"),
    )
    last = Advice(
        "Extract features (scripts/extract_*_features.py), then split the posts so that duplicates "
        "stay on one side.",
        split,
    )
    return [*list(_steps(facts, files, str(map_of)))[:_MOST], last]


def _steps(facts: Mapping[str, Any], files: Files, map_of: str) -> Iterator[Advice]:
    posts, labels, duplicates = facts["posts"], facts["labels"], facts["duplicates"]
    if posts["left_out"]:
        reason, lines = next(iter(posts["left_out"].items()))
        yield Advice(
            f"Repair {counted(sum(posts['left_out'].values()), 'line')} of {files.posts.name} that "
            f"could not be read, most often ({lines:,}): {reason}."
        )
    yield from _media(facts, files)
    if differ := sum(kind["labels_differ"] for kind in duplicates["kinds"].values()):
        names = ", ".join(list(duplicates["disputed_tags"])[:_SHOWN])
        yield Advice(
            f"Decide on the tags of {counted(differ, 'group')} of duplicates that have different "
            f"ones (most often {names}), which come first under Groups of duplicates: a model "
            "cannot learn both."
        )
    for names in labels["variants"][:1]:
        first, *others = names
        others_count = len(labels["variants"]) - 1
        more = f" (and of {counted(others_count, 'other group')})" if others_count else ""
        yield Advice(
            f"Make one tag of {' and '.join(names)}{more}.",
            command("insighttag", "labels", "merge", map_of, first, *others, "--into", first),
        )
    if labels["map"] is not None and labels["map"]["unknown"]:
        unknown = labels["map"]["unknown"]
        yield Advice(
            f"Take {counted(len(unknown), 'tag')} into the label map, or out of the posts: "
            f"{', '.join(list(unknown)[:_SHOWN])}.",
            command(
                *("python", "scripts/build_label_map.py", "--input", files.posts),
                *("--base", map_of, "--min_posts", labels["rare_below"]),
            ),
        )
    elif 0 < len(labels["rare"]) < labels["distinct"] and labels["map"] is None:
        yield Advice(
            f"Leave out {counted(len(labels['rare']), 'tag')} of {labels['distinct']:,} with fewer "
            f"than {labels['rare_below']:,} posts, or label more posts of them: "
            f"{', '.join(list(labels['rare'])[:_SHOWN])}.",
            command(
                *("python", "scripts/build_label_map.py", "--input", files.posts),
                *("--min_posts", labels["rare_below"], "--out", map_of),
            ),
        )
    if posts["without_labels"] > _UNTAGGED * posts["kept"]:
        share = posts["without_labels"] / posts["kept"]
        yield Advice(
            f"Label some of the {posts['without_labels']:,} posts without tags ({share:.0%}): as "
            "they are, they teach that no tag applies."
        )


def _media(facts: Mapping[str, Any], files: Files) -> Iterator[Advice]:
    media = facts["media"].values()
    uses = sum(kind["uses"] for kind in media)
    if uses and not facts["media_opened"]:
        yield Advice(
            f"Open the {uses:,} media as well: copies and broken files are not known yet.",
            command(
                *("python", "scripts/data_scripts/analyze_posts.py", files.posts),
                *("--media", "MEDIA", "--out", files.out),
            ),
        )
    reasons = [(n, reason) for kind in media for reason, n in kind["broken"].items()]
    if reasons:
        count, reason = max(reasons)
        yield Advice(
            f"Fetch or replace {counted(sum(n for n, _ in reasons), 'file')} that are broken or "
            f"missing, most often ({count:,}): {reason}.",
            ""
            if reason == NO_FILE
            else command(
                *("python", "scripts/data_scripts/download_mp.py", files.posts),
                *("--out", files.media, "--retry_failed"),
            ),
        )
