"""One training: the models taken from it, and their metrics, measured as they will be served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import nn

from common.post import Features, modality_of
from common.post_set import PostSet
from common.progress import notice, progress_bar
from config.train import TrainSettings
from fusion.bundle.bundle import Bundle, Ensemble, joined
from fusion.bundle.tag_vectors import start_from_texts
from fusion.data.posts import PostList
from fusion.infer.inferer import Inferer
from fusion.metrics import ranking as metrics
from fusion.metrics.calibration import Calibration, calibrated, fit_calibration, fit_thresholds
from fusion.models import FusionModel, build_model
from fusion.report.subsets import SubsetGap, measure_subsets
from fusion.report.write import HeldOutFigures, ReportInput
from fusion.train.checkpoint import (
    Checkpoint,
    Progress,
    Start,
    check_fit,
    find_start,
    load_checkpoint,
    save_checkpoint,
)
from fusion.train.distributed import all_ranks, gathered
from fusion.train.losses import Objective, TaggingLoss
from fusion.train.optimizer import cycle_ends
from fusion.train.prepare import HeldOut, Prepared
from fusion.train.run_log import RunLog
from fusion.train.trainer import OnValidation, Trainer

Scores: TypeAlias = npt.NDArray[np.float64]
Targets: TypeAlias = npt.NDArray[np.float32]
Served: TypeAlias = FusionModel | Ensemble

BATCH = 64
"""Posts of one pass, as `infer_net.py` takes them: in other batches, scores differ by rounding."""


@dataclass(frozen=True)
class Job:
    """Everything that is fixed before a model is made.

    Attributes:
        settings: All settings; ``trainer.save_dir`` is the folder of the run.
        signature: Of the checkpoints; see `fusion.train.checkpoint.model_signature`.
        again: Words of the command, for the report.
    """

    fabric: Fabric
    settings: TrainSettings
    prepared: Prepared
    signature: str
    on_validation: OnValidation | None = None
    again: Sequence[str] = ReportInput.again


@dataclass(frozen=True)
class HeldOutScores:
    """A model's raw scores, float64 ``(posts, classes)``, of posts it was not trained on."""

    model: Served
    posts: PostList
    raw: Scores


@dataclass(frozen=True)
class Measured:
    """Calibration and thresholds fitted to held-out posts, and metrics on them.

    Attributes:
        metrics: Of calibrated scores at the thresholds; empty without held-out posts.
        scores: Calibrated, ``(posts, classes)``; of the parts one after another, as ``targets``.
        seen_posts: Posts that the metrics are of, where parts were trained on them; else 0.
    """

    calibration: Calibration | None
    thresholds: Targets
    metrics: dict[str, float]
    raw: Scores
    scores: Scores
    targets: Targets
    seen_posts: int = 0


def score_held_out(job: Job, model: Served, posts: PostList) -> HeldOutScores:
    """Score posts that a model was not trained on; every process does a part of them."""
    fabric, inferer = job.fabric, _inferer(job, model, None)
    starts = range(0, len(posts), BATCH)
    rank, world = fabric.global_rank, fabric.world_size

    def mine() -> dict[int, Scores]:
        scores = {}
        shown = job.settings.trainer.progress and fabric.is_global_zero
        with progress_bar("validate", len(starts[rank::world]), enabled=shown) as bar:
            for start in starts[rank::world]:
                scores[start] = inferer.scores(_features(job.prepared, posts, start))
                bar.advance()
        return scores

    parts: dict[int, Scores] = {}
    for some in gathered(fabric, all_ranks(fabric, mine)):
        parts |= some
    empty = np.empty((0, len(job.prepared.labels)))
    return HeldOutScores(model, posts, np.concatenate([empty, *(parts[start] for start in starts)]))


def measure(job: Job, held_out: Sequence[HeldOutScores], *, seen: bool) -> Measured:
    """Fit calibration and thresholds, and measure.

    Without held-out posts: no calibration, thresholds of 0.5, no metrics. Nothing is fitted to seen
    posts either.
    """
    settings, classes = job.settings.bundle, len(job.prepared.labels)
    empty, half = np.empty((0, classes)), np.full(classes, 0.5, np.float32)
    raw = np.concatenate([empty, *(part.raw for part in held_out)])
    targets = np.concatenate([empty.astype(np.float32), *(p.posts.targets() for p in held_out)])
    if not len(raw):
        return Measured(None, half, {}, raw, raw, targets)
    if seen:
        return Measured(
            None, half, metrics.summary(raw, targets), raw, raw, targets, seen_posts=len(raw)
        )
    calibration = fit_calibration(settings.calibration, raw, targets)
    scores = calibrated(calibration, raw)
    thresholds = fit_thresholds(
        scores, targets, min_positives=settings.min_positives, precision=settings.precision
    )
    figures = metrics.summary(scores, targets, thresholds)
    return Measured(calibration, thresholds, figures, raw, scores, targets)


def measure_test(
    job: Job, model: Served, measured: Measured, test: HeldOut
) -> HeldOutFigures | None:
    """Measure posts that chose nothing, with the calibration and thresholds that are served."""
    if not test.posts:
        return None
    held_out = score_held_out(job, model, test.posts)
    scores, targets = calibrated(measured.calibration, held_out.raw), test.posts.targets()
    count = len(test.posts)
    return HeldOutFigures(
        count,
        metrics.summary(scores, targets, measured.thresholds),
        seen_posts=count if test.seen else 0,
    )


def subset_gaps(
    job: Job, held_out: Sequence[HeldOutScores], calibration: Calibration | None
) -> list[SubsetGap]:
    """Return the GAP of every subset of the modalities over some of the held-out posts."""
    total, most = sum(len(part.posts) for part in held_out), job.settings.report.subset_posts
    if not total or not most:
        return []
    modalities = {modality_of(stream) for stream in job.prepared.manifest.dims}

    def chunks() -> Iterator[tuple[Inferer, Sequence[Features], Targets]]:
        for part in held_out:
            rows = np.arange(len(part.posts))
            if total > most:
                count = -(-most * len(part.posts) // total)
                rows = np.unique(np.linspace(0, len(rows) - 1, count).round().astype(np.int64))
            inferer = _inferer(job, part.model, calibration)
            chosen = part.posts.take(rows)
            for start in range(0, len(chosen), BATCH):
                targets = chosen[start : start + BATCH].targets()
                yield inferer, _features(job.prepared, chosen, start), targets

    with progress_bar("modalities", min(total, most), enabled=job.settings.trainer.progress) as bar:
        return measure_subsets(chunks(), modalities, bar.advance)


def _features(prepared: Prepared, posts: PostList, start: int) -> list[Features]:
    read = partial(prepared.reader.features, fingerprints=prepared.manifest.fingerprints)
    rows = range(start, min(start + BATCH, len(posts)))
    return [read(record.post_id, record.features) for record in map(posts.__getitem__, rows)]


def _inferer(job: Job, model: Served, calibration: Calibration | None) -> Inferer:
    bundle = Bundle(
        name="",
        labels=job.prepared.labels,
        manifest=job.prepared.manifest,
        settings=job.settings.model,
        model=model.eval(),
        thresholds=np.full(len(job.prepared.labels), 0.5, np.float32),
        calibration=calibration,
    )
    return Inferer(bundle, str(job.fabric.device), batch_size=BATCH)


@dataclass(frozen=True)
class Trained:
    """The outcome of one training, or of all trainings of the folds.

    Attributes:
        held_out: Posts that were not trained on, with the scores of a model that has not seen
            them; empty without validation.
        best_epoch: The epoch that was kept, from 1; of several models the first one's.
        data_wait: Share of the training steps' time that was spent waiting for data.
    """

    model: Served
    held_out: tuple[HeldOutScores, ...]
    best_epoch: int
    epochs: int
    logs: tuple[Path, ...]
    data_wait: float
    log: RunLog


def train_model(
    job: Job, posts: PostList, held_out: HeldOut, *, seed: int, start: Start | None
) -> Trained:
    """Train a model, or its snapshots, and score the validation posts with the best weights.

    Args:
        job: The training's.
        posts: To train on.
        held_out: Its posts choose the best epoch.
        seed: Of weights, order and noise.
        start: Where to begin.
    """
    fabric, settings, prepared = job.fabric, job.settings, job.prepared
    count = settings.ensemble.snapshots
    optimizer, snapshots = settings.optimizer, None
    if count > 1:
        optimizer = optimizer.model_copy(update={"cycles": count})
        snapshots = _Snapshots(job, seed, start)
    positives = torch.from_numpy(posts.positives().astype(np.float32))  # (classes,)
    torch.manual_seed(seed)
    model = build_model(prepared.schema, settings.model)
    model.start_at(positives / len(posts))
    start_from_texts(model, settings.model, prepared.manifest, prepared.labels)
    trainer = Trainer(
        fabric,
        settings.trainer,
        optimizer,
        signature=job.signature,
        seed=seed,
        on_epoch_end=snapshots,
        on_validation=job.on_validation,
    )
    for note in filter(None, (*prepared.notes, held_out.note)):
        notice(f"warning: {note}", enabled=fabric.is_global_zero)
        trainer.log.write("warning", text=note)
    objective = Objective(
        model,
        TaggingLoss(settings.loss, positives),
        auxiliary=model.own_weight,
        mixup=settings.loss.mixup,
    )
    earlier = PostSet() if start is None else start.learned_from
    progress = trainer.fit(objective, prepared.data(settings, posts, held_out, earlier), start)
    models = (model,) if snapshots is None else snapshots.models()
    served = joined(models, settings.ensemble.averaging)
    scores: tuple[HeldOutScores, ...] = ()
    if held_out.posts:
        scores = (score_held_out(job, served, held_out.posts),)
    return Trained(
        model=served,
        held_out=scores,
        best_epoch=progress.best_epoch,
        epochs=progress.epoch,
        logs=(trainer.log.path,),
        data_wait=trainer.wait.share,
        log=trainer.log,
    )


class _Snapshots:
    """Weights at the ends of the learning rate's cycles: ``ckpt/snapshot-1.pt`` and so on."""

    def __init__(self, job: Job, seed: int, start: Start | None) -> None:
        self._job, self._seed = job, seed
        # A run that goes on in another folder left its first snapshots in the old one.
        self._earlier = start.path.parent if start is not None and start.exact else None
        self._ends = cycle_ends(job.settings.trainer.epochs, job.settings.ensemble.snapshots)

    def __call__(self, epoch: int, model: nn.Module) -> None:
        """Save the weights if a cycle ends with this epoch."""
        if epoch in self._ends and self._job.fabric.is_global_zero:
            state = {name: value.cpu() for name, value in model.state_dict().items()}
            progress = Progress(self._seed, epoch=epoch)
            save_checkpoint(self._path(epoch), Checkpoint(self._job.signature, progress, state))

    def models(self) -> tuple[FusionModel, ...]:
        """Return all of them, the earliest first."""
        self._job.fabric.barrier()
        models = []
        for epoch in self._ends:
            path = self._path(epoch)
            if not path.exists() and self._earlier is not None:
                path = self._earlier / path.name
            models.append(model_of(self._job, path))
        return tuple(models)

    def _path(self, epoch: int) -> Path:
        number = self._ends.index(epoch) + 1
        return self._job.settings.trainer.save_dir / "ckpt" / f"snapshot-{number}.pt"


def model_of(job: Job, path: Path) -> FusionModel:
    model = build_model(job.prepared.schema, job.settings.model)
    model.load_state_dict(load_checkpoint(path, job.signature).model)
    return model.to(job.fabric.device).eval()


def start_of(job: Job, resume: Path | None) -> Start | None:
    """Read on every rank what `find_start` finds; None begins from step 0."""
    if resume is None:
        return None

    def find() -> Start:
        allow_pickle = job.settings.trainer.allow_pickle
        start = find_start(resume, job.signature, allow_pickle=allow_pickle)
        with torch.device("meta"):  # names and shapes alone
            check_fit(build_model(job.prepared.schema, job.settings.model), start)
        return start

    return all_ranks(job.fabric, find)
