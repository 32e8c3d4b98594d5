"""Data files and the posts they name, read from feature files when they are needed.

A data file is a JSON list of ``{post_id, labels: [name, …], features: path, …}``; other keys are
for other readers. Paths are relative to the data file, or else to the working directory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from config.errors import ConfigError, FeatureError
from config.labels import LabelMap
from config.train import DataSettings
from extractors.post import FeatureArray, Features, Modality
from fusion.collate import Sample
from fusion.schema import FeatureManifest, InputSchema


class FeatureReader(Protocol):
    """Where features come from: this package knows no file format."""

    def fingerprints(self, post_id: str, path: Path | None) -> Mapping[Modality, str]:
        """What a post's features were made with.

        Raises:
            FeatureError: There are none, or they cannot be read.
        """

    def features(
        self, post_id: str, path: Path | None, fingerprints: Mapping[Modality, str] | None
    ) -> Features:
        """A post's features; with ``fingerprints`` only those modalities, made with just these.

        Raises:
            FeatureError: There are none, they cannot be read, or they were made otherwise.
        """


@dataclass(frozen=True)
class Record:
    """One post of a data file.

    Attributes:
        labels: Names of the true tags.
        features: Its feature file; None leaves it to the reader to find it by ID.
    """

    post_id: str
    labels: tuple[str, ...] = ()
    features: Path | None = None


def read_data_file(path: Path) -> tuple[Record, ...]:
    """Read a data file.

    Raises:
        ConfigError: It is missing, no JSON list, empty, or an entry is not as it should be.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such data file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a JSON data file: {error}") from error
    if not isinstance(content, list):
        raise ConfigError(f"{path}: must be a list of posts")
    if not content:
        raise ConfigError(f"{path}: holds no posts")
    records = tuple(_record(entry, f"{path}: entry {i}", path) for i, entry in enumerate(content))
    ids = [record.post_id for record in records]
    if len(set(ids)) != len(ids):
        twice = next(post_id for post_id in ids if ids.count(post_id) > 1)
        raise ConfigError(f"{path}: post {twice!r} stands twice")
    return records


def _record(entry: Any, where: str, file: Path) -> Record:
    if not isinstance(entry, dict) or not isinstance(entry.get("post_id"), str):
        raise ConfigError(f"{where}: must have a post_id, a text")
    labels, features = entry.get("labels") or [], entry.get("features")
    if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
        raise ConfigError(f"{where}: labels must be a list of names")
    if features is not None and not isinstance(features, str):
        raise ConfigError(f"{where}: features must be a path")
    return Record(entry["post_id"], tuple(labels), _resolve(features, file))


def _resolve(features: str | None, file: Path) -> Path | None:
    if not features:
        return None
    beside = file.parent / features  # an absolute path stays as it is
    return beside if beside.exists() else Path(features)


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
    records: Sequence[Record], reader: FeatureReader, settings: DataSettings
) -> FeatureManifest:
    """What the posts' features are: read on until every modality was seen, or all posts were.

    Raises:
        FeatureError: Features cannot be read.
        ConfigError: No post has any of the modalities.
    """
    dims: dict[Modality, int] = {}
    fingerprints: dict[Modality, str] = {}
    for record in records:
        found = reader.features(record.post_id, record.features, None)
        new = [m for m in settings.modalities if m in found.arrays and m not in dims]
        if new:
            made_with = reader.fingerprints(record.post_id, record.features)
        for modality in new:
            if modality not in made_with:
                raise FeatureError(f"post {record.post_id}: {modality} has no fingerprint")
            dims[modality] = int(found.arrays[modality].shape[1])
            fingerprints[modality] = made_with[modality]
        if len(dims) == len(settings.modalities):
            break
    if not dims:
        raise ConfigError(f"no post has features of {', '.join(settings.modalities)}")
    return FeatureManifest(dims, fingerprints, settings.image_as_frames, settings.ocr_mode)


class PostDataset(Dataset[Sample]):
    """Posts with their targets; features are read when asked for, and kept up to a budget.

    Args:
        reader: Where features come from.
        manifest: What they must be; others are refused by name.
        targets: float32 ``(posts, classes)``.
        cache_mb: Features that are kept in memory, the first ones read.
    """

    def __init__(
        self,
        records: Sequence[Record],
        targets: np.ndarray[tuple[int, int], np.dtype[np.float32]],
        reader: FeatureReader,
        manifest: FeatureManifest,
        schema: InputSchema,
        *,
        cache_mb: int = 0,
    ) -> None:
        self._records = tuple(records)
        self._targets = targets
        self._reader, self._manifest, self._schema = reader, manifest, schema
        self._budget_bytes = cache_mb * 1024 * 1024
        self._kept: dict[int, dict[Modality, FeatureArray]] = {}

    def __len__(self) -> int:
        """Number of posts."""
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        """One post.

        Raises:
            FeatureError: Its features are missing, broken, not finite, or made otherwise.
        """
        record = self._records[index]
        arrays = self._kept.get(index)
        if arrays is None:
            arrays = self._read(record)
            size = sum(array.nbytes for array in arrays.values())
            if size <= self._budget_bytes:
                self._budget_bytes -= size
                self._kept[index] = arrays
        return Sample(record.post_id, arrays, self._targets[index])

    def _read(self, record: Record) -> dict[Modality, FeatureArray]:
        found = self._reader.features(record.post_id, record.features, self._manifest.fingerprints)
        arrays = self._schema.arrays(found)
        for modality, array in arrays.items():
            if not np.isfinite(array).all():
                raise FeatureError(f"post {record.post_id}: {modality} features are not finite")
        return arrays
