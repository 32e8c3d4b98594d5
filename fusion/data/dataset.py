"""Posts with their features, read from feature files when they are needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from torch.utils.data import Dataset

from common.errors import ConfigError, FeatureError
from common.post import FeatureArray, Features, Stream, modality_of, streams_of
from config.labels import LabelMap
from config.train import DataSettings
from fusion.data.collate import Sample
from fusion.data.data_file import Record, read_data_file
from fusion.data.posts import PostList
from fusion.data.schema import FeatureManifest, InputSchema

__all__ = [
    "FeatureReader",
    "PostDataset",
    "Record",
    "encode_targets",
    "find_manifest",
    "read_data_file",
]

_LOOKED_AT = 2048  # posts; what none of them has is not worth a part of the model
_VOTERS = 64
_KEPT_BYTES = 1024  # what Python needs for the arrays of one post that is kept


class FeatureReader(Protocol):
    """Where features come from: this package knows no file format."""

    def fingerprints(self, post_id: str, path: Path | None) -> Mapping[Stream, str]:
        """What a post's features were made with.

        Raises:
            FeatureError: There are none, or they cannot be read.
        """

    def features(
        self, post_id: str, path: Path | None, fingerprints: Mapping[Stream, str] | None
    ) -> Features:
        """A post's features; with ``fingerprints`` only those streams, made with just these.

        Raises:
            FeatureError: There are none, they cannot be read, or they were made otherwise.
        """


def encode_targets(
    records: Sequence[Record], labels: LabelMap, where: str
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """The true tags as float32 ``(posts, classes)`` of 0 and 1.

    Raises:
        ConfigError: A label is not in the map.
    """
    targets = np.zeros((len(records), len(labels)), np.float32)
    for row, record in zip(targets, records, strict=True):
        row[labels.encode(record.labels, where=f"{where}: post {record.post_id}")] = 1
    return targets


def find_manifest(
    posts: Sequence[Record], reader: FeatureReader, settings: DataSettings
) -> FeatureManifest:
    """Learn from the feature files what the features are.

    Looks at posts from all over the list until every modality was found, at a few thousand at
    most; a modality that none of them has is not part of the model. With ``skip_bad`` some more
    posts vote on how features were made.

    Raises:
        FeatureError: Features cannot be read.
        ConfigError: No post has any of the modalities.
    """
    votes: dict[Stream, Counter[tuple[int, str]]] = {}
    wanted = streams_of(settings.modalities)
    voters = _VOTERS if settings.skip_bad else 1
    for looked, row in enumerate(_spread(len(posts))):
        # The streams of a modality come together, so one of them tells of all.
        found = len({modality_of(stream) for stream in votes})
        if found == len(settings.modalities) and looked >= voters:
            break
        try:
            for stream, kind in _made(posts[row], reader, wanted).items():
                votes.setdefault(stream, Counter())[kind] += 1
        except FeatureError:
            if not settings.skip_bad:
                raise
    if not votes:
        raise ConfigError(f"no post has features of {', '.join(settings.modalities)}")
    chosen = {stream: counts.most_common(1)[0][0] for stream, counts in votes.items()}
    return FeatureManifest(
        {stream: dim for stream, (dim, _) in chosen.items()},
        {stream: fingerprint for stream, (_, fingerprint) in chosen.items()},
        settings.image_as_frames,
        settings.ocr_mode,
    )


def _spread(count: int) -> list[int]:
    """Rows from all over a list, its first ones first: they are what a person looks at."""
    first = range(min(count, 16))
    return list(dict.fromkeys([*first, *np.linspace(0, count - 1, _LOOKED_AT).astype(int)]))


def _made(
    record: Record, reader: FeatureReader, wanted: Sequence[Stream]
) -> dict[Stream, tuple[int, str]]:
    """Length and fingerprint of the streams that a post has."""
    found = reader.features(record.post_id, record.features, None)
    there = [stream for stream in wanted if stream in found.arrays]
    made_with = reader.fingerprints(record.post_id, record.features) if there else {}
    for stream in there:
        if stream not in made_with:
            raise FeatureError(f"post {record.post_id}: {stream} has no fingerprint")
    return {s: (int(found.arrays[s].shape[1]), made_with[s]) for s in there}


class PostDataset(Dataset[Sample]):
    """Posts with their targets; features are read when asked for, and kept up to a budget.

    Args:
        posts: With their labels.
        reader: Where features come from.
        manifest: What they must be; others are refused by name.
        cache_mb: Features that are kept in memory, the first ones read.
    """

    def __init__(
        self,
        posts: PostList,
        reader: FeatureReader,
        manifest: FeatureManifest,
        schema: InputSchema,
        *,
        cache_mb: int = 0,
    ) -> None:
        self.posts = posts
        self._reader, self._manifest, self._schema = reader, manifest, schema
        self._budget_bytes = cache_mb * 1024 * 1024
        self._kept: dict[int, tuple[str, dict[Stream, FeatureArray]]] = {}

    def __len__(self) -> int:
        """Number of posts."""
        return len(self.posts)

    def __getitem__(self, row: int) -> Sample:
        """One post.

        Raises:
            FeatureError: Its features are missing, broken, not finite, or made otherwise.
            ConfigError: The data file has changed.
        """
        kept = self._kept.get(row)
        if kept is None:
            kept = self._read(self.posts[row])
            size = sum(array.nbytes for array in kept[1].values()) + _KEPT_BYTES
            if size <= self._budget_bytes:
                self._budget_bytes -= size
                self._kept[row] = kept
        return Sample(kept[0], kept[1], self.posts.target(row))

    def _read(self, record: Record) -> tuple[str, dict[Stream, FeatureArray]]:
        found = self._reader.features(record.post_id, record.features, self._manifest.fingerprints)
        arrays = self._schema.arrays(found)
        for stream, array in arrays.items():
            if not np.isfinite(array).all():
                raise FeatureError(f"post {record.post_id}: {stream} features are not finite")
        return record.post_id, arrays
