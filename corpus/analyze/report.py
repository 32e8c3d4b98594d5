"""The results of an analysis as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common.tables import print_table

# Tags that are shown: half a screen of lines.
_TOP_LINES = 15

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
    for title, heads, rows in _tables(facts):
        if rows:
            shown = [[f"{c:,}" if isinstance(c, int) else c for c in row] for row in rows]
            print_table(title, heads, shown, right=range(1, len(heads)), width=120)


def _tables(
    facts: Mapping[str, Any],
) -> Iterator[tuple[str, Sequence[str], Sequence[Sequence[Any]]]]:
    """Yield titles, heads and rows."""
    labels, posts, opened = facts["labels"], facts["posts"], facts["media_opened"]
    total, tags = posts["kept"], len(labels["counts"])

    def shares(counts: Mapping[str, int], most: int) -> list[tuple[str, int, str]]:
        return [(name, n, share(n, total)) for name, n in list(counts.items())[:most] if n]

    yield f"{total:,} posts", ("modality", "posts", "share"), shares(facts["modalities"], 9)
    yield "Lines left out", ("reason", "lines"), list(posts["left_out"].items())
    languages = shares(named(facts["text"]["languages"]), 8)
    yield "Languages of the texts", ("language", "posts", "share"), languages
    title = f"{tags:,} tags" if tags <= _TOP_LINES else f"Top {_TOP_LINES} of {tags:,} tags"
    yield title, ("tag", "posts", "share"), shares(labels["counts"], _TOP_LINES)
    media = [
        (kind, f["uses"], f["files"], size(f["bytes"]), sum(f["broken"].values()))
        if opened
        else (kind, f["uses"], "not opened", "", "")
        for kind, f in facts["media"].items()
        if f["uses"]
    ]
    yield "Media", ("kind", "uses", "files", "size", "broken"), media
    groups = group_rows(facts, "groups", "posts", "labels_differ")
    yield "Duplicates", ("what", "groups", "posts", "tags differ"), groups
    doubts = {
        "posts without tags": posts["without_labels"],
        "posts with nothing in them": posts["empty"],
        f"tags with fewer than {labels['rare_below']:,} posts": len(labels["rare"]),
        "names of tags that differ in case, spaces or width": len(labels["variants"]),
        "pairs of tags that only occur together": len(labels["always_together"]),
        "tags that never occur without another": len(labels["implied"]),
        "posts with nearly every tag": len(labels["nearly_all_tags"]),
    }
    if labels["map"] is not None:
        doubts["tags of the label map that never occur"] = len(labels["map"]["never"])
        doubts["tags that are not in the label map"] = len(labels["map"]["unknown"])
    yield "To look at", ("what", "count"), [row for row in doubts.items() if row[1]]


def group_rows(facts: Mapping[str, Any], *keys: str) -> list[tuple[Any, ...]]:
    """Return a row for each kind of duplicates."""
    kinds = facts["duplicates"]["kinds"].items()
    return [(KIND_NAMES[kind], *(counts[key] for key in keys)) for kind, counts in kinds]


def named(codes: Mapping[str, int]) -> dict[str, int]:
    """Return counts of languages by their names."""
    return {_LANGUAGES.get(code, code): count for code, count in codes.items()}


def size(value: float) -> str:
    """Return a number of bytes, to three digits at most."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def share(part: int, whole: int) -> str:
    """Return a share in percent; a dash where there is no whole."""
    return f"{part / whole:.1%}" if whole else "–"
