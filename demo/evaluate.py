"""Quality of the tags: GAP of the database's tags, with and without each modality."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.post import MODALITIES, Features, Modality, Post
from config.labels import LabelMap
from config.settings import Settings
from demo.layout import Layout

SCORE_TOLERANCE = 5e-3


@dataclass(frozen=True)
class Evaluation:
    """Results on the online posts.

    Attributes:
        gap: GAP@20 of the tags in the database: what did not reach its threshold is not there,
            and counts as missed where it is true.
        gap_without: The same of the offline tags when one modality is hidden.
        gap_all_scores: GAP@20 of the offline scores of every class.
        same: Posts whose tags are the same in the database and offline.
    """

    gap: float
    gap_without: Mapping[Modality, float]
    gap_all_scores: float
    same: int


def evaluate(
    layout: Layout,
    settings: Settings,
    labels: LabelMap,
    posts: Sequence[Post],
    results: Mapping[str, Mapping[str, Any]],
) -> Evaluation:
    """Judge the database's tags, and the offline path's with and without each modality.

    Raises:
        FeatureError: Features are missing.
        BundleError: The bundle is missing or broken.
    """
    from extractors.feature_file import read_features
    from fusion.infer.inferer import Inferer
    from fusion.metrics.ranking import global_average_precision as gap

    truth = np.zeros((len(posts), len(labels)), np.float32)
    for row, post in zip(truth, posts, strict=True):
        row[labels.encode(post.labels)] = 1
    stored = _matrix([_stored(results.get(post.post_id)) for post in posts], len(labels))
    inferer = Inferer.load(settings.fusion.bundle, threads=1)
    try:
        features = [
            read_features(layout.features, post.post_id, inferer.fingerprints) for post in posts
        ]
        offline, scores = _predict(inferer, features, len(labels), frozenset())
        without = {
            modality: _predict(inferer, features, len(labels), frozenset({modality}))[0]
            for modality in MODALITIES
        }
    finally:
        inferer.close()
    same = (np.abs(stored - offline) <= SCORE_TOLERANCE).all(axis=1)
    return Evaluation(
        gap=gap(stored, truth),
        gap_without={modality: gap(tags, truth) for modality, tags in without.items()},
        gap_all_scores=gap(scores, truth),
        same=int(same.sum()),
    )


def _stored(result: Mapping[str, Any] | None) -> list[tuple[int, float]]:
    tags = (result or {}).get("tags", ())
    return [(int(tag["id"]), float(tag["score"])) for tag in tags]


def _matrix(tags: Iterable[Iterable[tuple[int, float]]], classes: int) -> npt.NDArray[np.float32]:
    """Return scores float32 ``(posts, classes)``, 0 where there is no tag."""
    rows = []
    for listed in tags:
        row = np.zeros(classes, np.float32)
        for index, score in listed:
            row[index] = score
        rows.append(row)
    return np.stack(rows)


def _predict(
    inferer: Any, features: Sequence[Features], classes: int, without: frozenset[Modality]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return scores of the tags over their thresholds, and of every class; ``(posts, classes)``."""
    found = inferer.predict(list(features), without=without)
    tags = _matrix(([(tag.id, tag.score) for tag in post.tags] for post in found), classes)
    return tags, np.stack([post.scores for post in found])
