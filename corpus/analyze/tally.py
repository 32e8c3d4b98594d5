"""Counts over the posts, in one pass: modalities, texts, media, authors, times."""

from __future__ import annotations

import bisect
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from common.post import MEDIA_KINDS, MODALITIES, MediaKind, Post
from corpus.analyze.labels import Labels, ranked
from corpus.analyze.measure import MediaFact
from corpus.analyze.texts import language_of
from corpus.databases import open_scratch
from corpus.records import count_name
from fusion.data.data_file import BadLine, CorpusPost

_TOP_AUTHORS, _TOP_SIZES, _EXAMPLES = 20, 20, 20
# Posts that a page shows of each tag, the tags of which it does, and what is kept of each post.
_SAMPLES, _SAMPLED, _KEPT_CHARS, _KEPT_MEDIA = 4, 24, 200, 16

_TABLES = """
CREATE TABLE posts (post_id TEXT PRIMARY KEY, labels TEXT, text TEXT, media TEXT) WITHOUT ROWID;
CREATE TABLE contents (sha256 BLOB, kind TEXT, PRIMARY KEY (sha256, kind)) WITHOUT ROWID;
CREATE TABLE authors (author TEXT PRIMARY KEY, posts INTEGER) WITHOUT ROWID;
"""
# Edges of the classes of histograms: steps that a person has a feeling for.
TEXT_EDGES = (1, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
BYTE_EDGES = tuple(10**i * k for i in range(3, 9) for k in (1, 3))
SECOND_EDGES = (1, 3, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)
SIDE_EDGES = (64, 128, 240, 360, 480, 720, 1080, 1440, 2160, 4320)

FactOf = Callable[[str, MediaKind], MediaFact]


class Histogram:
    """Counts of numbers in fixed classes: of any number of values, the same few bytes.

    Class i holds values of ``edges[i - 1]`` up to below ``edges[i]``, the first all below, the last
    all from the last edge on.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges, self.counts = edges, [0] * (len(edges) + 1)
        self._total, self._lowest, self._highest = 0.0, math.inf, -math.inf

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_right(self.edges, value)] += 1
        self._total += value
        self._lowest, self._highest = min(self._lowest, value), max(self._highest, value)

    def as_dict(self) -> dict[str, object]:
        """Return ``{values, lowest, mean, highest, edges, counts}``."""
        values = sum(self.counts)
        return {
            "values": values,
            "lowest": self._lowest if values else None,
            "mean": round(self._total / values, 3) if values else None,
            "highest": self._highest if values else None,
            "edges": list(self.edges),
            "counts": self.counts,
        }


@dataclass
class MediaTally:
    """Media of one kind. Sizes and the like are of distinct contents: a file used twice is one."""

    uses: int = 0
    posts: int = 0
    files: int = 0
    size_bytes: int = 0
    with_sound: int = 0
    per_post: Counter[int] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    codecs: Counter[str] = field(default_factory=Counter)
    resolutions: Counter[str] = field(default_factory=Counter)
    sizes: Histogram = field(default_factory=lambda: Histogram(BYTE_EDGES))
    seconds: Histogram = field(default_factory=lambda: Histogram(SECOND_EDGES))
    sides: Histogram = field(default_factory=lambda: Histogram(SIDE_EDGES))

    def as_dict(self) -> dict[str, Any]:
        return {
            "uses": self.uses,
            "posts": self.posts,
            "per_post": {str(n): self.per_post[n] for n in sorted(self.per_post)},
            "files": self.files,
            "bytes": self.size_bytes,
            "with_sound": self.with_sound,
            "broken": ranked(self.broken),
            "codecs": ranked(self.codecs),
            "resolutions": ranked(self.resolutions, _TOP_SIZES),
            "file_bytes": self.sizes.as_dict(),
            "duration_s": self.seconds.as_dict(),
            "shorter_side": self.sides.as_dict(),
        }


class Tally:
    """Counts posts; what grows with them lies in a temporary SQLite file.

    `fact_of` returns what is known of a medium; None counts media without opening any.
    """

    def __init__(self, file: Path, fact_of: FactOf | None) -> None:
        self._base, self._fact_of = open_scratch(file, _TABLES), fact_of
        self.labels = Labels()
        self.posts = self.bad = 0
        self.reasons: Counter[str] = Counter()
        self.examples: list[dict[str, Any]] = []
        self._modalities: Counter[str] = Counter()
        self._combinations: Counter[tuple[str, ...]] = Counter()
        self._languages: Counter[str] = Counter()
        self._lengths, self._ocr = Histogram(TEXT_EDGES), Histogram(TEXT_EDGES)
        self._media = {kind: MediaTally() for kind in MEDIA_KINDS}
        self._days: Counter[str] = Counter()
        self._undated = self._bad_dates = 0
        self._samples: dict[str, list[str]] = {}
        self._chance = random.Random(0)  # noqa: S311 - the same posts in each run

    def reject(self, entry: BadLine) -> None:
        self._leave_out(entry.line, entry.post_id, entry.reason, entry.reason.partition(":")[0])

    def add(self, entry: CorpusPost) -> bool:
        """Count a post; return False for a post_id that was counted already: it is left out."""
        post = entry.post
        media = [(medium.kind, medium.source) for medium in post.media[:_KEPT_MEDIA]]
        labels = json.dumps(sorted(set(post.labels)))
        row = (post.post_id, labels, post.text[:_KEPT_CHARS], json.dumps(media))
        if not self._base.execute("INSERT OR IGNORE INTO posts VALUES (?, ?, ?, ?)", row).rowcount:
            self._leave_out(entry.line, post.post_id, "post_id appears twice", "")
            return False
        self.posts += 1
        self.labels.add(post.post_id, post.labels)
        self._sample(post)
        self._languages[language_of(post.text)] += 1
        self._lengths.add(len(post.text.strip()))
        if post.ocr is not None:
            self._ocr.add(len(post.ocr.strip()))
        self._count_media(post)
        self._count_modalities(post)
        self._count_origin(entry)
        return True

    def close(self) -> None:
        self._base.close()

    def labels_of(self, post_id: str) -> frozenset[str]:
        """Return the distinct tags of a post that was counted."""
        query = "SELECT labels FROM posts WHERE post_id = ?"
        row = self._base.execute(query, (post_id,)).fetchone()
        return frozenset(json.loads(row[0])) if row else frozenset()

    def content_of(self, post_id: str) -> tuple[str, list[tuple[MediaKind, str]]]:
        """Return the beginning of a post's text, and its first media by kind and source."""
        query = "SELECT text, media FROM posts WHERE post_id = ?"
        text, media = self._base.execute(query, (post_id,)).fetchone()
        return text, [(kind, source) for kind, source in json.loads(media)]

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the tags."""
        return {
            "posts": {
                "read": self.posts + self.bad,
                "kept": self.posts,
                "left_out": ranked(self.reasons),
                "left_out_examples": self.examples,
                "without_labels": self.labels.per_post[0],
                "empty": self._combinations[()],
            },
            # Nobody knows yet in which sounds there is speech.
            "modalities": {name: self._modalities[name] for name in MODALITIES if name != "asr"},
            "combinations": ranked(
                Counter({" + ".join(n) or "nothing": c for n, c in self._combinations.items()})
            ),
            "text": {
                "chars": self._lengths.as_dict(),
                "ocr_chars": self._ocr.as_dict(),
                "languages": ranked(self._languages),
            },
            "media": {kind: tally.as_dict() for kind, tally in self._media.items()},
            "samples": {tag: self._samples[tag] for tag in ranked(self.labels.counts, _SAMPLED)},
            "authors": self._authors(),
            "time": {
                "days": {day: self._days[day] for day in sorted(self._days)},
                "without": self._undated,
                "unreadable": self._bad_dates,
            },
        }

    def _sample(self, post: Post) -> None:
        """Keep some posts of each tag, each of its posts with the same chance."""
        for tag in sorted(set(post.labels)):
            some, count = self._samples.setdefault(tag, []), self.labels.counts[tag]
            place = len(some) if len(some) < _SAMPLES else self._chance.randrange(count)
            if place < _SAMPLES:
                some[place : place + 1] = [post.post_id]

    def _leave_out(self, line: int, post_id: str | None, reason: str, kind: str) -> None:
        self.bad += 1
        count_name(self.reasons, kind or reason)
        if len(self.examples) < _EXAMPLES:
            self.examples.append({"line": line, "post_id": post_id, "reason": reason})

    def _count_media(self, post: Post) -> None:
        uses: Counter[MediaKind] = Counter(media.kind for media in post.media)
        for kind, count in uses.items():
            tally = self._media[kind]
            tally.uses += count
            tally.posts += 1
            tally.per_post[min(count, 20)] += 1
        if self._fact_of is None:
            return
        for media in post.media:
            self._count_fact(self._media[media.kind], self._fact_of(media.source, media.kind))

    def _count_fact(self, tally: MediaTally, fact: MediaFact) -> None:
        if fact.reason is not None:
            count_name(tally.broken, fact.reason)
        row = (bytes.fromhex(fact.sha256), fact.kind)
        query = "INSERT OR IGNORE INTO contents VALUES (?, ?)"
        if not fact.sha256 or not self._base.execute(query, row).rowcount:
            return
        tally.files += 1
        tally.size_bytes += fact.size_bytes
        tally.sizes.add(fact.size_bytes)
        if fact.codec:
            count_name(tally.codecs, fact.codec)
        if fact.sound:
            tally.with_sound += 1
            count_name(tally.codecs, f"{fact.sound} (sound)")
        if fact.width:
            count_name(tally.resolutions, f"{fact.width}×{fact.height}")
            tally.sides.add(min(fact.width, fact.height))
        if fact.duration_s is not None:
            tally.seconds.add(fact.duration_s)

    def _count_modalities(self, post: Post) -> None:
        kinds = {media.kind for media in post.media}
        texts = {"text": post.text.strip(), "ocr": (post.ocr or "").strip()}
        names = tuple(name for name in MODALITIES if name in kinds or texts.get(name))
        self._modalities.update(names)
        self._combinations[names] += 1

    def _count_origin(self, entry: CorpusPost) -> None:
        if entry.author:
            self._base.execute(
                "INSERT INTO authors VALUES (?, 1) "
                "ON CONFLICT(author) DO UPDATE SET posts = posts + 1",
                (entry.author,),
            )
        if entry.created is None:
            self._undated += 1
            return
        try:
            self._days[date.fromisoformat(entry.created[:10]).isoformat()] += 1
        except ValueError:
            self._bad_dates += 1

    def _authors(self) -> dict[str, Any]:
        query = "SELECT COUNT(*), COALESCE(SUM(posts), 0) FROM authors"
        count, posts = self._base.execute(query).fetchone()
        top: Sequence[tuple[str, int]] = self._base.execute(
            "SELECT author, posts FROM authors ORDER BY posts DESC, author LIMIT ?", (_TOP_AUTHORS,)
        ).fetchall()
        return {"authors": count, "posts": posts, "top": dict(top)}
