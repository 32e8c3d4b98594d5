"""The results as people read them: one HTML page that loads nothing, and tables on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import charts
from common.html import render as render_template
from common.tables import print_table

# Tags that the page and the terminal show before the rest is folded or left out: two screens of
# bars, and half a screen of lines.
_TOP, _TOP_LINES = 40, 15
# Columns of a chart over time: more would be thinner than five pixels.
_MOST_COLUMNS = 120

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
_KIND_NAMES = {
    "exact_media": "the same file",
    "near_image": "pictures that look alike",
    "near_text": "nearly the same text",
}

Write = Callable[[float], str]


def render(facts: Mapping[str, Any], title: str) -> str:
    """Return the page of an analysis, the content of ``analysis.json``."""
    labels, duplicates = facts["labels"], facts["duplicates"]
    with charts.style():
        per_post = labels["per_post"]
        drawn = {
            "long_tail": long_tail(list(labels["counts"].values()), labels["rare_below"]),
            "per_post": columns(list(per_post), list(per_post.values()), "tags"),
            "text_chars": histogram(facts["text"]["chars"], plain, "characters"),
            "days": by_time(facts["time"]["days"]),
        }
        media = [
            _medium(kind, content, opened=facts["media_opened"])
            for kind, content in facts["media"].items()
            if content["uses"]
        ]
    return render_template(
        Path(__file__).with_name("report.html.j2"),
        **{**facts, "media": media},
        title=title,
        charts=drawn,
        kind_names=_KIND_NAMES,
        figure_rows=_figures(facts),
        left_out_examples=[list(each.values()) for each in facts["posts"]["left_out_examples"]],
        top_tags=dict(list(labels["counts"].items())[:_TOP]),
        pairs=[(*p["tags"], p["posts"], p["jaccard"]) for p in labels["pairs"][:15]],
        heat=_heat(labels["heat"]["tags"], labels["heat"]["posts"]),
        disputes=lambda item: [(k, ", ".join(v) or None) for k, v in item["labels"].items()],
        variants=[
            " ≈ ".join(f"{name} ({n:,})" for name, n in names.items())
            for names in labels["variants"]
        ],
        together=[(*p["tags"], p["posts"]) for p in labels["always_together"]],
        implied=[list(each.values()) for each in labels["implied"]],
        nearly_all=[f"{p['post_id']} ({p['tags']:,} tags)" for p in labels["nearly_all_tags"]],
        disputed_tags=dict(list(duplicates["disputed_tags"].items())[:20]),
        duplicate_rows=_groups(facts, "groups", "posts", "largest"),
        languages=_named(facts["text"]["languages"]),
    )


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
    languages = shares(_named(facts["text"]["languages"]), 8)
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
    groups = _groups(facts, "groups", "posts", "labels_differ")
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


def _groups(facts: Mapping[str, Any], *keys: str) -> list[tuple[Any, ...]]:
    """Return a row for each kind of duplicates."""
    kinds = facts["duplicates"]["kinds"].items()
    return [(_KIND_NAMES[kind], *(counts[key] for key in keys)) for kind, counts in kinds]


def _named(codes: Mapping[str, int]) -> dict[str, int]:
    return {_LANGUAGES.get(code, code): count for code, count in codes.items()}


def _figures(facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    posts, labels, media = facts["posts"], facts["labels"], facts["media"].values()
    groups, opened = facts["duplicates"]["kinds"].values(), facts["media_opened"]
    uses = sum(kind["uses"] for kind in media)
    broken = sum(sum(kind["broken"].values()) for kind in media)
    files = f"{sum(kind['files'] for kind in media):,} files"
    bytes_ = size(sum(kind["bytes"] for kind in media))
    differ = sum(group["labels_differ"] for group in groups)
    untagged = posts["without_labels"]
    return [
        (f"{posts['kept']:,}", "posts", f"{sum(posts['left_out'].values()):,} lines left out"),
        (f"{labels['distinct']:,}", "tags", f"{len(labels['rare']):,} rare"),
        (f"{untagged:,}", "without tags", share(untagged, posts["kept"])),
        (f"{uses:,}", "media", f"{files}, {bytes_}" if opened else "not opened"),
        (
            f"{broken:,}" if opened else "–",
            "broken media",
            share(broken, uses) if opened else "needs --media",
        ),
        (
            f"{sum(group['groups'] for group in groups):,}",
            "duplicate groups",
            f"{differ:,} with other tags",
        ),
    ]


def _medium(kind: str, content: Mapping[str, Any], *, opened: bool) -> dict[str, Any]:
    summary = f"{content['uses']:,} in {content['posts']:,} posts"
    drawn: list[tuple[str, bytes | None]] = []
    if opened:
        summary += f"; {content['files']:,} distinct files, {size(content['bytes'])}"
        if kind == "video":
            summary += f"; {content['with_sound']:,} with sound"
        drawn.append(("File sizes", histogram(content["file_bytes"], size, "")))
        if kind != "image":
            drawn.append(("Durations", histogram(content["duration_s"], seconds, "")))
        if kind != "audio":
            drawn.append(("Shorter side", histogram(content["shorter_side"], plain, "pixels")))
    per_post = {f"{n} per post": count for n, count in content["per_post"].items()}
    return {**content, "kind": kind, "summary": summary, "per_post": per_post, "charts": drawn}


def _heat(names: Sequence[str], posts: Sequence[Sequence[int]]) -> list[tuple[str, list[Any]]]:
    """Return a row for each tag: of its posts, the share that has each other tag too."""

    def cell(i: int, j: int) -> dict[str, str] | None:
        both, own = posts[i][j], posts[i][i]
        if i == j or not both or not own:
            return None
        return {
            # The root shows small shares, most of all, apart from none.
            "opacity": f"{max((both / own) ** 0.5, 0.08):.2f}",
            "title": f"{both / own:.0%} of {names[i]} ({both:,} of {own:,} posts) have {names[j]}",
        }

    every = range(len(names))
    return [(names[i], [cell(i, j) for j in every]) for i in every]


def columns(names: Sequence[str], counts: Sequence[int], unit: str) -> bytes | None:
    """Return a PNG of columns with a name under each; None where there is nothing to show."""
    if not max(counts, default=0):
        return None
    figure, (area,) = charts.figure(6.4, 2.5)
    area.bar(range(len(counts)), counts, color=charts.BLUE, width=0.85)
    # As many names as there is room for, one below the other's end.
    longest = max(len(name) for name in names)
    every = max(1, -(-len(names) * (longest + 2) // 76))
    area.set_xticks(range(0, len(names), every), names[::every], fontsize=8.5)
    area.set(xlabel=unit, xlim=(-0.6, max(len(counts), 6) - 0.4))
    return _counted(figure, area)


def histogram(content: Mapping[str, Any], write: Write, unit: str) -> bytes | None:
    """Return a PNG of a `Histogram.as_dict`, without the empty classes at both ends."""
    edges, counts = content["edges"], content["counts"]
    names = [f"<{write(edges[0])}"]
    names += [f"{write(low)}–{write(high)}" for low, high in pairwise(edges)]
    names.append(f"≥{write(edges[-1])}")
    filled = [i for i, count in enumerate(counts) if count] or [0]
    first, last = max(0, filled[0] - 1), filled[-1] + 2
    return columns(names[first:last], counts[first:last], unit)


def by_time(days: Mapping[str, int]) -> bytes | None:
    """Return a PNG of the posts over time, in columns of a day or, of a long time, of more."""
    # Wrong years would leave no room for the others, and some of them cannot be drawn.
    shown = {date.fromisoformat(d): count for d, count in days.items() if "1900" < d < "2200"}
    if not shown:
        return None
    span = (max(shown) - min(shown)).days + 1
    figure, (area,) = charts.figure(6.4, 2.5)
    at: Any = list(shown)  # matplotlib takes dates, whatever its annotations say
    area.hist(at, min(span, _MOST_COLUMNS), weights=list(shown.values()), color=charts.BLUE)
    return _counted(figure, area)


def _counted(figure: Any, area: Any) -> bytes:
    """Return a PNG of columns, with whole numbers at their side."""
    area.yaxis.set_major_formatter("{x:,.0f}")
    charts.whole_numbers(area.yaxis)
    area.grid(visible=False, axis="x")
    return charts.png(figure)


def long_tail(counts: Sequence[int], rare: int) -> bytes | None:
    """Return a PNG of the descending posts of each tag, with the line below which it is rare."""
    if not counts:
        return None
    figure, (area,) = charts.figure(6.4, 2.8)
    area.step(range(1, len(counts) + 1), counts, where="mid", color=charts.BLUE, lw=1.8)
    area.axhline(rare, color=charts.RED, ls="--", lw=1, label=f"rare: fewer than {rare:,}")
    area.legend(loc="lower left", fontsize=8.5)
    area.set(xscale="log", yscale="log", xlabel="rank of the tag", ylabel="posts")
    area.set(xlim=(1, max(len(counts), 2)), ylim=(0.8, 1.3 * max(counts[0], rare, 2)))
    for axis in (area.xaxis, area.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    return charts.png(figure)


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
