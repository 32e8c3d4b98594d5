"""First reading of the posts: which can be learned from, what links them, what tags they have."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from config.errors import ConfigError, FeatureError
from config.labels import LabelMap
from extractors.feature_file import feature_path, read_features, read_header
from extractors.post import Features, Modality
from scripts.building.groups import Groups
from scripts.corpus.records import BadLine, CorpusPost, read_posts

Unknown = Literal["error", "skip_tag", "skip_post"]
Check = Literal["quick", "full"]

NO_LABELS = "no labels"
TWICE = "post_id stands twice"
UNKNOWN = "label not in the map"
NO_FEATURES = "no feature file"
BROKEN = "broken feature file"
OTHERWISE = "features made otherwise than most"
TOO_FEW = "lacks a modality that is asked for"
NOTHING = "features of no modality"
BAD_LINE = "broken line"


@dataclass(frozen=True)
class Rules:
    """What a post must be to be learned from.

    Attributes:
        unknown: What a label beside the map does.
        check: ``quick`` reads headers, ``full`` also every number.
        modalities: At least one of them must have features; empty takes any.
    """

    unknown: Unknown = "error"
    check: Check = "quick"
    modalities: tuple[Modality, ...] = ()


@dataclass
class Gathered:
    """What the first reading found; about 100 bytes a post, texts are not kept.

    Attributes:
        lines: Of the posts that are kept so far, ``(posts,)``.
        pairs: Post and tag of each label, two arrays ``(pairs,)``.
        keys: Hash of each thing that two posts may share, and the post that has it.
        made_with: Index into `fingerprints` of each post.
        left_out: Line ─► reason, post_id and detail.
        dropped_tags: Labels that were passed over with ``skip_tag``.
    """

    lines: array[int] = field(default_factory=lambda: array("q"))
    ids: array[int] = field(default_factory=lambda: array("Q"))
    pairs: tuple[array[int], array[int]] = field(default_factory=lambda: (array("q"), array("q")))
    keys: tuple[array[int], array[int]] = field(default_factory=lambda: (array("Q"), array("q")))
    made_with: array[int] = field(default_factory=lambda: array("q"))
    fingerprints: list[tuple[tuple[str, str], ...]] = field(default_factory=list)
    left_out: dict[int, tuple[str, str | None, str]] = field(default_factory=dict)
    dropped_tags: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        """Posts that are kept so far."""
        return len(self.lines)


class Gatherer:
    """Reads the posts once.

    Args:
        labels: The map.
        features: Root of the feature files.
        media: Source as it stands in the posts ─► sha256 of its content, where it is known.
    """

    def __init__(
        self,
        labels: LabelMap,
        features: Path,
        rules: Rules,
        media: Callable[[CorpusPost], Iterator[str]],
    ) -> None:
        self._labels, self._features, self._rules, self._media = labels, features, rules, media
        self._found = Gathered()
        self._known: dict[tuple[tuple[str, str], ...], int] = {}

    def read(self, path: Path, advance: Callable[[], None]) -> Gathered:
        """Read a posts file.

        Raises:
            ConfigError: The file cannot be read; or a label is not in the map and must be.
        """
        seen: set[int] = set()
        for entry in read_posts(path):
            advance()
            if isinstance(entry, BadLine):
                self._leave(entry.line, BAD_LINE, entry.post_id, entry.reason)
                continue
            mark = key_of("id", entry.post.post_id)
            if mark in seen:
                self._leave(entry.line, TWICE, entry.post.post_id, "")
                continue
            seen.add(mark)
            self._take(entry, mark, path)
        _refuse_minorities(self._found)
        return self._found

    def _take(self, entry: CorpusPost, mark: int, path: Path) -> None:
        found = self._found
        tags = self._tags(entry, path)
        if tags is None:
            return
        made_with = self._made_with(entry)
        if made_with is None:
            return
        number = len(found.lines)
        found.lines.append(entry.line)
        found.ids.append(mark)
        found.made_with.append(made_with)
        for tag in tags:
            found.pairs[0].append(number)
            found.pairs[1].append(tag)
        for key in self._keys(entry):
            found.keys[0].append(key)
            found.keys[1].append(number)

    def _tags(self, entry: CorpusPost, path: Path) -> list[int] | None:
        post = entry.post
        if not post.labels:
            self._leave(entry.line, NO_LABELS, post.post_id, "")
            return None
        unknown = [name for name in post.labels if name not in self._labels.index]
        if unknown and self._rules.unknown == "error":
            raise ConfigError(
                f"{path}: line {entry.line}: post {post.post_id!r}: label {unknown[0]!r} is not in "
                "the label map; --unknown skip_tag or skip_post leaves it out"
            )
        known = sorted({self._labels.index[n] for n in post.labels if n in self._labels.index})
        if unknown and (self._rules.unknown == "skip_post" or not known):
            self._leave(entry.line, UNKNOWN, post.post_id, ", ".join(unknown))
            return None
        self._found.dropped_tags.update(unknown)
        return known

    def _made_with(self, entry: CorpusPost) -> int | None:
        post_id = entry.post.post_id
        path = feature_path(self._features, post_id)
        if not path.exists():
            self._leave(entry.line, NO_FEATURES, post_id, str(path))
            return None
        try:
            header = read_header(path, post_id)
            if self._rules.check == "full":
                _refuse_not_finite(read_features(self._features, post_id), path)
        except FeatureError as error:
            self._leave(entry.line, BROKEN, post_id, str(error))
            return None
        there = {modality for modality, status in header.statuses.items() if status == "ok"}
        if not there or (self._rules.modalities and not there & set(self._rules.modalities)):
            wanted = ", ".join(self._rules.modalities)
            failed = "; ".join(sorted({failure.message for failure in header.failures.values()}))
            detail = f"has none of: {wanted}" if wanted and there else failed
            self._leave(entry.line, TOO_FEW if there else NOTHING, post_id, detail)
            return None
        marks = tuple(sorted((str(k), str(v)) for k, v in header.fingerprints.items()))
        if marks not in self._known:
            self._known[marks] = len(self._found.fingerprints)
            self._found.fingerprints.append(marks)
        return self._known[marks]

    def _keys(self, entry: CorpusPost) -> Iterator[int]:
        """Hashes of what a post may share with another."""
        if entry.author:
            yield key_of("author", entry.author)
        text = " ".join(entry.post.text.casefold().split())
        if len(text) >= 20:  # a short greeting is no copy of another
            yield key_of("text", text)
        for digest in self._media(entry):
            yield key_of("media", digest)

    def _leave(self, line: int, reason: str, post_id: str | None, detail: str) -> None:
        self._found.left_out[line] = (reason, post_id, detail)


def key_of(kind: str, value: str) -> int:
    """64 bits of a hash; two things that differ share one about never."""
    raw = f"{kind}\0{value}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def link(found: Gathered, more: Iterable[tuple[str, ...]] = ()) -> Groups:
    """Join the posts that share something.

    Args:
        found: The first reading.
        more: Further sets of post IDs, for example near-duplicates; unknown ones are passed over.
    """
    groups = Groups(len(found))
    keys = np.frombuffer(found.keys[0], np.uint64) if found.keys[0] else np.empty(0, np.uint64)
    owners = np.frombuffer(found.keys[1], np.int64) if found.keys[1] else np.empty(0, np.int64)
    order = np.argsort(keys, kind="stable")
    sorted_keys, sorted_owners = keys[order], owners[order]
    same = np.flatnonzero(sorted_keys[1:] == sorted_keys[:-1])  # neighbours with one key
    for left in same:
        groups.join((int(sorted_owners[left]), int(sorted_owners[left + 1])))
    ids = np.frombuffer(found.ids, np.uint64) if found.ids else np.empty(0, np.uint64)
    by_id = np.argsort(ids, kind="stable")  # 8 bytes a post, where a dict takes 150
    sorted_ids = ids[by_id]
    for members in more:
        marks = np.array([key_of("id", each) for each in members], np.uint64)
        at = np.minimum(np.searchsorted(sorted_ids, marks), max(len(ids) - 1, 0))
        known = by_id[at[sorted_ids[at] == marks]].tolist() if len(ids) else []
        if len(known) > 1:
            groups.join(known)
    return groups


def tag_pairs(found: Gathered) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Post and tag of each label, int64 ``(pairs,)`` each."""
    return np.array(found.pairs[0], np.int64), np.array(found.pairs[1], np.int64)


def _refuse_not_finite(features: Features, path: Path) -> None:
    for stream, values in features.arrays.items():
        if not np.isfinite(values).all():
            raise FeatureError(f"{path}: {stream} holds numbers that are not finite")


def _refuse_minorities(found: Gathered) -> None:
    """Leave out posts whose features were made otherwise than most posts'."""
    counts: dict[str, Counter[str]] = {}
    shares = Counter(found.made_with)
    for index, marks in enumerate(found.fingerprints):
        for stream, fingerprint in marks:
            counts.setdefault(stream, Counter())[fingerprint] += shares[index]
    usual = {stream: _most_common(count) for stream, count in counts.items()}
    odd = {
        index: next((s for s, f in marks if f != usual[s]), None)
        for index, marks in enumerate(found.fingerprints)
    }
    if not any(odd.values()):
        return
    keep = np.array([odd[index] is None for index in found.made_with])
    for number in np.flatnonzero(~keep):
        odd_one = str(odd[found.made_with[number]])
        found.left_out[found.lines[number]] = (
            OTHERWISE,
            None,
            f"{odd_one} differs from {usual[odd_one]}: extract it again",
        )
    _keep_only(found, keep)


def _most_common(counts: Counter[str]) -> str:
    """Of equally common ones the first as text, whatever the order of the posts."""
    return min(counts, key=lambda each: (-counts[each], each))


def _keep_only(found: Gathered, keep: npt.NDArray[np.bool_]) -> None:
    new = np.cumsum(keep) - 1
    found.lines = array("q", np.array(found.lines)[keep].tolist())
    found.ids = array("Q", np.array(found.ids, np.uint64)[keep].tolist())
    found.made_with = array("q", np.array(found.made_with)[keep].tolist())
    for pair, kind in ((found.pairs, "q"), (found.keys, "Q")):
        owner = 0 if pair is found.pairs else 1
        owners = np.array(pair[owner], np.int64)
        stays = keep[owners] if len(owners) else np.empty(0, bool)
        others = np.array(pair[1 - owner], np.int64 if kind == "q" else np.uint64)[stays]
        moved = array("q", new[owners[stays]].tolist())
        other = array(kind, others.tolist())
        if pair is found.pairs:
            found.pairs = (moved, other)
        else:
            found.keys = (other, moved)
