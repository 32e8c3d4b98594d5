"""Names that charts can show: with the fonts of this machine, or else by number."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

_PREFERRED = (
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


@lru_cache(maxsize=1)
def families() -> tuple[str, ...]:
    """The fonts that are there, matplotlib's own first."""
    from matplotlib import font_manager

    there = {entry.name for entry in font_manager.fontManager.ttflist}
    return tuple(name for name in _PREFERRED if name in there) or ("sans-serif",)


@lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    from matplotlib import font_manager

    found: set[int] = set()
    for name in families():
        path = font_manager.findfont(font_manager.FontProperties(family=name))
        found.update(font_manager.get_font(path).get_charmap())
    return frozenset(found)


def shown_names(names: Sequence[str], width: int = 22) -> list[str]:
    """Names as charts show them.

    Args:
        names: Of tags, in label order.
        width: Columns, of which a Chinese character takes two; the rest is cut off.

    Returns:
        ``#7`` for a name that holds a character that no font here can draw.
    """
    known = _characters()
    return [
        _cut(name, width) if all(ord(c) in known for c in name) else f"#{i}"
        for i, name in enumerate(names)
    ]


def _cut(name: str, width: int) -> str:
    columns = [2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in name]
    if sum(columns) <= width:
        return name
    kept, used = "", 1
    for character, wide in zip(name, columns, strict=True):
        if used + wide > width:
            break
        kept, used = kept + character, used + wide
    return f"{kept}…"
