"""Charts of reports: the positions of everything in an SVG inside the page.

The macro ``chart`` of ``parts.html.j2`` writes the SVG. Colours and fonts are the page's own, so a
chart follows light and dark, and shows names in any script. A chart is about as wide as a phone:
pages put several in a row, and none is ever scaled down until its text cannot be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 332, 8, 166
# Points of a line: as many as the chart has pixels.
_POINTS = 288
# Points with a dot and its numbers each: closer ones could not be pointed at.
_DOTS = 40
# Of the letters of a tick.
_LETTER = 6.4


@dataclass(frozen=True)
class Axis:
    """An axis of a chart; a limit of None is that of the data."""

    title: str = ""
    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Line:
    """A line or, with one point, a dot; ``look`` is the number of a colour, or ``ref``."""

    name: str
    points: Sequence[tuple[float, float]]
    look: int | str = 0


class Tick(NamedTuple):
    """A number or name at a side of a chart."""

    at: float
    text: str


class Shape(NamedTuple):
    """A path, a dot or a column, and the figures that are shown when it is pointed at."""

    look: int | str
    path: str
    title: str = ""


@dataclass(frozen=True)
class Chart:
    """A finished chart, in pixels."""

    title: str
    x_title: str
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    lines: tuple[Shape, ...] = ()
    dots: tuple[Shape, ...] = ()
    columns: tuple[Shape, ...] = ()
    legend: tuple[tuple[int | str, str], ...] = ()

    @property
    def names(self) -> tuple[Tick, ...]:
        """Return the ticks of the x axis that have room: none touches the one before."""
        shown: list[Tick] = []
        for tick in self.x:
            half = len(tick.text) * _LETTER / 2
            end = shown[-1].at + len(shown[-1].text) * _LETTER / 2 if shown else -math.inf
            if tick.at - half > end + 6 and tick.at + half < WIDTH + 4:
                shown.append(tick)
        return tuple(shown)


class _Scale:
    """Map from numbers to pixels."""

    def __init__(self, axis: Axis, values: Sequence[float], start: int, end: int) -> None:
        low = min(values, default=0.0) if axis.low is None else axis.low
        high = max(values, default=1.0) if axis.high is None else axis.high
        if not high > low:
            high = low + 1 if not axis.log else low * 10
        self._axis, self._start, self._end = axis, start, end
        self._low, self._high = self._at(low), self._at(high)

    def __call__(self, value: float) -> float:
        share = (self._at(value) - self._low) / (self._high - self._low)
        return round(self._start + min(max(share, 0.0), 1.0) * (self._end - self._start), 1)

    def ticks(self) -> tuple[Tick, ...]:
        return tuple(Tick(self(value), number(value)) for value in self._steps())

    def _at(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self._axis.log else value

    def _steps(self) -> Iterator[float]:
        if self._axis.log:
            yield from (10.0**i for i in range(math.ceil(self._low), math.floor(self._high) + 1))
            return
        raw = (self._high - self._low) / 5
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * f for f in (1, 2, 2.5, 5, 10) if size * f >= raw * 0.999)
        if self._axis.whole:
            step = max(1.0, math.ceil(step))
        for i in range(
            math.ceil(self._low / step - 1e-6), math.floor(self._high / step + 1e-6) + 1
        ):
            yield i * step


def lines(title: str, drawn: Sequence[Line], x: Axis, y: Axis) -> Chart | None:
    """Return a chart of lines; None where there is no point."""
    drawn = [line for line in drawn if line.points]
    if not any(line.look != "ref" for line in drawn):
        return None
    across = _Scale(x, [a for line in drawn for a, _ in line.points], LEFT, RIGHT)
    up = _Scale(y, [b for line in drawn for _, b in line.points], BOTTOM, TOP)
    paths, dots = [], []
    for line in drawn:
        every = max(1, -(-len(line.points) // _POINTS))
        some = [*line.points[:-1:every], line.points[-1]]
        path = "L".join(f"{across(a)} {up(b)}" for a, b in some)
        if len(some) > 1:
            paths.append(Shape(line.look, f"M{path}"))
        if line.look != "ref" and len(some) <= _DOTS:
            name = f"{line.name}: " if line.name else ""
            dots += [
                Shape(line.look, f"M{across(a)} {up(b)}h0", f"{name}{number(b)} at {number(a)}")
                for a, b in some
            ]
    legend = tuple((line.look, line.name) for line in drawn if line.name)
    return Chart(
        title, x.title, across.ticks(), up.ticks(), tuple(paths), tuple(dots), legend=legend
    )


def columns(
    title: str, names: Sequence[str], counts: Sequence[int], unit: str, *, log: bool = False
) -> Chart | None:
    """Return a chart of columns with a name under each; None where there is nothing to show."""
    if not max(counts, default=0):
        return None
    side = Axis(low=0.5, log=True) if log else Axis(low=0, whole=True)
    up = _Scale(side, counts, BOTTOM, TOP)
    step = (RIGHT - LEFT) / max(len(counts), 6)
    wide = max(1.0, 0.85 * step)
    shapes, ticks = [], []
    for i, (name, count) in enumerate(zip(names, counts, strict=True)):
        left, top = LEFT + i * step, up(count)
        if count:
            path = f"M{left:.1f} {BOTTOM}V{top}h{wide:.1f}V{BOTTOM}z"
            shapes.append(Shape(0, path, f"{name}: {count:,}"))
        ticks.append(Tick(round(left + wide / 2, 1), name))
    return Chart(title, unit, tuple(ticks), up.ticks(), columns=tuple(shapes))


def number(value: float) -> str:
    """Return a number in few letters: 0.25, 5e-4, 1,200, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    if 0 < abs(value) < 0.001:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
