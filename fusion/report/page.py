"""The page of a report: one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TypeAlias

Cell: TypeAlias = "str | int | float | None"

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { --ink: #1c2733; --soft: #5b6875; --line: #dfe4e9; --paper: #fff; --shade: #f5f7f9;
  --link: #00588f; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 24px; color: var(--ink);
  background: var(--paper);
  font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei",
    sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 8px; }
h3 { font-size: 16px; margin: 22px 0 8px; }
p { max-width: 78ch; margin: 6px 0 12px; } .soft { color: var(--soft); }
a { color: var(--link); } nav a { margin-right: 14px; }
img.chart { max-width: 100%; display: block; margin: 8px 0; }
.figures { display: flex; flex-wrap: wrap; gap: 10px; margin: 16px 0; }
.figures div { background: var(--shade); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 14px; min-width: 116px; }
.figures b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; }
.figures span { color: var(--soft); font-size: 13px; }
.scroll { overflow: auto; max-height: 560px; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 4px 12px; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { position: sticky; top: 0; background: var(--shade); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.w { overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 12px; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; font-size: 14px;
  overflow-wrap: anywhere; }
.card h4 { margin: 0 0 2px; font-size: 15px; } .card p { margin: 4px 0; }
.card img { height: 84px; margin: 4px 6px 0 0; border-radius: 4px; }
"""


@dataclass(frozen=True)
class Table:
    """A table: numbers stand right, three decimals for fractions, a dash for None."""

    columns: Sequence[str]
    rows: Iterable[Sequence[Cell]]


@dataclass(frozen=True)
class Card:
    """One mistake.

    Attributes:
        links: Text and address.
        pictures: ``data:`` addresses.
    """

    title: str
    lines: Sequence[str]
    links: Sequence[tuple[str, str]] = ()
    pictures: Sequence[str] = ()


@dataclass(frozen=True)
class Chapter:
    """One part of the page.

    Attributes:
        name: Its heading; the anchor is made of it.
        text: How it is read.
        charts: PNG files by what they show.
    """

    name: str
    text: str = ""
    charts: Mapping[str, bytes] = field(default_factory=dict)
    table: Table | None = None
    cards: Sequence[tuple[str, Sequence[Card]]] = ()


def page(title: str, subtitle: str, figures: Mapping[str, Cell], chapters: list[Chapter]) -> str:
    """The whole page; every text in it is escaped.

    Args:
        title: Its heading.
        subtitle: The line below.
        figures: The numbers that stand on top, large.
        chapters: What follows.
    """
    top = "".join(
        f"<div><b>{escape(_text(value))}</b><span>{escape(name)}</span></div>"
        for name, value in figures.items()
    )
    links = "".join(f'<a href="#{_anchor(c.name)}">{escape(c.name)}</a>' for c in chapters)
    body = "".join(_chapter(chapter) for chapter in chapters)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        f'<h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p><nav>{links}</nav>'
        f'<div class="figures">{top}</div>\n{body}</body></html>\n'
    )


def _chapter(chapter: Chapter) -> str:
    parts = [f'<h2 id="{_anchor(chapter.name)}">{escape(chapter.name)}</h2>']
    if chapter.text:
        parts.append(f"<p>{escape(chapter.text)}</p>")
    for name, content in chapter.charts.items():
        address = base64.b64encode(content).decode()
        parts.append(
            f'<img class="chart" alt="{escape(name)}" src="data:image/png;base64,{address}">'
        )
    if chapter.table is not None:
        parts.append(_table(chapter.table))
    for name, cards in chapter.cards:
        inside = "".join(_card(card) for card in cards) or "<p>None.</p>"
        parts.append(f'<h3>{escape(name)}</h3><div class="cards">{inside}</div>')
    return "<section>" + "\n".join(parts) + "</section>\n"


def _table(table: Table) -> str:
    rows = [tuple(row) for row in table.rows]
    right = [
        bool(rows) and all(value is None or isinstance(value, (int, float)) for value in column)
        for column in zip(*rows, strict=True)
    ] or [False] * len(table.columns)
    head = "".join(
        f"<th{' class=n' if number else ''}>{escape(name)}</th>"
        for name, number in zip(table.columns, right, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{"n" if number else "w"}">{escape(_text(value))}</td>'
            for value, number in zip(row, right, strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _card(card: Card) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in card.lines)
    links = " · ".join(
        f'<a href="{escape(address)}" rel="noreferrer">{escape(text)}</a>'
        for text, address in card.links
    )
    pictures = "".join(f'<img alt="" src="{escape(address)}">' for address in card.pictures)
    return (
        f'<div class="card"><h4>{escape(card.title)}</h4>{lines}'
        f"{f'<p>{links}</p>' if links else ''}{pictures}</div>"
    )


def _text(value: Cell) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _anchor(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())
