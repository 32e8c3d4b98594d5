"""The HTML page: one file, no network, with the parts of ``analysis.json`` that people look for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import charts
from common.html import render as render_template
from corpus.analyze.terminal import KIND_NAMES, languages, plain, seconds, share, size

if TYPE_CHECKING:
    pass

# Tags that are shown before everything is folded: two screens of bars.
_TOP = 40

# Columns of a chart over time: more would be thinner than five pixels.
_MOST_COLUMNS = 120
# Days or years that are listed one by one: a wrong year must not make a million columns.
_MOST_SPAN = 400


def render(facts: Mapping[str, Any], title: str) -> str:
    """Return the page of an analysis.

    Args:
        facts: Content of ``analysis.json``.
        title: Name of the posts file.
    """
    labels, duplicates = facts["labels"], facts["duplicates"]
    with charts.style():
        drawn = {
            "long_tail": long_tail(list(labels["counts"].values()), labels["rare_below"]),
            "per_post": columns(*_split(labels["per_post"]), "tags"),
            "text_chars": histogram(facts["text"]["chars"], plain, "characters"),
            "days": _days(facts["time"]["days"]),
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
        kind_names=KIND_NAMES,
        figure_rows=_figures(facts),
        left_out_examples=[
            (e["line"], e["post_id"] or "", e["reason"])
            for e in facts["posts"]["left_out_examples"]
        ],
        top_tags=dict(list(labels["counts"].items())[:_TOP]),
        pairs=[
            (*p["tags"], f"{p['posts']:,}", f"{p['jaccard']:.2f}") for p in labels["pairs"][:15]
        ],
        heat=_heat(labels["heat"]["tags"], labels["heat"]["posts"]),
        disputes=lambda item: [(k, ", ".join(v) or "–") for k, v in item["labels"].items()],
        variants=[
            " ≈ ".join(f"{name} ({n:,})" for name, n in names.items())
            for names in labels["variants"]
        ],
        together=[(*p["tags"], f"{p['posts']:,}") for p in labels["always_together"]],
        implied=[(p["tag"], p["never_without"], f"{p['posts']:,}") for p in labels["implied"]],
        nearly_all=[f"{p['post_id']} ({p['tags']:,} tags)" for p in labels["nearly_all_tags"]],
        disputed_tags=dict(list(duplicates["disputed_tags"].items())[:20]),
        duplicate_rows=[
            (KIND_NAMES[kind], *(f"{counts[k]:,}" for k in ("groups", "posts", "largest")))
            for kind, counts in duplicates["kinds"].items()
        ],
        languages=languages(facts["text"]["languages"]),
    )


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
    area.yaxis.set_major_formatter("{x:,.0f}")
    charts.whole_numbers(area.yaxis)
    area.set(xlabel=unit, xlim=(-0.6, max(len(counts), 6) - 0.4))
    area.grid(visible=False, axis="x")
    return charts.png(figure)


def histogram(content: Mapping[str, Any], write: Callable[[float], str], unit: str) -> bytes | None:
    """Return a PNG of a `Histogram.as_dict`, without the empty classes at both ends."""
    edges, counts = content["edges"], content["counts"]
    names = [f"<{write(edges[0])}"]
    names += [f"{write(low)}–{write(high)}" for low, high in pairwise(edges)]
    names.append(f"≥{write(edges[-1])}")
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return None
    first, last = max(0, filled[0] - 1), filled[-1] + 2
    return columns(names[first:last], counts[first:last], unit)


def long_tail(counts: Sequence[int], rare: int) -> bytes | None:
    """Return a PNG of the posts of each tag by its rank, with the line below which it is rare.

    Args:
        counts: Descending, all above 0.
        rare: Height of the line.
    """
    if not counts:
        return None
    figure, (area,) = charts.figure(6.4, 2.8)
    area.step(range(1, len(counts) + 1), counts, where="mid", color=charts.BLUE, lw=1.8)
    area.axhline(rare, color=charts.RED, ls="--", lw=1)
    area.annotate(
        f"rare: fewer than {rare:,}",
        (1, rare),
        (4, -11),
        textcoords="offset points",
        color=charts.RED,
        size=8.5,
    )
    area.set(xscale="log", yscale="log", xlabel="rank of the tag", ylabel="posts")
    area.set(xlim=(1, max(len(counts), 2)), ylim=(0.8, 1.3 * max(counts[0], rare, 2)))
    for axis in (area.xaxis, area.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    return charts.png(figure)


def _days(days: Mapping[str, int]) -> bytes | None:
    unit, merged = by_time(days)
    return columns(*_split(merged), f"by {unit}")


def _split(counts: Mapping[str, int]) -> tuple[list[str], list[int]]:
    return list(counts), list(counts.values())


def by_time(days: Mapping[str, int]) -> tuple[str, dict[str, int]]:
    """Return ``day``, ``month`` or ``year``, whichever is not too fine, and posts by it.

    Spans without posts are there with 0.
    """
    if not days:
        return "day", {}
    unit, merged, names = "day", dict(days), None
    for unit, length in (("day", 10), ("month", 7), ("year", 4)):  # noqa: B007 - named in the chart
        merged = {}
        for day, count in days.items():
            merged[day[:length]] = merged.get(day[:length], 0) + count
        names = _between(min(merged), max(merged), length)
        if names is not None and len(names) <= _MOST_COLUMNS:
            break
    return unit, {name: merged.get(name, 0) for name in names or sorted(merged)}


def _between(first: str, last: str, length: int) -> list[str] | None:
    """Return every day, month or year of a span; None for days that no calendar has."""
    if length == len("YYYY-MM-DD"):
        try:
            start, end = date.fromisoformat(first), date.fromisoformat(last)
        except ValueError:
            return None
        span = (end - start).days
        return [str(start + timedelta(i)) for i in range(span + 1)] if span < _MOST_SPAN else None
    years = range(int(first[:4]), int(last[:4]) + 1)
    if len(years) > _MOST_SPAN:
        return None
    if length == len("YYYY"):
        return [f"{year:04}" for year in years]
    months = [f"{year:04}-{month:02}" for year in years for month in range(1, 13)]
    return [month for month in months if first <= month <= last]
