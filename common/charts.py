"""Charts of reports, drawn by matplotlib without a display.

Only drawing imports matplotlib, so that commands start without it.

Colours are Okabe and Ito's, which people with any colour vision can tell apart. Names are drawn
with the fonts of this machine; one that no font can draw is shown by its number.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, GREY = "#CC79A7", "#56B4E9", "#8a8a8a"

# matplotlib's own font first: it draws most scripts but those of East Asia.
_PREFERRED_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Arial Unicode MS",
)


@contextmanager
def style() -> Iterator[None]:
    """Draw charts in the look of all reports; names in them are text, never formulas."""
    import matplotlib as mpl

    with mpl.rc_context(
        {
            "font.family": list(_fonts()),
            "font.size": 10,
            "text.parse_math": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e4e4e4",
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "legend.frameon": False,
            "figure.dpi": 110,
            "date.converter": "concise",
        }
    ):
        yield


def figure(
    width: float,
    height: float,
    *,
    rows: int = 1,
    columns: int = 1,
    ratios: tuple[float, ...] | None = None,
) -> tuple[Figure, tuple[Axes, ...]]:
    """Return a figure, its sides in inches, and its axes, without pyplot and its global state."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    areas = made.subplots(rows, columns, squeeze=False, height_ratios=ratios)
    return made, tuple(areas.ravel())


def whole_numbers(axis: Axis) -> None:
    """Put the ticks of an axis at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def png(drawn: Figure) -> bytes:
    file = io.BytesIO()
    drawn.savefig(file, format="png")
    return file.getvalue()


def shown_names(names: Sequence[str], width: int = 22) -> list[str]:
    """Return names as charts show them, cut to a width in columns (a Chinese character takes two).

    A name that holds a character that no font here can draw becomes ``#7``, its label's number.
    """
    drawable = _characters()
    return [
        _cut(name, width) if all(ord(c) in drawable for c in name) else f"#{i}"
        for i, name in enumerate(names)
    ]


@lru_cache(maxsize=1)
def _fonts() -> tuple[str, ...]:
    from matplotlib import font_manager

    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    return tuple(name for name in _PREFERRED_FONTS if name in installed) or ("sans-serif",)


@lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    from matplotlib import font_manager

    characters: set[int] = set()
    for name in _fonts():
        path = font_manager.findfont(font_manager.FontProperties(family=name))
        characters.update(font_manager.get_font(path).get_charmap())
    return frozenset(characters)


def _cut(name: str, width: int) -> str:
    columns = [2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in name]
    if sum(columns) <= width:
        return name
    most = sum(used < width for used in accumulate(columns))  # one column is the ellipsis'
    return f"{name[:most]}…"
