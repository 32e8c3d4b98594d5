"""The summary on the terminal, and numbers and names as people read them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

_TOP = 15

_LANGUAGES = {
    "ar": "Arabic",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "hi": "Hindi",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ru": "Russian",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "vi": "Vietnamese",
    "zh": "Chinese",
}

KIND_NAMES = {
    "exact_media": "the same file",
    "near_image": "pictures that look alike",
    "near_text": "nearly the same text",
}


def show(facts: Mapping[str, Any]) -> None:
    """Print what a person wants to know first."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for title, heads, rows in _tables(facts):
        if rows:
            console.print(_table(title, heads, rows))


def _tables(
    facts: Mapping[str, Any],
) -> list[tuple[str, Sequence[str], Sequence[Sequence[str]]]]:
    labels, posts = facts["labels"], facts["posts"]
    total = posts["kept"]
    left_out = [(reason, f"{count:,}") for reason, count in posts["left_out"].items()]
    counts = list(labels["counts"].items())
    title = (
        f"{len(counts):,} tags" if len(counts) <= _TOP else f"Top {_TOP} of {len(counts):,} tags"
    )
    tags = [(name, f"{n:,}", share(n, total)) for name, n in counts[:_TOP]]
    modalities = [(n, f"{c:,}", share(c, total)) for n, c in facts["modalities"].items() if c]
    codes = list(languages(facts["text"]["languages"]).items())[:8]
    spoken = [(name, f"{count:,}", share(count, total)) for name, count in codes]
    media = [
        (kind, f"{f['uses']:,}", *_opened(f, facts["media_opened"]))
        for kind, f in facts["media"].items()
        if f["uses"]
    ]
    groups = [
        (KIND_NAMES[kind], *(f"{f[key]:,}" for key in ("groups", "posts", "labels_differ")))
        for kind, f in facts["duplicates"]["kinds"].items()
    ]
    return [
        (f"{total:,} posts", ("modality", "posts", "share"), modalities),
        ("Lines left out", ("reason", "lines"), left_out),
        ("Languages of the texts", ("language", "posts", "share"), spoken),
        (title, ("tag", "posts", "share"), tags),
        ("Media", ("kind", "uses", "files", "size", "broken"), media),
        ("Duplicates", ("what", "groups", "posts", "tags differ"), groups),
        ("To look at", ("what", "count"), _doubts(facts)),
    ]


def _opened(found: Mapping[str, Any], opened: bool) -> tuple[str, str, str]:
    if not opened:
        return ("not opened", "", "")
    broken = sum(found["broken"].values())
    return (f"{found['files']:,}", size(found["bytes"]), f"{broken:,}")


def _doubts(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    labels, posts = facts["labels"], facts["posts"]
    rows = [
        ("posts without tags", posts["without_labels"]),
        ("posts with nothing in them", posts["empty"]),
        (f"tags with fewer than {labels['rare_below']:,} posts", len(labels["rare"])),
        ("names of tags that differ in case, spaces or width", len(labels["variants"])),
        ("pairs of tags that only occur together", len(labels["always_together"])),
        ("tags that never occur without another", len(labels["implied"])),
        ("posts with nearly every tag", len(labels["nearly_all_tags"])),
    ]
    if labels["map"] is not None:
        rows.append(("tags of the label map that never occur", len(labels["map"]["never"])))
        rows.append(("tags that are not in the label map", len(labels["map"]["unknown"])))
    return [(name, f"{count:,}") for name, count in rows if count]


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> object:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def languages(counts: Mapping[str, int]) -> dict[str, int]:
    """Return counts with names of languages for codes."""
    return {_LANGUAGES.get(code, code): count for code, count in counts.items()}


def size(value: float) -> str:
    """Return a number of bytes, to three digits at most."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def seconds(value: float) -> str:
    """Return a duration, to three digits at most."""
    if value < 60:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 3600 else f"{value / 3600:.3g} h"


def plain(value: float) -> str:
    """Return a whole number."""
    return f"{value:,.0f}"


def share(part: int, whole: int) -> str:
    """Return a share in percent; a dash where there is no whole."""
    return f"{part / whole:.1%}" if whole else "–"
