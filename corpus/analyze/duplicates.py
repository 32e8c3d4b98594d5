"""Posts that are the same or nearly: by the bytes of a medium, by a picture's look, by the text.

What grows with the posts lies in a temporary SQLite file: about 400 bytes a post and its text, 350
bytes a picture. In memory stay 4 bytes a post and 40 bytes a distinct picture; a group of many
posts comes in parts. Where A is like B and B like C, all three are one group.
"""

from __future__ import annotations

import json
import sqlite3
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from corpus.analyze.labels import ranked
from corpus.analyze.looks import hash_of, near_pairs, same_colours
from corpus.analyze.measure import MediaFact
from corpus.analyze.texts import MAX_CHARS, Bands, comparable, jaccard, key_of, normal, shingles
from corpus.build.index import Groups
from corpus.databases import open_scratch
from fusion.data.data_file import CorpusPost

Kind: TypeAlias = Literal["exact_media", "near_image", "near_text"]
KINDS: tuple[Kind, ...] = ("exact_media", "near_image", "near_text")

_MAX_LEADERS = 32
"""Distinct things of one bucket that a further one is compared with: bounds the time of a corpus of
which a large part shares a bucket, for example one text with a number in it."""

MAX_MEMBERS = 1000
"""Members of a part: a picture may be in a million posts."""
_MAX_MEDIA = 16

# Groups that the report shows, and the members of each: what a person looks through.
_EXAMPLES, _MEMBERS = 30, 8

_TABLES = """
CREATE TABLE posts (number INTEGER PRIMARY KEY, post_id TEXT);
CREATE TABLE uses (sha256 BLOB, number INTEGER, PRIMARY KEY (sha256, number)) WITHOUT ROWID;
CREATE TABLE looks (picture INTEGER PRIMARY KEY, sha256 BLOB UNIQUE, hash INTEGER, look BLOB);
CREATE TABLE texts (number INTEGER PRIMARY KEY, key BLOB UNIQUE, content TEXT);
CREATE TABLE bands (key INTEGER, number INTEGER);
CREATE TABLE same (number INTEGER, first INTEGER);
CREATE TABLE found (first INTEGER, number INTEGER, PRIMARY KEY (first, number)) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Group:
    """Posts that share something, or a part of them.

    Attributes:
        kind: ``exact_media``: a medium, byte for byte; ``near_image``: pictures that look alike
            and differ in their bytes; ``near_text``: the text, but for small edits, or exactly.
        members: Their IDs, two or more, in the order of the posts; at most `MAX_MEMBERS`.
        media: sha256 of the media that they share, where they share some; at most 16.
        continued: A further part of the group before: its first member is that group's first, so
            that parts which are read as groups of their own still hang together.
    """

    kind: Kind
    members: tuple[str, ...]
    media: tuple[str, ...] = ()
    continued: bool = False


def _parts(kind: Kind, rows: Iterable[tuple[str, bytes | None]]) -> Iterator[Group]:
    """Yield groups of one set: rows of a post_id and a medium, the rows of a post together."""
    ids: list[str] = []
    media: dict[str, None] = {}
    continued = False
    for post_id, sha256 in rows:
        if not ids or ids[-1] != post_id:
            if len(ids) == MAX_MEMBERS:
                yield Group(kind, tuple(ids), tuple(media), continued)
                ids, media, continued = ids[:1], {}, True
            ids.append(post_id)
        if sha256 is not None and len(media) < _MAX_MEDIA:
            media[bytes(sha256).hex()] = None
    if len(ids) > 1:
        yield Group(kind, tuple(ids), tuple(media), continued)


def find_groups(
    posts: Iterable[CorpusPost],
    media_of: Callable[[str], MediaFact | None],
    *,
    text_threshold: float = 0.9,
    hash_distance: int = 6,
    file: Path | str = "",
) -> Iterator[Group]:
    """Find the groups of posts that are duplicates of each other; reads `posts` once, first.

    Args:
        posts: Each post_id once.
        media_of: Returns what is known of the file of a source; None where nothing is.
        text_threshold: Share of three-character runs that two texts must have in common,
            above 0 and at most 1.
        hash_distance: Bits of 64 in which the structure of two pictures may differ, 0 to 16.
        file: Of the database that is thrown away; by default one in the system's own folder.
    """
    with closing(open_scratch(file, _TABLES)) as base:
        finder = _Finder(base, text_threshold, hash_distance)
        for entry in posts:
            finder.add(entry, media_of)
        yield from finder.exact_media()
        yield from finder.near_images()
        yield from finder.near_texts()


class _Finder:
    def __init__(self, base: sqlite3.Connection, threshold: float, distance: int) -> None:
        self._base, self._threshold, self._distance = base, threshold, distance
        self._bands = Bands(threshold)
        self._count = self._pictures = 0

    def add(self, entry: CorpusPost, media_of: Callable[[str], MediaFact | None]) -> None:
        number, post = self._count, entry.post
        self._count += 1
        self._base.execute("INSERT INTO posts VALUES (?, ?)", (number, post.post_id))
        for media in post.media:
            fact = media_of(media.source)
            # A broken file gives no features: one that many posts share links none of them.
            if fact is not None and fact.sha256 and fact.reason is None:
                self._add_use(number, fact)
        text = normal(post.text)
        if comparable(text):
            self._add_text(number, text)

    def _add_use(self, number: int, fact: MediaFact) -> None:
        sha256 = bytes.fromhex(fact.sha256)
        self._base.execute("INSERT OR IGNORE INTO uses VALUES (?, ?)", (sha256, number))
        if fact.look is None:
            return
        signed = int.from_bytes(fact.look[:8], "big", signed=True)
        row = (self._pictures, sha256, signed, fact.look)
        added = self._base.execute("INSERT OR IGNORE INTO looks VALUES (?, ?, ?, ?)", row)
        self._pictures += added.rowcount

    def _add_text(self, number: int, text: str) -> None:
        added = self._base.execute(
            "INSERT OR IGNORE INTO texts VALUES (?, ?, ?)", (number, key_of(text), text[:MAX_CHARS])
        )
        if not added.rowcount:
            query = "INSERT INTO same SELECT ?, number FROM texts WHERE key = ?"
            self._base.execute(query, (number, key_of(text)))
            return
        keys = self._bands.keys(shingles(text[:MAX_CHARS]))
        self._base.executemany("INSERT INTO bands VALUES (?, ?)", ((key, number) for key in keys))

    def exact_media(self) -> Iterator[Group]:
        rows = self._base.execute(
            "SELECT shared.first, shared.sha256, post_id FROM (SELECT sha256, MIN(number) AS first "
            "FROM uses GROUP BY sha256 HAVING COUNT(*) > 1) AS shared "
            "JOIN uses USING (sha256) JOIN posts USING (number) ORDER BY 1, 2, number"
        )
        for (_, sha256), members in groupby(rows, key=itemgetter(0, 1)):
            yield from _parts("exact_media", ((post_id, sha256) for _, _, post_id in members))

    def near_images(self) -> Iterator[Group]:
        if self._pictures < 2:
            return
        groups = Groups(self._pictures)

        def alike(one: int, other: int) -> bool:
            return same_colours(look(one), look(other))

        look = lru_cache(maxsize=2 * _MAX_LEADERS)(self._look)
        # Pictures that stand for all with their hash and colours, and their hashes: a corpus may
        # hold one picture a million times, each time encoded anew.
        leaders, hashes = array("q"), array("Q")
        rows = self._base.execute("SELECT hash, picture FROM looks ORDER BY hash, picture")
        for bucket in _join_buckets(rows, groups, alike):
            leaders.extend(bucket)
            hashes.extend([hash_of(look(bucket[0]))] * len(bucket))
        for i, j in near_pairs(np.frombuffer(hashes, np.uint64), self._distance):
            one, other = leaders[i], leaders[j]
            if groups.root(one) != groups.root(other) and alike(one, other):
                groups.join((one, other))
        self._keep(groups, (row[0] for row in self._base.execute("SELECT picture FROM looks")))
        rows = self._base.execute(
            "SELECT first, uses.number, post_id, sha256 FROM found "
            "JOIN looks ON picture = found.number "
            "JOIN uses USING (sha256) JOIN posts ON posts.number = uses.number "
            "ORDER BY first, uses.number, sha256"
        )
        for _, members in groupby(rows, key=itemgetter(0)):
            yield from _parts("near_image", ((row[2], row[3]) for row in members))

    def near_texts(self) -> Iterator[Group]:
        groups = Groups(self._count)
        for pair in self._base.execute("SELECT number, first FROM same"):
            groups.join(pair)
        parts = lru_cache(maxsize=2 * _MAX_LEADERS)(self._shingles)
        rows = self._base.execute("SELECT key, number FROM bands ORDER BY key, number")
        for _ in _join_buckets(
            rows, groups, lambda one, other: jaccard(parts(one), parts(other)) >= self._threshold
        ):
            pass
        self._keep(groups, range(self._count))
        rows = self._base.execute(
            "SELECT first, post_id FROM found JOIN posts USING (number) ORDER BY first, number"
        )
        for _, members in groupby(rows, key=itemgetter(0)):
            yield from _parts("near_text", ((post_id, None) for _, post_id in members))

    def _keep(self, groups: Groups, numbers: Iterable[int]) -> None:
        """Put the sets of two and more into the table ``found``."""
        self._base.execute("DELETE FROM found")
        # The set's first member comes when its second does.
        rows = (
            row
            for number in numbers
            if (first := groups.root(number)) != number
            for row in ((first, first), (first, number))
        )
        self._base.executemany("INSERT OR IGNORE INTO found VALUES (?, ?)", rows)

    def _look(self, picture: int) -> bytes:
        query = "SELECT look FROM looks WHERE picture = ?"
        return bytes(self._base.execute(query, (picture,)).fetchone()[0])

    def _shingles(self, number: int) -> frozenset[str]:
        query = "SELECT content FROM texts WHERE number = ?"
        return shingles(self._base.execute(query, (number,)).fetchone()[0])


def _join_buckets(
    rows: Iterable[tuple[int, int]], groups: Groups, alike: Callable[[int, int], bool]
) -> Iterator[list[int]]:
    """Join what is alike in each bucket of rows with one key; yield its distinct members."""
    for _, bucket in groupby(rows, key=itemgetter(0)):
        leaders: list[int] = []
        for _, number in bucket:
            for leader in leaders:
                if groups.root(leader) == groups.root(number):
                    break
                if alike(leader, number):
                    groups.join((leader, number))
                    break
            else:
                if len(leaders) < _MAX_LEADERS:
                    leaders.append(number)
        yield leaders


class GroupTally:
    """Counts of groups of duplicates, and those whose labels disagree.

    `labels_of` returns the distinct tags of a post.
    """

    def __init__(self, labels_of: Callable[[str], frozenset[str]]) -> None:
        self._labels_of = labels_of
        counts = ("groups", "posts", "largest", "labels_differ")
        self._kinds: dict[str, dict[str, Any]] = {
            kind: {**dict.fromkeys(counts, 0), "examples": [], "disputes": []} for kind in KINDS
        }
        self._disputed: Counter[str] = Counter()
        self._size = 0  # of the group so far
        self._shown: list[dict[str, Any]] = []  # of the group: its size may grow

    def as_dict(self) -> dict[str, Any]:
        """Return for each kind: groups, posts, the largest, how many disagree, and examples."""
        return {"kinds": self._kinds, "disputed_tags": ranked(self._disputed, 50)}

    def add(self, group: Group) -> None:
        """Count a group, or a further part of the last one."""
        counts = self._kinds[group.kind]
        new = len(group.members) - group.continued
        self._size = new + self._size * group.continued
        counts["posts"] += new
        counts["largest"] = max(counts["largest"], self._size)
        if group.continued:  # its tags are not compared
            for one in self._shown:
                one["posts"] = self._size
            return
        self._shown = []
        counts["groups"] += 1
        sets = {post_id: self._labels_of(post_id) for post_id in group.members}
        labelled = {post_id: labels for post_id, labels in sets.items() if labels}
        shown = {post_id: sorted(sets[post_id]) for post_id in group.members[:_MEMBERS]}
        example: dict[str, Any] = {"posts": len(group.members), "labels": shown}
        if group.media:
            example["media"] = list(group.media)
        if len(counts["examples"]) < _EXAMPLES:
            counts["examples"].append(example)
            self._shown.append(example)
        if len(set(labelled.values())) < 2:
            return
        counts["labels_differ"] += 1
        some = frozenset[str]().union(*labelled.values())
        every = some.intersection(*labelled.values())
        self._disputed.update(some - every)
        if len(counts["disputes"]) < _EXAMPLES:
            dispute = {**example, "disputed": sorted(some - every)[:20]}
            counts["disputes"].append(dispute)
            self._shown.append(dispute)


def group_line(group: Group) -> str:
    """Return a line of ``duplicates.jsonl``: ``{kind, members, media, continued}``."""
    content: dict[str, Any] = {"kind": group.kind, "members": list(group.members)}
    if group.media:
        content["media"] = list(group.media)
    if group.continued:
        content["continued"] = True
    return json.dumps(content, ensure_ascii=False)
