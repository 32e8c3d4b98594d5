"""Charts as inline SVG: no library, no fonts of ours, so that names in any script are readable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

_WIDTH = 640
_MAX_COLUMNS = 120  # of five pixels
_MAX_SPAN = 400  # days, or years


def bars(counts: Mapping[str, int], *, empty: str = "nothing") -> str:
    """Horizontal bars with names of any length, as HTML."""
    if not counts:
        return f"<p class=none>{escape(empty)}</p>"
    top = max(counts.values()) or 1
    rows = "".join(
        f"<div class=name title='{escape(name, quote=True)}'>{escape(name) or '&nbsp;'}</div>"
        f"<div class=track>{_bar(count / top)}</div>"
        f"<div class=count>{count:,}</div>"
        for name, count in counts.items()
    )
    return f"<div class=bars>{rows}</div>"


def _bar(share: float) -> str:
    return f"<i style='width:{100 * share:.2f}%'></i>" if share else ""


def columns(names: Sequence[str], counts: Sequence[int], unit: str = "") -> str:
    """Vertical columns with a name under each, as many names as there is room for."""
    height, left, bottom, top = 190, 48, 34, 14
    most = max(counts, default=0)
    if not most:
        return "<p class=none>nothing</p>"
    step = min((_WIDTH - left - 8) / len(counts), 90)
    longest = max(len(name) for name in names)
    every = math.ceil((6 * longest + 6) / step)
    parts = [_grid(most, left, top, height)]
    for i, (name, count) in enumerate(zip(names, counts, strict=True)):
        tall = (height - top) * count / most
        x, y = left + i * step, height - tall
        wide = max(step - min(3, step / 4), 0.5)
        parts.append(
            f"<rect class=bar x='{x:.1f}' y='{y:.1f}' width='{wide:.1f}' height='{tall:.1f}'>"
            f"<title>{escape(name)}: {count:,}</title></rect>"
        )
        middle = x + wide / 2
        if i % every == 0 and middle + 3.5 * longest < _WIDTH:
            parts.append(
                f"<text x='{middle:.1f}' y='{height + 15}' text-anchor=middle>{escape(name)}</text>"
            )
    if unit:
        parts.append(
            f"<text class=dim x='{_WIDTH - 8}' y='{height + 30}' text-anchor=end>"
            f"{escape(unit)}</text>"
        )
    return _svg(height + bottom, parts)


def long_tail(counts: Sequence[int], rare: int) -> str:
    """Posts of each tag by its rank, both axes logarithmic, with the line below which it is rare.

    Args:
        counts: Descending, all above 0.
        rare: Height of the line.
    """
    if not counts:
        return "<p class=none>no tags</p>"
    height, left, top, right = 230, 56, 14, 16
    ranks, most = math.log10(max(len(counts), 2)), math.log10(max(counts[0], rare, 2))

    def across(rank: float) -> float:
        return left + (_WIDTH - left - right) * math.log10(rank) / ranks

    def up(count: float) -> float:
        return height - (height - top) * math.log10(max(count, 1)) / most

    parts = []
    for power in range(int(most) + 1):
        y = up(10**power)
        parts.append(
            f"<line class=grid x1={left} x2={_WIDTH - right} y1='{y:.1f}' y2='{y:.1f}'/>"
            f"<text x={left - 6} y='{y + 4:.1f}' text-anchor=end>{10**power:,}</text>"
        )
    for power in range(int(ranks) + 1):
        x = across(10**power)
        parts.append(f"<text x='{x:.1f}' y='{height + 16}' text-anchor=middle>{10**power:,}</text>")
    # Equal counts are one step: a point for each end of it is enough.
    last = len(counts) - 1
    kept = [
        i
        for i in range(len(counts))
        if i in (0, last) or counts[i] != counts[i - 1] or counts[i] != counts[i + 1]
    ]
    points = " ".join(f"{across(i + 1):.1f},{up(counts[i]):.1f}" for i in kept)
    parts.append(f"<polyline class=curve points='{points}'/>")
    y = up(rare)
    parts.append(
        f"<line class=limit x1={left} x2={_WIDTH - right} y1='{y:.1f}' y2='{y:.1f}'/>"
        f"<text class=warn x='{left + 4}' y='{y + 14:.1f}'>"
        f"rare: fewer than {rare:,}</text>"
    )
    parts.append(
        f"<text class=dim x='{_WIDTH - right}' y='{height + 32}' text-anchor=end>"
        "rank of the tag</text><text class=dim x=4 y=11>posts</text>"
    )
    return _svg(height + 38, parts)


def heat_map(names: Sequence[str], posts: Sequence[Sequence[int]]) -> str:
    """Of a row's posts, the share that has the column's tag too; names at both sides."""
    if len(names) < 2:
        return "<p class=none>fewer than two tags</p>"
    cell, left, top = 16, 150, 130
    size = cell * len(names)
    parts = []
    for i, name in enumerate(names):
        short, x, y = escape(_short(name)), left + i * cell + 12, top + i * cell + 12
        parts.append(f"<text x={left - 6} y={y} text-anchor=end>{short}</text>")
        parts.append(f"<text transform='translate({x} {top - 6}) rotate(-60)'>{short}</text>")
        for j, other in enumerate(names):
            both, own = posts[i][j], posts[i][i]
            if i == j or not both or not own:
                continue
            share = both / own
            parts.append(
                f"<rect class=heat x={left + j * cell} y={top + i * cell} width={cell - 1} "
                f"height={cell - 1} style='opacity:{max(share**0.5, 0.08):.2f}'><title>"
                f"{share:.0%} of {escape(name)} ({both:,} of {own:,} posts) have {escape(other)}"
                "</title></rect>"
            )
    parts.append(
        f"<rect class=frame x={left - 0.5} y={top - 0.5} width={size} height={size} fill=none />"
    )
    return _svg(top + size + 8, parts, width=left + size + 90)


def histogram(content: Mapping[str, Any], write: Callable[[float], str], unit: str) -> str:
    """Columns of a `Histogram.as_dict`, without the empty classes at both ends."""
    edges, counts = content["edges"], content["counts"]
    names = [f"<{write(edges[0])}"]
    names += [f"{write(low)}–{write(high)}" for low, high in pairwise(edges)]
    names.append(f"≥{write(edges[-1])}")
    there = [i for i, count in enumerate(counts) if count]
    if not there:
        return "<p class=none>nothing known</p>"
    first, last = max(0, there[0] - 1), there[-1] + 2
    return columns(names[first:last], counts[first:last], unit)


def by_time(days: Mapping[str, int]) -> str:
    """Columns by day, by month or by year, whichever is not too fine; gaps are shown."""
    if not days:
        return "<p class=none>no times</p>"
    merged: dict[str, int] = {}
    names: list[str] | None = None
    unit = ""
    for length, unit in ((10, "day"), (7, "month"), (4, "year")):  # noqa: B007  named in the chart
        merged = {}
        for day, count in days.items():
            merged[day[:length]] = merged.get(day[:length], 0) + count
        names = _between(min(merged), max(merged), length)
        if names is not None and len(names) <= _MAX_COLUMNS:
            break
    names = sorted(merged) if names is None else names
    return columns(names, [merged.get(name, 0) for name in names], f"by {unit}")


def _between(first: str, last: str, length: int) -> list[str] | None:
    """Every day, month or year of a span; None for days that no calendar has."""
    from datetime import date, timedelta

    if length == len("YYYY-MM-DD"):
        try:
            start, end = date.fromisoformat(first), date.fromisoformat(last)
        except ValueError:
            return None
        span = (end - start).days
        return [str(start + timedelta(i)) for i in range(span + 1)] if span < _MAX_SPAN else None
    years = range(int(first[:4]), int(last[:4]) + 1)
    if len(years) > _MAX_SPAN:
        return None
    if length == len("YYYY"):
        return [f"{year:04}" for year in years]
    months = [f"{year:04}-{month:02}" for year in years for month in range(1, 13)]
    return [month for month in months if first <= month <= last]


def _grid(most: int, left: int, top: int, height: int) -> str:
    parts = []
    for value in sorted({0, most // 2, most}):
        y = height - (height - top) * value / most
        parts.append(
            f"<line class=grid x1={left} x2={_WIDTH - 8} y1='{y:.1f}' y2='{y:.1f}'/>"
            f"<text x={left - 6} y='{y + 4:.1f}' text-anchor=end>{_brief(value)}</text>"
        )
    return "".join(parts)


def _svg(height: float, parts: Sequence[str], width: float = _WIDTH) -> str:
    return (
        f"<svg viewBox='0 0 {width:g} {height:g}' style='max-width:{width:g}px' "
        f"role=img>{''.join(parts)}</svg>"
    )


def _brief(value: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= 10 * size:
            return f"{value / size:.0f}{unit}"
    return f"{value:,}"


def _short(name: str, columns_wide: int = 20) -> str:
    from unicodedata import east_asian_width

    width, kept = 0, ""
    for char in name:
        width += 1 + (east_asian_width(char) in "WF")
        if width > columns_wide:
            return kept.rstrip() + "…"
        kept += char
    return kept
