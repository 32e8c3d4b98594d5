"""The first reading of the posts: labels, features and links, into an index on the disk.

SQLite makes its file in the system's temporary folder (``TMPDIR`` names another), keeps a bounded
part of it in memory, and removes its name at once: whatever ends the process, nothing stays. It
takes about 100 bytes a post.
"""

from __future__ import annotations

import hashlib
import sqlite3
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from common.errors import ConfigError, FeatureError
from common.post import Features, Modality, clean
from common.times import moment_of
from config.labels import LabelMap
from corpus.databases import open_scratch
from extractors.feature_file import feature_path, read_features, read_header
from fusion.data.data_file import BadLine, CorpusPost, read_posts


class Groups:
    """Sets of posts, indices 0 to ``count`` - 1, that grow together; 4 bytes a post."""

    def __init__(self, count: int) -> None:
        self._parent = array("I", range(count))

    def __len__(self) -> int:
        return len(self._parent)

    def root(self, post: int) -> int:
        """Return the post that stands for the set; halve the path on the way."""
        parent = self._parent
        while parent[post] != post:
            parent[post] = parent[parent[post]]
            post = parent[post]
        return post

    def join(self, posts: Iterable[int]) -> None:
        """Join posts into one set.

        The smallest index stands for it, so that the result does not depend on the order of calls.
        """
        roots = sorted({self.root(post) for post in posts})
        for other in roots[1:]:
            self._parent[other] = roots[0]


SIDES = ("train", "valid", "test")
TEST = SIDES.index("test")

Marks: TypeAlias = tuple[tuple[str, str], ...]

_TABLES = """
CREATE TABLE posts (number INTEGER PRIMARY KEY, line INTEGER, made_with INTEGER, tags BLOB,
                    part INTEGER, held INTEGER);
CREATE TABLE seen (mark INTEGER PRIMARY KEY, number INTEGER);
CREATE TABLE keys (key INTEGER, number INTEGER);
CREATE TABLE left_out (line INTEGER PRIMARY KEY, reason TEXT, post_id TEXT, detail TEXT);
CREATE TABLE sides (mark INTEGER PRIMARY KEY, side INTEGER);
CREATE TABLE media (source TEXT PRIMARY KEY, sha256 TEXT) WITHOUT ROWID;
CREATE TABLE parts (number INTEGER PRIMARY KEY, size INTEGER, tags BLOB, lot INTEGER, side INTEGER);
"""
_MAX_NAMES = 10_000
"""Labels outside the map that are counted by name: wild ones must not fill the memory."""
OTHERS = "(others)"


class Index:
    """Posts to train on, their links, and the lines left out; a context manager.

    Attributes:
        base: The database. ``posts``: kept ones, numbered in the order of their lines, `tags` as
            int32 numbers, `part` the group, `held` the side that is given, or -1. ``seen``: hash of
            each post_id. ``sides``: sides that are given. ``keys``: hash of each thing that two
            posts may share. ``parts``: the groups, `tags` as pairs of tag and count, `lot` a random
            number.
        fingerprints: What feature files were made with; ``posts.made_with`` counts them.
        dropped_tags: Labels that were passed over, and how often.
    """

    def __init__(self) -> None:
        self.base = open_scratch("", _TABLES)
        self.fingerprints: dict[Marks, int] = {}
        self.dropped_tags: Counter[str] = Counter()
        self._next = 0

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.base.close()

    def __len__(self) -> int:
        return int(self.base.execute("SELECT COUNT(*) FROM posts").fetchone()[0])

    def see(self, post_id: str) -> bool:
        """Note a post_id; return False when it came before."""
        insert = "INSERT OR IGNORE INTO seen VALUES (?, NULL)"
        return bool(self.base.execute(insert, (key_of("id", post_id),)).rowcount)

    def give_side(self, post_id: str, side: int) -> None:
        """Note the side of a post, before it is read; ConfigError when it has another."""
        if self.given_side(post_id) not in (-1, side):
            raise ConfigError(f"post {post_id!r} is on two sides of the split; name it once")
        row = (key_of("id", post_id), side)
        self.base.execute("INSERT OR REPLACE INTO sides VALUES (?, ?)", row)

    def given_side(self, post_id: str) -> int:
        """Return the side that is given for a post, or -1."""
        query = "SELECT side FROM sides WHERE mark = ?"
        row = self.base.execute(query, (key_of("id", post_id),)).fetchone()
        return -1 if row is None else int(row[0])

    def keep(
        self,
        entry: CorpusPost,
        tags: Iterable[int],
        made_with: Marks,
        keys: Iterable[int],
        held: int,
    ) -> None:
        """Add a post to train on; `held` is its side, -1 where that is open."""
        number, self._next = self._next, self._next + 1
        index = self.fingerprints.setdefault(made_with, len(self.fingerprints))
        row = (number, entry.line, index, array("i", tags).tobytes(), 0, held)
        self.base.execute("INSERT INTO posts VALUES (?, ?, ?, ?, ?, ?)", row)
        mark = key_of("id", entry.post.post_id)
        self.base.execute("UPDATE seen SET number = ? WHERE mark = ?", (number, mark))
        self.base.executemany("INSERT INTO keys VALUES (?, ?)", ((key, number) for key in keys))

    def leave(self, line: int, reason: str, post_id: str | None, detail: str) -> None:
        """Note a line that gives no post to train on."""
        row = (line, reason, post_id, clean(detail))
        self.base.execute("INSERT INTO left_out VALUES (?, ?, ?, ?)", row)

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            listed = name in self.dropped_tags or len(self.dropped_tags) < _MAX_NAMES
            self.dropped_tags[name if listed else OTHERS] += 1

    def refuse(self, made_with: int, reason: str, detail: str) -> None:
        """Leave out the posts whose features have a fingerprint."""
        which = (reason, detail, made_with)
        self.base.execute(
            "INSERT INTO left_out SELECT line, ?, NULL, ? FROM posts WHERE made_with = ?", which
        )
        for query in (
            "DELETE FROM keys WHERE number IN (SELECT number FROM posts WHERE made_with = ?)",
            "UPDATE seen SET number = NULL "
            "WHERE number IN (SELECT number FROM posts WHERE made_with = ?)",
            "DELETE FROM posts WHERE made_with = ?",
        ):
            self.base.execute(query, (made_with,))

    def add_medium(self, source: str, sha256: str) -> None:
        row = (clean(source), sha256)
        self.base.execute("INSERT OR REPLACE INTO media VALUES (?, ?)", row)

    def medium(self, source: str) -> str | None:
        """Return the sha256 of a medium's content, from a manifest; None if it names none."""
        query = "SELECT sha256 FROM media WHERE source = ?"
        row = self.base.execute(query, (clean(source),)).fetchone()
        return None if row is None else str(row[0])

    def number_of(self, post_id: str) -> int | None:
        query = "SELECT number FROM seen WHERE mark = ?"
        row = self.base.execute(query, (key_of("id", post_id),)).fetchone()
        return None if row is None else row[0]

    def link(self, more: Iterable[tuple[str, ...]] = (), *, within_sides: bool = False) -> None:
        """Join the posts that share something, and number the groups in the order of their posts.

        Args:
            more: Further sets of post IDs, such as near-duplicates; unknown IDs are ignored.
            within_sides: Join only posts of one given side: an exact split stays as it is.
        """
        for members in more:
            key = key_of("set", "\0".join(members))
            numbers = (self.number_of(post_id) for post_id in members)
            rows = [(key, number) for number in numbers if number is not None]
            self.base.executemany("INSERT INTO keys VALUES (?, ?)", rows)
        groups = Groups(self._next)  # 4 bytes a post, as much again for the numbers
        previous: tuple[int, int, int] | None = None
        query = (
            "SELECT key, iif(?, held, 0), number FROM keys JOIN posts USING (number) "
            "ORDER BY 1, 2, 3"
        )
        for row in self.base.execute(query, (within_sides,)):
            if previous is not None and previous[:2] == row[:2]:
                groups.join((previous[2], row[2]))
            previous = row
        self._number(groups)

    def split_links(self) -> int:
        """Count the authors, media, texts and sets that stand on two sides."""
        query = (
            "SELECT COUNT(*) FROM (SELECT key FROM keys JOIN posts USING (number) "
            "JOIN parts ON parts.number = part GROUP BY key HAVING COUNT(DISTINCT side) > 1)"
        )
        return int(self.base.execute(query).fetchone()[0])

    def side_of(self, post_id: str) -> int | None:
        """Return the side that a post was dealt to; None for one that is left out."""
        query = (
            "SELECT side FROM seen JOIN posts USING (number) JOIN parts ON parts.number = part "
            "WHERE mark = ?"
        )
        row = self.base.execute(query, (key_of("id", post_id),)).fetchone()
        return None if row is None else int(row[0])

    def _number(self, groups: Groups) -> None:
        """Number the groups; refused posts are in none."""
        numbers = array("I", bytes(4 * len(groups)))

        def rows() -> Iterator[tuple[int, int]]:
            count = 0
            for (post,) in self.base.execute("SELECT number FROM posts ORDER BY number"):
                root = groups.root(post)  # the first of them all: it has its number already
                if root == post:
                    numbers[post], count = count, count + 1
                else:
                    numbers[post] = numbers[root]
                yield numbers[post], post

        batches(self.base, "UPDATE posts SET part = ? WHERE number = ?", rows())

    def reasons(self) -> dict[str, int]:
        """Count the lines left out, by reason."""
        return dict(self.base.execute("SELECT reason, COUNT(*) FROM left_out GROUP BY reason"))

    def left_out(self, line: int) -> tuple[str, str | None, str] | None:
        """Return reason, post_id and detail of a line that was left out."""
        query = "SELECT reason, post_id, detail FROM left_out WHERE line = ?"
        row = self.base.execute(query, (line,)).fetchone()
        return None if row is None else (str(row[0]), row[1], str(row[2]))

    def dealt(self) -> Iterator[tuple[int, int, int]]:
        """Yield line, group and side of each post, in the order of the lines."""
        yield from self.base.execute(
            "SELECT line, part, side FROM posts JOIN parts ON parts.number = part "
            "ORDER BY posts.number"
        )


def batches(base: sqlite3.Connection, query: str, rows: Iterator[tuple[object, ...]]) -> None:
    """Run `executemany` in batches, for rows that come from a query on the same table."""
    while batch := list(islice(rows, 1000)):
        base.executemany(query, batch)


def key_of(kind: str, value: str) -> int:
    """Return a signed 64-bit hash; collisions are negligible."""
    raw = f"{kind}\0{value}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little", signed=True)


Unknown = Literal["error", "skip_tag", "skip_post"]
Check = Literal["quick", "full"]

NO_LABELS = "no labels"
TWICE = "post_id appears twice"
UNKNOWN = "label not in the map"
NO_FEATURES = "no feature file"
BROKEN = "broken feature file"
OTHERWISE = "features made otherwise than most"
TOO_FEW = "lacks a modality that is asked for"
NOTHING = "features of no modality"
BAD_LINE = "broken line"
NOT_LISTED = "not in --split"
NO_TIME = "created is not known"


@dataclass(frozen=True)
class Rules:
    """Conditions for a post to be trained on: see the options of the same names."""

    unknown: Unknown = "error"
    check: Check = "quick"
    modalities: tuple[Modality, ...] = ()
    exact: bool = False
    """Leave out posts without a given side."""
    test_since: float | None = None
    """Unix seconds; posts created from then on go to the test."""


class Gatherer:
    """The first reading of the posts into an index, which has the media of a manifest already."""

    def __init__(self, labels: LabelMap, features: Path | None, rules: Rules, index: Index) -> None:
        """Read with the features under a root, or, with None, without looking at any."""
        self._labels, self._features, self._rules, self._index = labels, features, rules, index

    def read(self, path: Path, advance: Callable[[], None]) -> None:
        """Read a posts file; refuse a label that is not in the map and must be."""
        for entry in read_posts(path):
            advance()
            if isinstance(entry, BadLine):
                self._index.leave(entry.line, BAD_LINE, entry.post_id, entry.reason)
            elif not self._index.see(entry.post.post_id):
                self._index.leave(entry.line, TWICE, entry.post.post_id, "")
            else:
                self._take(entry, path)
        _refuse_minorities(self._index)

    def _take(self, entry: CorpusPost, path: Path) -> None:
        tags = self._tags(entry, path)
        if tags is None:
            return
        made_with = self._made_with(entry)
        held = None if made_with is None else self._held(entry)
        if made_with is not None and held is not None:
            self._index.keep(entry, tags, made_with, self._keys(entry), held)

    def _held(self, entry: CorpusPost) -> int | None:
        """Return the side that a post must be on, or -1; None leaves it out."""
        post_id = entry.post.post_id
        if self._rules.test_since is not None:
            created = moment_of(entry.created)
            if created is None:
                self._index.leave(entry.line, NO_TIME, post_id, str(entry.created or ""))
                return None
            return TEST if created >= self._rules.test_since else -1
        side = self._index.given_side(post_id)
        if side < 0 and self._rules.exact:
            self._index.leave(entry.line, NOT_LISTED, post_id, "")
            return None
        return side

    def _tags(self, entry: CorpusPost, path: Path) -> list[int] | None:
        post = entry.post
        if not post.labels:
            self._index.leave(entry.line, NO_LABELS, post.post_id, "")
            return None
        unknown = [name for name in post.labels if name not in self._labels.index]
        if unknown and self._rules.unknown == "error":
            raise ConfigError(
                f"{path}: line {entry.line}: post {post.post_id!r}: label {unknown[0]!r} is not in "
                "the label map; --unknown skip_tag or skip_post leaves it out"
            )
        tags = sorted({self._labels.index[n] for n in post.labels if n in self._labels.index})
        if unknown and (self._rules.unknown == "skip_post" or not tags):
            self._index.leave(entry.line, UNKNOWN, post.post_id, ", ".join(unknown))
            return None
        self._index.drop(unknown)
        return tags

    def _made_with(self, entry: CorpusPost) -> Marks | None:
        if self._features is None:
            return ()
        post_id = entry.post.post_id
        path = feature_path(self._features, post_id)
        if not path.exists():
            self._index.leave(entry.line, NO_FEATURES, post_id, str(path))
            return None
        try:
            header = read_header(path, post_id)
            if self._rules.check == "full":
                _refuse_not_finite(read_features(self._features, post_id), path)
        except FeatureError as error:
            self._index.leave(entry.line, BROKEN, post_id, str(error))
            return None
        ok = {modality for modality, status in header.statuses.items() if status == "ok"}
        if not ok or (self._rules.modalities and not ok & set(self._rules.modalities)):
            required = ", ".join(self._rules.modalities)
            failed = "; ".join(sorted({failure.message for failure in header.failures.values()}))
            detail = f"has none of: {required}" if required and ok else failed
            self._index.leave(entry.line, TOO_FEW if ok else NOTHING, post_id, detail)
            return None
        return tuple(sorted((str(k), str(v)) for k, v in header.fingerprints.items()))

    def _keys(self, entry: CorpusPost) -> Iterator[int]:
        """Yield hashes of what a post may share with another."""
        if entry.author:
            yield key_of("author", entry.author)
        text = " ".join(entry.post.text.casefold().split())
        if len(text) >= 20:  # a short greeting is no copy of another
            yield key_of("text", text)
        for media in entry.post.media:
            yield key_of("media", self._content(media.source))

    def _content(self, source: str) -> str:
        """Return the identity of a medium: the hash of its content where it is known."""
        stem = Path(source).stem  # `download_mp` names files by their hash
        named = len(stem) == 64 and all(char in "0123456789abcdef" for char in stem)
        return self._index.medium(source) or (stem if named else source)


def _refuse_not_finite(features: Features, path: Path) -> None:
    for stream, values in features.arrays.items():
        if not np.isfinite(values).all():
            raise FeatureError(f"{path}: {stream} holds numbers that are not finite")


def _refuse_minorities(index: Index) -> None:
    """Leave out posts whose features were made otherwise than most posts'."""
    counts: dict[str, Counter[str]] = {}
    query = "SELECT made_with, COUNT(*) FROM posts GROUP BY made_with"
    shares = dict(index.base.execute(query))
    for marks, number in index.fingerprints.items():
        for stream, fingerprint in marks:
            counts.setdefault(stream, Counter())[fingerprint] += shares.get(number, 0)
    usual = {  # of equals the first as text, whatever the order of the posts
        stream: min(count, key=lambda each: (-count[each], each))
        for stream, count in counts.items()
    }
    for marks, number in index.fingerprints.items():
        odd = next((s for s, f in marks if f != usual[s]), None)
        if odd is not None:
            detail = f"{odd} differs from {usual[odd]}: extract it again"
            index.refuse(number, OTHERWISE, detail)
