"""Metrics of a trained model, measured as it will be served: by the inferer, in its batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from lightning_fabric import Fabric

from common.post import Features, modality_of
from common.progress import progress_bar
from config.train import TrainSettings
from fusion.bundle.bundle import Bundle, Ensemble
from fusion.data.posts import PostList
from fusion.infer.inferer import Inferer
from fusion.metrics import ranking as metrics
from fusion.metrics.calibration import Calibration, calibrated, fit_calibration
from fusion.metrics.thresholds import fit_thresholds
from fusion.models import FusionModel
from fusion.report.subsets import SubsetGap, measure_subsets
from fusion.train.distributed import all_ranks, gathered
from fusion.train.prepare import Prepared

Scores: TypeAlias = npt.NDArray[np.float32]
Served: TypeAlias = FusionModel | Ensemble

BATCH = 64
"""Posts of one pass, as `infer_net.py` takes them: in other batches, scores differ by rounding."""


@dataclass(frozen=True)
class HeldOutScores:
    """Posts that a model has not learned from, and its scores.

    Attributes:
        model: One model, or an ensemble; in evaluation mode.
        raw: Before calibration, float32 ``(posts, classes)``.
    """

    model: Served
    posts: PostList
    raw: Scores


@dataclass(frozen=True)
class Measured:
    """Calibration and thresholds fitted to held-out posts, and metrics on them.

    Attributes:
        thresholds: float32 ``(classes,)``.
        metrics: Of calibrated scores at the thresholds; empty without held-out posts.
        scores: Calibrated, float32 ``(posts, classes)``; of the parts one after another.
        targets: In the same shape.
    """

    calibration: Calibration | None
    thresholds: Scores
    metrics: dict[str, float]
    raw: Scores
    scores: Scores
    targets: Scores


def score_held_out(
    fabric: Fabric, settings: TrainSettings, prepared: Prepared, model: Served, posts: PostList
) -> HeldOutScores:
    """Score posts that a model has not learned from; every process does a part of them."""
    inferer = _inferer(fabric, prepared, model, None)
    starts = range(0, len(posts), BATCH)
    rank, world = fabric.global_rank, fabric.world_size

    def mine() -> dict[int, Scores]:
        found = {}
        shown = settings.trainer.progress and fabric.is_global_zero
        with progress_bar("validate", len(starts[rank::world]), enabled=shown) as bar:
            for start in starts[rank::world]:
                found[start] = inferer.scores(_features(prepared, posts, start))
                bar.advance()
        return found

    parts: dict[int, Scores] = {}
    for some in gathered(fabric, all_ranks(fabric, mine)):
        parts |= some
    empty = np.empty((0, len(prepared.labels)), np.float32)
    return HeldOutScores(model, posts, np.concatenate([empty, *(parts[start] for start in starts)]))


def measure(
    settings: TrainSettings, prepared: Prepared, held_out: Sequence[HeldOutScores]
) -> Measured:
    """Fit calibration and thresholds, and measure.

    Without held-out posts: no calibration, thresholds of 0.5, no metrics.
    """
    classes = len(prepared.labels)
    empty = np.empty((0, classes), np.float32)
    raw = np.concatenate([empty, *(part.raw for part in held_out)])
    targets = np.concatenate([empty, *(part.posts.targets() for part in held_out)])
    if not len(raw):
        return Measured(None, np.full(classes, 0.5, np.float32), {}, raw, raw, targets)
    calibration = fit_calibration(settings.bundle.calibration, raw, targets)
    scores = calibrated(calibration, raw)
    thresholds = fit_thresholds(
        scores,
        targets,
        min_positives=settings.bundle.min_positives,
        precision=settings.bundle.precision,
    )
    found = metrics.summary(scores, targets, thresholds)
    return Measured(calibration, thresholds, found, raw, scores, targets)


def subset_gaps(
    fabric: Fabric,
    settings: TrainSettings,
    prepared: Prepared,
    held_out: Sequence[HeldOutScores],
    calibration: Calibration | None,
) -> list[SubsetGap]:
    """GAP of every subset of the modalities over some of the held-out posts."""
    total, most = sum(len(part.posts) for part in held_out), settings.report.subset_posts
    if not total or not most:
        return []
    modalities = {modality_of(stream) for stream in prepared.manifest.dims}

    def chunks() -> Iterator[tuple[Inferer, Sequence[Features], Scores]]:
        for part in held_out:
            rows = np.arange(len(part.posts))
            if total > most:
                count = -(-most * len(part.posts) // total)
                rows = np.unique(np.linspace(0, len(rows) - 1, count).round().astype(np.int64))
            inferer = _inferer(fabric, prepared, part.model, calibration)
            chosen = part.posts.take(rows)
            for start in range(0, len(chosen), BATCH):
                targets = chosen[start : start + BATCH].targets()
                yield inferer, _features(prepared, chosen, start), targets

    with progress_bar("modalities", min(total, most), enabled=settings.trainer.progress) as bar:
        return measure_subsets(chunks(), modalities, bar.advance)


def _features(prepared: Prepared, posts: PostList, start: int) -> list[Features]:
    read = partial(prepared.reader.features, fingerprints=prepared.manifest.fingerprints)
    rows = range(start, min(start + BATCH, len(posts)))
    return [read(record.post_id, record.features) for record in map(posts.__getitem__, rows)]


def _inferer(
    fabric: Fabric, prepared: Prepared, model: Served, calibration: Calibration | None
) -> Inferer:
    bundle = Bundle(
        name="",
        version="",
        labels=prepared.labels,
        manifest=prepared.manifest,
        schema=prepared.schema,
        model=model.eval(),
        thresholds=np.full(len(prepared.labels), 0.5, np.float32),
        metrics={},
        calibration=calibration,
    )
    return Inferer(bundle, str(fabric.device), batch_size=BATCH)
