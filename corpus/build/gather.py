"""First reading of the posts: which can be learned from, what links them, what tags they have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from common.errors import ConfigError, FeatureError
from config.labels import LabelMap
from extractors.feature_file import feature_path, read_features, read_header
from common.post import Features, Modality
from corpus.build.index import Index, Marks, key_of
from corpus.records import BadLine, CorpusPost, read_posts

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


class Gatherer:
    """Reads the posts once.

    Args:
        labels: The map.
        features: Root of the feature files.
        index: Takes what is found; media of a manifest are in it already.
    """

    def __init__(self, labels: LabelMap, features: Path, rules: Rules, index: Index) -> None:
        self._labels, self._features, self._rules, self._index = labels, features, rules, index

    def read(self, path: Path, advance: Callable[[], None]) -> None:
        """Read a posts file.

        Raises:
            ConfigError: The file cannot be read; or a label is not in the map and must be.
        """
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
        if made_with is not None:
            keys = self._keys(entry)
            self._index.keep(entry.line, entry.post.post_id, tags, made_with, keys)

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
        known = sorted({self._labels.index[n] for n in post.labels if n in self._labels.index})
        if unknown and (self._rules.unknown == "skip_post" or not known):
            self._index.leave(entry.line, UNKNOWN, post.post_id, ", ".join(unknown))
            return None
        self._index.drop(unknown)
        return known

    def _made_with(self, entry: CorpusPost) -> Marks | None:
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
        there = {modality for modality, status in header.statuses.items() if status == "ok"}
        if not there or (self._rules.modalities and not there & set(self._rules.modalities)):
            wanted = ", ".join(self._rules.modalities)
            failed = "; ".join(sorted({failure.message for failure in header.failures.values()}))
            detail = f"has none of: {wanted}" if wanted and there else failed
            self._index.leave(entry.line, TOO_FEW if there else NOTHING, post_id, detail)
            return None
        return tuple(sorted((str(k), str(v)) for k, v in header.fingerprints.items()))

    def _keys(self, entry: CorpusPost) -> Iterator[int]:
        """Hashes of what a post may share with another."""
        if entry.author:
            yield key_of("author", entry.author)
        text = " ".join(entry.post.text.casefold().split())
        if len(text) >= 20:  # a short greeting is no copy of another
            yield key_of("text", text)
        for media in entry.post.media:
            yield key_of("media", self._content(media.source))

    def _content(self, source: str) -> str:
        """What says which medium it is: the hash of its content where it is known."""
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
    shares = index.shares()
    for marks, number in index.fingerprints.items():
        for stream, fingerprint in marks:
            counts.setdefault(stream, Counter())[fingerprint] += shares.get(number, 0)
    usual = {stream: _most_common(count) for stream, count in counts.items()}
    for marks, number in index.fingerprints.items():
        odd = next((s for s, f in marks if f != usual[s]), None)
        if odd is not None:
            detail = f"{odd} differs from {usual[odd]}: extract it again"
            index.refuse(number, OTHERWISE, detail)


def _most_common(counts: Counter[str]) -> str:
    """Of equally common ones the first as text, whatever the order of the posts."""
    return min(counts, key=lambda each: (-counts[each], each))
