"""Posts out of documents: the conversion, and the draw of a sample that keeps rare tags."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from bson import ObjectId, json_util

from common.times import moment_of
from config.settings import FieldMap, StoreSettings
from fusion.data.data_file import CorpusPost
from king.store.documents import NoIdError, dig, id_text, read_post


class NoPost(Exception):
    """A document that is no post, with the reason."""


class LeftOut(Exception):
    """A post that was not asked for, with the reason."""


def convert(document: Mapping[str, Any], fields: FieldMap) -> CorpusPost:
    """Convert a document to a post; NoPost when it has no usable ID, or nothing to tag."""
    try:
        post_id = id_text(dig(document, fields.id))
    except NoIdError as error:
        raise NoPost(f"{fields.id}: {error}") from error
    post = read_post(post_id, document, fields)
    if not post.text.strip() and not post.media:
        raise NoPost("neither text nor media")
    author = dig(document, fields.author) if fields.author else None
    return CorpusPost(
        replace(post, labels=tuple(dict.fromkeys(post.labels))),
        author=_name(author),
        created=_iso(created_at(document, fields)),
    )


def created_at(document: Mapping[str, Any], fields: FieldMap) -> float | None:
    """Return the time of creation, Unix seconds: ``store.fields.created``, or the ObjectId's."""
    value = dig(document, fields.created or "_id")
    if fields.created is None and not isinstance(value, ObjectId):
        return None  # a number that counts posts is no time
    try:
        return moment_of(value)
    except (OverflowError, ValueError, OSError):
        return None


def _iso(seconds: float | None) -> str | None:
    """Return Unix seconds as ISO 8601 in UTC; None for what no calendar holds."""
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).isoformat()
    except (OverflowError, ValueError, OSError):
        return None


def projection(store: StoreSettings) -> dict[str, int]:
    """Return the top-level fields to read, see `king.store.client`."""
    fields = store.fields
    paths = ("_id", fields.id, fields.text, fields.images, fields.videos, fields.audios)
    more = (fields.labels, fields.author, fields.created)
    return {path.split(".")[0]: 1 for path in (*paths, *more) if path}


def shown_id(document: Mapping[str, Any]) -> str:
    """Return the ``_id`` of a document that may be no post."""
    return _name(document.get("_id")) or json_util.dumps(document.get("_id"))


def _name(value: Any) -> str | None:
    try:
        return id_text(value)
    except NoIdError:
        return None


_ALL = (1 << 64) - 1


@dataclass(frozen=True)
class Choice:
    """The rule by which posts are taken.

    Attributes:
        rare: Tags that are left out.
        need_tag: Whether a post without any tag that is kept is left out.
        highest: Posts up to this hash are taken, and those of `extra`.
    """

    seed: int = 0
    rare: frozenset[str] = frozenset()
    need_tag: bool = False
    highest: int = _ALL
    extra: frozenset[int] = frozenset()

    def without_rare(self, entry: CorpusPost) -> CorpusPost:
        """Return the post without rare tags; raise `LeftOut` if it has no other."""
        if not self.need_tag:
            return entry
        labels = tuple(name for name in entry.post.labels if name not in self.rare)
        if not labels:
            raise LeftOut("only tags of too few posts" if entry.post.labels else "no tags")
        return replace(entry, post=replace(entry.post, labels=labels))

    def check_sampled(self, post_id: str) -> None:
        """Raise `LeftOut` for a post that is not in the sample."""
        position = hash_of(post_id, self.seed)
        if position > self.highest and position not in self.extra:
            raise LeftOut("not in the sample")


def hash_of(post_id: str, seed: int) -> int:
    """Return the position of a post in every sample of this seed, 64 bits."""
    salt = seed.to_bytes(8, "big")
    raw = hashlib.blake2b(post_id.encode("utf-8"), digest_size=8, key=salt).digest()
    return int.from_bytes(raw, "big")


def rare_tags(posts: Iterable[CorpusPost], minimum: int) -> frozenset[str]:
    """Return the tags with fewer posts than the minimum."""
    counts = Counter(name for entry in posts for name in entry.post.labels)
    return frozenset(name for name, count in counts.items() if count < minimum)


def sample(posts: Iterator[CorpusPost], choice: Choice, count: int, minimum: int) -> Choice:
    """Pick a sample of `count` posts in which each tag keeps `minimum` posts.

    Where these alone are more than `count`, the sample is just these. Rare tags are off already.
    """
    smallest: list[int] = []
    by_tag: dict[str, list[int]] = {}
    for entry in posts:
        position = hash_of(entry.post.post_id, choice.seed)
        _keep_smallest(smallest, -position, count)
        for name in entry.post.labels if minimum else ():
            _keep_smallest(by_tag.setdefault(name, []), -position, minimum)
    needed = {-position for positions in by_tag.values() for position in positions}
    others = [p for p in sorted(-negative for negative in smallest) if p not in needed]
    taken = others[: max(0, count - len(needed))]
    highest = taken[-1] if taken else -1
    return replace(choice, highest=highest, extra=frozenset(p for p in needed if p > highest))


def _keep_smallest(heap: list[int], negative: int, count: int) -> None:
    """Keep the `count` smallest hashes, negated, in a heap."""
    if len(heap) < count:
        heapq.heappush(heap, negative)
    else:
        heapq.heappushpop(heap, negative)
