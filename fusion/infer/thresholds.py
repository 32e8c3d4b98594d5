"""Thresholds of a bundle: fitted to labelled posts again, and written as a new version."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import yaml

from common.errors import BundleError, ConfigError, told
from common.files import write_whole
from common.progress import track
from config.settings import InferSettings
from fusion.bundle.about import About, read_about
from fusion.bundle.differences import BundleFiles
from fusion.bundle.folder import ABOUT, later_version
from fusion.data.dataset import FeatureFiles
from fusion.data.posts import PostList
from fusion.infer.inferer import FeatureTagger, has_seen
from fusion.infer.outputs import Bad, Outcome, Result
from fusion.metrics.calibration import fit_thresholds
from fusion.metrics.ranking import AT_THRESHOLDS, summary

_BATCH = 256  # posts that are read and scored together; half is a little slower, double holds more


def read_thresholds(folder: Path) -> tuple[About, dict[str, float]]:
    """Return the content of ``bundle.yaml``, and the thresholds by tag.

    Raises:
        ConfigError: The bundle is broken.
    """
    try:
        bundle = BundleFiles.read(folder, whole=False)
    except BundleError as error:
        raise ConfigError(str(error)) from error
    return bundle.about, dict(zip(bundle.labels.names, bundle.about.thresholds, strict=True))


def write_thresholds(folder: Path, new: Mapping[str, float]) -> str:
    """Give a bundle other thresholds, one for each tag, in one step; return its new version.

    Weights and labels are not touched. The metrics at the old thresholds are left out.
    """
    about, path = read_about(folder), folder.resolve() / ABOUT
    version = later_version(about.version, about.version.rpartition("-")[2])
    with told(f"{folder}: the bundle cannot be written"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        content["version"] = version
        content["thresholds"] = [round(value, 6) for value in new.values()]
        content["metrics"] = {k: v for k, v in about.metrics.items() if k not in AT_THRESHOLDS}
        write_whole(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return version


def fit_to_posts(
    folder: Path, data: Path, features: Path | None, *, min_positives: int, precision: float | None
) -> tuple[dict[str, float], int, dict[str, float]]:
    """Return thresholds fitted to labelled posts with features, their number, and its metrics.

    Posts that a part was trained on are left out: thresholds fitted to them would be too high.

    Raises:
        ConfigError: No post is left, or one has features that the bundle does not take.
    """
    files = FeatureFiles(features)
    tagger = FeatureTagger(InferSettings(bundle=folder, progress=False), files, "cpu")
    bundle = tagger.bundle
    try:
        posts = PostList.read(data, bundle.labels, progress=True)
        labelled = (
            post
            for post in track(posts, "score posts", len(posts))
            if post.labels and not has_seen(bundle, files, post)
        )
        results: list[Result] = []
        while batch := list(islice(labelled, _BATCH)):
            results += _checked(tagger.run(batch), data)
    finally:
        tagger.close()
    if not results:
        raise ConfigError(f"{data}: holds no labelled post that no part of {folder} was trained on")
    targets = np.zeros((len(results), len(bundle.labels)), np.bool_)
    for row, result in zip(targets, results, strict=True):
        row[bundle.labels.encode(result.labels)] = True
    scores = np.stack([result.scores for result in results])
    fitted = fit_thresholds(scores, targets, min_positives=min_positives, precision=precision)
    by_tag = dict(zip(bundle.labels.names, map(float, fitted.tolist()), strict=True))
    return by_tag, len(results), summary(scores, targets, fitted)


def _checked(outcomes: list[Outcome], data: Path) -> Iterator[Result]:
    for outcome in outcomes:
        if isinstance(outcome, Bad):
            raise ConfigError(f"{data}: post {outcome.post_id}: {outcome.reason}")
        yield outcome
