"""The results of an analysis as one HTML page that loads nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.charts import Axis, Chart, Line, columns, lines
from common.html import counted
from common.html import render as render_template
from common.post import MediaKind
from corpus.analyze.advice import Files, next_steps
from corpus.analyze.media import MediaBase
from corpus.analyze.report import KIND_NAMES, group_rows, named, share, size
from corpus.analyze.tally import Tally
from fusion.report.view import MediaView, PostView, media_name, shortened, thumbnail

# Columns of a chart over time: more would be thinner than five pixels.
_MOST_COLUMNS = 48
# Groups of duplicates of each kind, and posts of a group, that the page shows; of each tag as many
# posts as the tally keeps.
_GROUPS, _MEMBERS = 9, 4
_SOUND = {"image": "picture", "video": "video", "audio": "sound"}

Write = Callable[[float], str]


class Cards:
    """Posts as the page shows them; without media there are only texts and names."""

    def __init__(self, tally: Tally, media: MediaBase | None) -> None:
        self._tally, self._media = tally, media

    def sample(self, tag: str, post_ids: Sequence[str], count: int) -> dict[str, Any]:
        """Return a card of a tag: for each post its first picture, or the text."""
        return {
            "title": f"{tag}: {counted(count, 'post')}",
            "lines": (),
            "view": PostView(media=tuple(map(self._short, post_ids))),
        }

    def group(self, kind: str, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the posts of a group share, and a card of each."""
        sources_of = {post_id: self._shared(post_id, group) for post_id in group["labels"]}
        first = next((sources[0] for sources in sources_of.values() if sources), None)
        what, note = KIND_NAMES[kind], ""
        shared: tuple[MediaView, ...] = ()
        if kind == "exact_media" and first is not None:
            what = f"the same {_SOUND[first[0]]}"
            note = self._about(*first)
            if first[0] == "image":
                shared = (self._view(*first, 1),)
        cards = []
        for post_id, labels in list(group["labels"].items())[:_MEMBERS]:
            media = tuple(self._view(*source, i) for i, source in enumerate(sources_of[post_id], 1))
            if kind == "exact_media":  # shown once, whatever each post calls it
                media = tuple(MediaView(item.name) for item in media)
            text = shortened(self._tally.content_of(post_id)[0]) if kind == "near_text" else ""
            tags = ", ".join(labels) or "no tags"
            cards.append({"title": post_id, "lines": (tags,), "view": PostView(text, media[:1])})
        return {
            "title": f"{what}: {group['posts']:,} posts",
            "note": note,
            "media": shared,
            "cards": cards,
            "more": group["posts"] - len(cards),
            "disputed": group.get("disputed", ()),
        }

    def _shared(self, post_id: str, group: Mapping[str, Any]) -> list[tuple[MediaKind, str]]:
        """Return the media of a post that the group is about."""
        if self._media is None or "media" not in group:
            return []
        _, media = self._tally.content_of(post_id)
        return [m for m in media if self._media.fact(m[1], m[0]).sha256 in group["media"]]

    def _about(self, kind: MediaKind, source: str) -> str:
        if self._media is None:
            return ""
        fact = self._media.fact(source, kind)
        parts = [fact.codec, size(fact.size_bytes)]
        if fact.width:
            parts.append(f"{fact.width}×{fact.height}")
        if fact.duration_s is not None:
            parts.append(seconds(fact.duration_s))
        return ", ".join(part for part in parts if part)

    def _short(self, post_id: str) -> MediaView:
        text, media = self._tally.content_of(post_id)
        pictures = [source for kind, source in media if kind == "image"]
        if pictures and (view := self._view("image", pictures[0], 1)).thumbnail:
            return MediaView(f"{post_id}: {shortened(text)}", "", view.thumbnail)
        return MediaView(shortened(text)[:60] or post_id)

    def _view(self, kind: MediaKind, source: str, number: int) -> MediaView:
        path = None
        if self._media is not None and kind == "image":
            path = self._media.path_of(source, kind)
        name = media_name(source, kind, number)
        return MediaView(name, "", "" if path is None else thumbnail(path))


def render(facts: Mapping[str, Any], files: Files, cards: Cards) -> str:
    """Return the page of an analysis, the content of ``analysis.json``."""
    labels, duplicates = facts["labels"], facts["duplicates"]
    per_post = labels["per_post"]
    media = [
        _medium(kind, content, opened=facts["media_opened"])
        for kind, content in facts["media"].items()
        if content["uses"]
    ]
    samples = [
        cards.sample(tag, post_ids, labels["counts"][tag])
        for tag, post_ids in facts["samples"].items()
    ]
    return render_template(
        Path(__file__).with_name("report.html.j2"),
        **{**facts, "media": media, "samples": samples},
        title=f"What is in {files.posts.name}",
        subtitle=f"{facts['posts']['kept']:,} posts with {labels['distinct']:,} tags",
        figure_rows=_figures(facts),
        next_steps=next_steps(facts, files),
        long_tail=long_tail(list(labels["counts"].values()), labels["rare_below"]),
        tags_per_post=columns(
            "Posts by their number of tags", list(per_post), list(per_post.values()), "tags"
        ),
        text_chars=histogram(
            "Posts by the length of their texts", facts["text"]["chars"], plain, "characters"
        ),
        by_time=by_time(facts["time"]["days"]),
        left_out_examples=[list(each.values()) for each in facts["posts"]["left_out_examples"]],
        pairs=[(*p["tags"], p["posts"], p["jaccard"]) for p in labels["pairs"][:30]],
        heat_rows=_heat(labels["heat"]["tags"], labels["heat"]["posts"]),
        variants=[
            " ≈ ".join(f"{name} ({n:,})" for name, n in names.items())
            for names in labels["variants"]
        ],
        together=[(*p["tags"], p["posts"]) for p in labels["always_together"]],
        implied=[list(each.values()) for each in labels["implied"]],
        nearly_all=[f"{p['post_id']} ({p['tags']:,} tags)" for p in labels["nearly_all_tags"]],
        duplicate_rows=group_rows(facts, "groups", "posts", "largest", "labels_differ"),
        groups=[
            (KIND_NAMES[kind], [cards.group(kind, group) for group in _shown(counts)])
            for kind, counts in duplicates["kinds"].items()
            if counts["examples"]
        ],
        languages=named(facts["text"]["languages"]),
    )


def _shown(counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return groups of one kind for the page: those with different tags first."""
    disputes = counts["disputes"]
    known = [list(group["labels"]) for group in disputes]
    others = [group for group in counts["examples"] if list(group["labels"]) not in known]
    return [*disputes, *others][:_GROUPS]


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
        (
            f"{posts['kept']:,}",
            "posts",
            f"{counted(sum(posts['left_out'].values()), 'line')} left out",
        ),
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
    drawn: list[Chart | None] = []
    if opened:
        summary += f"; {content['files']:,} distinct files, {size(content['bytes'])}"
        if kind == "video":
            summary += f"; {content['with_sound']:,} with sound"
        drawn.append(histogram("File sizes", content["file_bytes"], size, ""))
        if kind != "image":
            drawn.append(histogram("Durations", content["duration_s"], seconds, ""))
        if kind != "audio":
            drawn.append(histogram("Shorter side", content["shorter_side"], plain, "pixels"))
    per_post = {f"{n} per post": count for n, count in content["per_post"].items()}
    return {**content, "kind": kind, "summary": summary, "per_post": per_post, "charts": drawn}


def _heat(
    names: Sequence[str], posts: Sequence[Sequence[int]]
) -> list[tuple[str, list[tuple[float, str, str] | None]]]:
    """Return a row for each tag: of its posts, the share that has each other tag too."""

    def cell(i: int, j: int) -> tuple[float, str, str] | None:
        both, own = posts[i][j], posts[i][i]
        if i == j or not both or not own:
            return None
        note = f"{both / own:.0%} of {names[i]} ({both:,} of {own:,} posts) have {names[j]}"
        # The root shows small shares, most of all, apart from none.
        return max((both / own) ** 0.5, 0.08), "", note

    every = range(len(names))
    return [(names[i], [cell(i, j) for j in every]) for i in every]


def histogram(title: str, content: Mapping[str, Any], write: Write, unit: str) -> Chart | None:
    """Return columns of a `Histogram.as_dict`, without the empty classes at both ends."""
    edges, counts = content["edges"], content["counts"]
    names = [f"<{write(edges[0])}"]
    names += [f"{write(low)}–{write(high)}" for low, high in pairwise(edges)]
    names.append(f"≥{write(edges[-1])}")
    filled = [i for i, count in enumerate(counts) if count] or [0]
    first, last = max(0, filled[0] - 1), filled[-1] + 2
    return columns(title, names[first:last], counts[first:last], unit)


def by_time(days: Mapping[str, int]) -> Chart | None:
    """Return the posts over time, in columns of a day or, of a long time, of more."""
    # Wrong years would leave no room for the others.
    shown = {date.fromisoformat(d): count for d, count in days.items() if "1900" < d < "2200"}
    if not shown:
        return None
    first = min(shown).toordinal()
    step = -(-(max(shown).toordinal() - first + 1) // _MOST_COLUMNS)
    counts: Counter[int] = Counter()
    for day, count in shown.items():
        counts[(day.toordinal() - first) // step] += count
    names = [str(date.fromordinal(first + i * step)) for i in range(max(counts) + 1)]
    each = "each day" if step == 1 else f"every {step:,} days"
    return columns(f"Posts of {each}", names, [counts[i] for i in range(len(names))], "")


def long_tail(counts: Sequence[int], rare: int) -> Chart | None:
    """Return the descending posts of each tag, with the line below which it is rare."""
    end = max(len(counts), 2)
    tags = Line("", [(i, n) for i, n in enumerate(counts, 1)])
    limit = Line(f"rare: fewer than {rare:,} posts", [(1, rare), (end, rare)], "ref")
    side = Axis(low=0.8, high=1.3 * max(max(counts, default=1), rare), log=True)
    return lines("Posts of each tag, by rank", [tags, limit], Axis("rank", 1, end, log=True), side)


def seconds(value: float) -> str:
    """Return a duration, to three digits at most."""
    if value < 60:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 3600 else f"{value / 3600:.3g} h"


def plain(value: float) -> str:
    """Return a whole number."""
    return f"{value:,.0f}"
