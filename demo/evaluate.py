"""Quality of the tags, and the tables and the report that tell of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.text import Text

from common.post import MODALITIES, Features, Modality, Post
from common.tables import print_table
from config.labels import LabelMap
from config.settings import Settings
from demo.layout import Layout

# Offline and online batches differ, and so do the last bits of float16 features.
SCORE_TOLERANCE = 5e-3


@dataclass(frozen=True)
class Evaluation:
    """Results on the online posts: GAP@20 of their tags, without one modality, and of all scores.

    What did not reach its threshold is not in the database, and counts as missed where it is true.
    `same` posts have the same tags in the database and offline; of those `seen`, of which there
    must be none, the bundle or its features' weights have learned.
    """

    gap: float
    gap_without: Mapping[Modality, float]
    gap_all_scores: float
    same: int
    seen: int


def evaluate(
    layout: Layout,
    settings: Settings,
    labels: LabelMap,
    posts: Sequence[Post],
    results: Mapping[str, Mapping[str, Any]],
) -> Evaluation:
    """Judge the database's tags, and the offline path's with and without each modality."""
    from extractors.feature_file import read_features
    from fusion.backbones.small import truth_of
    from fusion.bundle.bundle import load_bundle
    from fusion.data.dataset import FeatureFiles
    from fusion.infer.inferer import Inferer
    from fusion.metrics.ranking import global_average_precision as gap

    truth = truth_of(posts, labels)
    predicted = [results.get(post.post_id, {}).get("tags", ()) for post in posts]
    stored = _matrix(
        [[(tag["id"], tag["score"]) for tag in tags] for tags in predicted], len(labels)
    )
    inferer = Inferer.load(settings.fusion.bundle, threads=1)
    try:
        features = [
            read_features(layout.features, post.post_id, inferer.fingerprints) for post in posts
        ]
        offline, scores = _predict(inferer, features, len(labels), frozenset())
        without = {
            modality: _predict(inferer, features, len(labels), frozenset({modality}))[0]
            for modality in MODALITIES
            if modality in inferer.fingerprints
        }
    finally:
        inferer.close()
    bundle, files = load_bundle(settings.fusion.bundle), FeatureFiles(layout.features)
    seen = sum(
        post.post_id in bundle.learned_from
        or files.has_learned(post.post_id, None, bundle.manifest.dims)
        for post in posts
    )
    same = (np.abs(stored - offline) <= SCORE_TOLERANCE).all(axis=1)
    return Evaluation(
        gap=gap(stored, truth),
        gap_without={modality: gap(tags, truth) for modality, tags in without.items()},
        gap_all_scores=gap(scores, truth),
        same=int(same.sum()),
        seen=seen,
    )


def _matrix(
    tags: Iterable[Iterable[tuple[int | str, float]]], classes: int
) -> npt.NDArray[np.float32]:
    """Return scores float32 ``(posts, classes)``, 0 where there is no tag."""
    listed = [dict(each) for each in tags]
    return np.array([[each.get(i, 0) for i in range(classes)] for each in listed], np.float32)


def _predict(
    inferer: Any, features: Sequence[Features], classes: int, without: frozenset[Modality]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return scores of the tags over their thresholds, and of every class; ``(posts, classes)``."""
    predictions = inferer.predict(list(features), without=without)
    tags = _matrix(([(tag.id, tag.score) for tag in post.tags] for post in predictions), classes)
    return tags, np.stack([post.scores for post in predictions])


def show_posts(posts: Sequence[Post], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the posts, true labels, predicted tags and modalities used."""
    rows = []
    for post in posts:
        result = results.get(post.post_id, {})
        predicted = Text()
        for tag in result.get("tags", ()):
            right = tag["name"] in post.labels
            predicted.append(f"{tag['name']} {tag['score']:.2f}  ", "green" if right else "red")
        names = {str(tag["name"]) for tag in result.get("tags", ())}
        true = Text()
        for name in post.labels:
            true.append(f"{name}  ", "" if name in names else "bold red")
        statuses = result.get("modalities", {})
        used = " ".join(m for m in MODALITIES if statuses.get(m) == "ok")
        rows.append((post.post_id, true, predicted, used))
    print_table("", ("post", "true", "predicted", "used"), rows)


def show_summary(
    evaluation: Evaluation, content: Mapping[str, Any], places: Mapping[str, Path]
) -> None:
    """Print GAP, what each modality is worth, speed, and where everything lies."""
    posts, tagged = content["posts"], content["tagged"]
    print(f"tagged           {tagged} of {posts} posts, {content['posts_per_s']:.1f} posts/s")
    print(f"GAP@20           {content['gap']:.4f}  of the tags in the database")
    print(
        f"                 {evaluation.gap_all_scores:.4f}  of the scores of every class, offline"
    )
    print(f"training posts   {evaluation.seen} of {posts}: those that a part was trained on")
    for modality, gap in content["gap_without"].items():
        print(f"  without {modality:<8}{gap:.4f}")
    print(f"offline = online {evaluation.same} of {posts} posts have the same tags and scores")
    print(f"seconds          {content['seconds']:.0f}")
    for name, path in places.items():
        print(f"{name:<17}{path}")
