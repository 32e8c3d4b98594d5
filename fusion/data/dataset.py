"""Posts with their features, read from feature files when they are needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from torch.utils.data import Dataset

from common.errors import ConfigError, FeatureError
from common.post import FeatureArray, Features, Stream, modality_of, streams_of
from config.train import DataSettings
from extractors.feature_file import Header, feature_path, read_features, read_header
from fusion.data.data_file import Record
from fusion.data.posts import PostList
from fusion.models.base import FeatureManifest, InputSchema, Sample

_LOOKED_AT = 2048  # posts; what none of them has is not worth a part of the model
# Posts that vote on how features were made, with `skip_bad`: a few badly made ones are outvoted.
# Double reads more files before each training; with half, chance counts for more.
_VOTERS = 64
_KEPT_BYTES = 1024  # what Python needs for the arrays of one post that is kept


@dataclass(frozen=True)
class FeatureFiles:
    """Feature files as training and offline inference read them.

    ``root`` is the folder to find the file of a post by its ID, for posts whose entry names no
    file; None refuses such posts.
    """

    root: Path | None = None

    def header(self, post_id: str, path: Path | None) -> Header:
        return read_header(path or self._file(post_id))

    def has_learned(self, post_id: str, path: Path | None, streams: Container[Stream]) -> bool:
        """Return True when the weights behind some of the streams were trained on a post."""
        return any(stream in streams for stream in self.header(post_id, path).learned_from)

    def features(
        self, post_id: str, path: Path | None, fingerprints: Mapping[Stream, str] | None
    ) -> Features:
        """Return a post's features; an empty ID is taken from the file's name.

        Without ``path`` the file is found by ID. ``fingerprints`` are the streams wanted and what
        they must be made with; None takes all.
        """
        if path is None:
            return read_features(self._file(post_id).parent.parent, post_id, fingerprints)
        expected_id = post_id or unquote(path.stem)
        root = path.parent.parent
        if feature_path(root, expected_id) != path:
            raise FeatureError(f"{path}: is not where the features of post {expected_id!r} lie")
        return read_features(root, expected_id, fingerprints)

    def _file(self, post_id: str) -> Path:
        if self.root is None:
            raise FeatureError(f"post {post_id}: the data file names no feature file for it")
        path = feature_path(self.root, post_id)
        if not path.exists():
            raise FeatureError(
                f"{path}: no such feature file; features names the folder to look in: {self.root}"
            )
        return path


def find_manifest(
    posts: Sequence[Record], reader: FeatureFiles, settings: DataSettings
) -> FeatureManifest:
    """Learn from the feature files what the features are.

    Looks at posts from all over the list until every modality was found, at a few thousand at most;
    a modality that none of them has is not part of the model. With ``skip_bad`` some more posts
    vote on how features were made.
    """
    votes: dict[Stream, Counter[tuple[int, str]]] = {}
    streams = streams_of(settings.modalities)
    voters = _VOTERS if settings.skip_bad else 1
    for looked, row in enumerate(_spread(len(posts))):
        # The streams of a modality come together, so one of them tells of all.
        modality_count = len({modality_of(stream) for stream in votes})
        if modality_count == len(settings.modalities) and looked >= voters:
            break
        try:
            for stream, kind in _made(posts[row], reader, streams).items():
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
    """Return rows from all over a list, its first ones first: people look at those."""
    first = range(min(count, 16))
    return list(dict.fromkeys([*first, *np.linspace(0, count - 1, _LOOKED_AT).astype(int)]))


def _made(
    record: Record, reader: FeatureFiles, streams: Sequence[Stream]
) -> dict[Stream, tuple[int, str]]:
    """Return length and fingerprint of the streams that a post has."""
    features = reader.features(record.post_id, record.features, None)
    present = [stream for stream in streams if stream in features.arrays]
    made_with = reader.header(record.post_id, record.features).fingerprints if present else {}
    for stream in present:
        if stream not in made_with:
            raise FeatureError(f"post {record.post_id}: {stream} has no fingerprint")
    return {s: (int(features.arrays[s].shape[1]), made_with[s]) for s in present}


class PostDataset(Dataset[Sample]):
    """Posts with their targets; the first features read are kept in memory, up to a budget."""

    def __init__(
        self,
        posts: PostList,
        reader: FeatureFiles,
        manifest: FeatureManifest,
        schema: InputSchema,
        *,
        cache_mb: int = 0,
    ) -> None:
        self.posts = posts
        self._reader, self._manifest, self._schema = reader, manifest, schema
        self._budget_bytes = cache_mb * 1024 * 1024
        self._cached: dict[int, tuple[Record, dict[Stream, FeatureArray]]] = {}

    def __len__(self) -> int:
        return len(self.posts)

    def __getitem__(self, row: int) -> Sample:
        cached = self._cached.get(row)
        if cached is None:
            record = self.posts[row]
            cached = (record, self._read(record))
            size = sum(array.nbytes for array in cached[1].values()) + _KEPT_BYTES
            if size <= self._budget_bytes:
                self._budget_bytes -= size
                self._cached[row] = cached
        record, arrays = cached
        return Sample(record.post_id, arrays, self.posts.target(row), record.author)

    def _read(self, record: Record) -> dict[Stream, FeatureArray]:
        features = self._reader.features(
            record.post_id, record.features, self._manifest.fingerprints
        )
        arrays = self._schema.arrays(features)
        for stream, array in arrays.items():
            if not np.isfinite(array).all():
                raise FeatureError(f"post {record.post_id}: {stream} features are not finite")
        return arrays
