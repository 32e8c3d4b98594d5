"""The HTML page: one file, no network, what a person looks for in ``analysis.json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from corpus.analyze import charts, words
from corpus.analyze.page import STYLE

_TOP, _FEW = 40, 30


def render(facts: Mapping[str, Any], title: str) -> str:
    """The page of an analysis.

    Args:
        facts: Content of ``analysis.json``.
        title: Name of the posts file.
    """
    parts = (
        _head(facts, title),
        _left_out(facts["posts"]),
        _tags(facts["labels"]),
        _suspicious(facts),
        _duplicates(facts["duplicates"]),
        _contents(facts),
        _media(facts["media"], opened=facts["media_opened"]),
        _origin(facts),
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><body><main>"
        f"{''.join(parts)}</main></body></html>\n"
    )


def _head(facts: Mapping[str, Any], title: str) -> str:
    posts, labels = facts["posts"], facts["labels"]
    groups = facts["duplicates"]["kinds"]
    files = sum(kind["files"] for kind in facts["media"].values())
    size = sum(kind["bytes"] for kind in facts["media"].values())
    uses = sum(kind["uses"] for kind in facts["media"].values())
    broken = sum(sum(kind["broken"].values()) for kind in facts["media"].values())
    cards = [
        ("posts", f"{posts['kept']:,}", f"{sum(posts['left_out'].values()):,} lines left out"),
        ("tags", f"{labels['distinct']:,}", f"{len(labels['rare']):,} rare"),
        ("without tags", f"{posts['without_labels']:,}",
         words.share(posts["without_labels"], posts["kept"])),
        ("media", f"{uses:,}",
         f"{files:,} files, {words.size(size)}" if facts["media_opened"] else "not opened"),
        ("broken media", f"{broken:,}" if facts["media_opened"] else "–",
         words.share(broken, uses) if facts["media_opened"] else "needs --media"),
        ("duplicate groups", f"{sum(g['groups'] for g in groups.values()):,}",
         f"{sum(g['labels_differ'] for g in groups.values()):,} with other tags"),
    ]  # fmt: skip
    boxes = "".join(
        f"<div class=card><span>{name}</span><b>{value}</b><span>{note}</span></div>"
        for name, value, note in cards
    )
    return f"<h1>{escape(title)}</h1><div class=cards>{boxes}</div>"


def _left_out(posts: Mapping[str, Any]) -> str:
    if not posts["left_out"]:
        return ""
    rows = [(e["line"], e["post_id"] or "", e["reason"]) for e in posts["left_out_examples"]]
    examples = _fold("the first of them", _table(("line", "post", "reason"), rows))
    return _section("Left out", charts.bars(posts["left_out"]) + examples)


def _tags(labels: Mapping[str, Any]) -> str:
    counts: Mapping[str, int] = labels["counts"]
    names = list(counts)
    shown = {name: counts[name] for name in names[:_TOP]}
    title = "Posts of each tag" if len(names) <= _TOP else f"The {_TOP} most frequent tags"
    every = _fold(
        f"all {len(names):,} tags", f"<div class=many>{charts.bars(counts)}</div>"
    ) if len(names) > _TOP else ""  # fmt: skip
    per_post = labels["per_post"]
    sizes = (
        f"<h3>Tags per post</h3>{charts.columns(list(per_post), list(per_post.values()), 'tags')}"
    )
    left, right = (sizes, "") if len(names) < _FEW else ("", sizes)
    pairs = [(*p["tags"], f"{p['posts']:,}", f"{p['jaccard']:.2f}") for p in labels["pairs"][:15]]
    content = (
        f"<div class=two><div><h3>{title}</h3>{charts.bars(shown, empty='no tags')}{every}{left}"
        "</div><div><h3>Long tail</h3>"
        f"{charts.long_tail(list(counts.values()), labels['rare_below'])}{right}"
        f"<h3>Most frequent pairs</h3>"
        f"{_table(('tag', 'tag', 'posts', 'Jaccard'), pairs, numbers=2)}</div></div>"
        f"<h3>Which go together</h3><p class=note>Of the posts with the row's tag, the share that "
        f"has the column's too{_of_most(labels)}. Hover for figures.</p>"
        f"<div class=wide>{charts.heat_map(labels['heat']['tags'], labels['heat']['posts'])}</div>"
    )
    return _section("Tags", content + _rare(labels))


def _of_most(labels: Mapping[str, Any]) -> str:
    shown = len(labels["heat"]["tags"])
    return f", for the {shown} most frequent tags" if shown < labels["distinct"] else ""


def _rare(labels: Mapping[str, Any]) -> str:
    rare, parts = labels["rare"], []
    title = f"<h3>Tags with fewer than {labels['rare_below']:,} posts: {len(rare):,}</h3>"
    parts.append(title + _counted(rare))
    if labels["map"] is not None:
        never, unknown = labels["map"]["never"], labels["map"]["unknown"]
        parts.append(f"<h3>Tags of the label map that never occur: {len(never):,}</h3>")
        parts.append(_chips(never))
        parts.append(f"<h3>Tags that are not in the label map: {len(unknown):,}</h3>")
        parts.append(_counted(unknown))
    return "".join(parts)


def _suspicious(facts: Mapping[str, Any]) -> str:
    labels, duplicates = facts["labels"], facts["duplicates"]
    rows: list[tuple[str, int, str]] = []
    for kind, found in duplicates["kinds"].items():
        blocks = "".join(_dispute(item) for item in found["disputes"])
        rows.append((f"{words.KIND_NAMES[kind]}, other tags", found["labels_differ"], blocks))
    variants = [" ≈ ".join(f"{name} ({n:,})" for name, n in v.items()) for v in labels["variants"]]
    rows.append(("names that differ in case, spaces or width", len(variants), _chips(variants)))
    together = [(*p["tags"], f"{p['posts']:,}") for p in labels["always_together"]]
    rows.append(
        ("tags that only occur together", len(together), _table(("tag", "tag", "posts"), together))
    )
    implied = [(p["tag"], p["never_without"], f"{p['posts']:,}") for p in labels["implied"]]
    rows.append(
        ("tags that never occur without another", len(implied),
         _table(("tag", "never without", "posts"), implied))
    )  # fmt: skip
    every = [f"{p['post_id']} ({p['tags']:,} tags)" for p in labels["nearly_all_tags"]]
    rows.append(("posts with nearly every tag", len(every), _chips(every)))
    rows.append(("posts that name a tag twice", labels["repeated_in_a_post"], ""))
    blocks = "".join(
        _fold(f"{name}: {count:,}", content)
        if count and content
        else f"<div class=row>{name}: {count:,}</div>"
        for name, count, content in rows
    )
    disputed = dict(list(duplicates["disputed_tags"].items())[:20])
    if disputed:
        blocks += f"<h3>Tags on which duplicates disagree</h3>{charts.bars(disputed)}"
    return _section("Suspicious labels", blocks)


def _dispute(item: Mapping[str, Any]) -> str:
    rows = [(post_id, ", ".join(tags) or "–") for post_id, tags in item["labels"].items()]
    more = item["posts"] - len(rows)
    note = f"<p class=note>and {more:,} more</p>" if more > 0 else ""
    disputed = f"<p class=note>in dispute: {escape(', '.join(item['disputed']))}</p>"
    return f"<div class=group>{_table(('post', 'tags'), rows)}{note}{disputed}</div>"


def _duplicates(duplicates: Mapping[str, Any]) -> str:
    rows = [
        (words.KIND_NAMES[kind], *(f"{found[k]:,}" for k in ("groups", "posts", "largest")))
        for kind, found in duplicates["kinds"].items()
    ]
    content = _table(("what", "groups", "posts", "largest"), rows, numbers=3)
    for kind, found in duplicates["kinds"].items():
        lines = [
            f"{', '.join(e['labels'])}{' …' if e['posts'] > len(e['labels']) else ''}"
            for e in found["examples"]
        ]
        if lines:
            items = "".join(f"<li>{escape(line)}</li>" for line in lines)
            content += _fold(f"{words.KIND_NAMES[kind]}: the first groups", f"<ul>{items}</ul>")
    return _section("Duplicates", content + "<p class=note>All of them: duplicates.jsonl</p>")


def _contents(facts: Mapping[str, Any]) -> str:
    text = facts["text"]
    return _section(
        "Posts",
        f"<div class=two><div><h3>Modalities</h3>{charts.bars(facts['modalities'])}"
        f"<h3>Combinations</h3>{charts.bars(dict(list(facts['combinations'].items())[:16]))}</div>"
        f"<div><h3>Length of texts</h3>{charts.histogram(text['chars'], words.plain, 'characters')}"
        f"<h3>Languages</h3>{charts.bars(words.languages(text['languages']))}</div></div>",
    )


def _media(media: Mapping[str, Any], *, opened: bool) -> str:
    parts = []
    for kind, found in media.items():
        if not found["uses"]:
            continue
        facts = f"{found['uses']:,} in {found['posts']:,} posts"
        if opened:
            facts += f"; {found['files']:,} distinct files, {words.size(found['bytes'])}"
        if opened and kind == "video":
            facts += f"; {found['with_sound']:,} with sound"
        per_post = {f"{n} per post": count for n, count in found["per_post"].items()}
        left, right = "", f"<h3>Posts with</h3>{charts.bars(per_post)}"
        if opened:
            left += f"<h3>File sizes</h3>{charts.histogram(found['file_bytes'], words.size, '')}"
            if kind != "image":
                seconds = charts.histogram(found["duration_s"], words.seconds, "")
                left += f"<h3>Durations</h3>{seconds}"
            if kind != "audio":
                sides = charts.histogram(found["shorter_side"], words.plain, "pixels")
                left += f"<h3>Shorter side</h3>{sides}"
                right += f"<h3>Resolutions</h3>{charts.bars(found['resolutions'])}"
            right += f"<h3>Formats</h3>{charts.bars(found['codecs'])}"
            right += f"<h3>Broken or missing</h3>{charts.bars(found['broken'], empty='none')}"
        left, right = (left, right) if left else (right, "")
        parts.append(
            f"<h3 class=kind>{kind}</h3><p class=note>{facts}</p>"
            f"<div class=two><div>{left}</div><div>{right}</div></div>"
        )
    return _section("Media", "".join(parts) or "<p class=none>none</p>")


def _origin(facts: Mapping[str, Any]) -> str:
    time, authors = facts["time"], facts["authors"]
    parts = ""
    if time["days"]:
        note = f"{time['without']:,} posts without a time, {time['unreadable']:,} unreadable"
        parts += (
            f"<div><h3>By time</h3>{charts.by_time(time['days'])}<p class=note>{note}</p></div>"
        )
    if authors["authors"]:
        note = f"{authors['authors']:,} authors of {authors['posts']:,} posts"
        parts += (
            f"<div><h3>By author</h3>{charts.bars(authors['top'])}<p class=note>{note}</p></div>"
        )
    return _section("Times and authors", f"<div class=two>{parts}</div>") if parts else ""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _fold(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _chips(names: Iterable[str]) -> str:
    chips = "".join(f"<span>{escape(name)}</span>" for name in names)
    return f"<div class=chips>{chips}</div>" if chips else "<p class=none>none</p>"


def _counted(counts: Mapping[str, int]) -> str:
    chips = "".join(f"<span>{escape(n)}<em>{count:,}</em></span>" for n, count in counts.items())
    return f"<div class=chips>{chips}</div>" if chips else "<p class=none>none</p>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]], numbers: int = 0) -> str:
    """A table; its last `numbers` columns are numbers."""
    first = len(heads) - numbers

    def cells(values: Sequence[object], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if i >= first else ''}>{escape(str(value))}</{tag}>"
            for i, value in enumerate(values)
        )

    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    if not lines:
        return "<p class=none>none</p>"
    return f"<div class=table><table><tr>{cells(heads, 'th')}</tr>{lines}</table></div>"
