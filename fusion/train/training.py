"""A whole training: data files in, bundle and report out. What `train_net.py` runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from lightning_fabric import Fabric

from common.progress import notice
from config.train import TrainSettings
from fusion.bundle.bundle import members_of, save_bundle
from fusion.data.dataset import FeatureReader
from fusion.metrics.ranking import average_precisions
from fusion.train import distributed as processes
from fusion.train.fold_training import FoldTraining, pool_of
from fusion.train.measure import Measured, measure, subset_gaps
from fusion.train.members import Trained, start_of, train_alone
from fusion.train.prepare import Prepared, prepare
from fusion.train.resume import model_signature
from fusion.train.run_folder import FUSION, RunFolder, keep_bundle, refuse_foreign
from fusion.train.run_report import report_run


@dataclass(frozen=True)
class TrainReport:
    """What came out of a training.

    Attributes:
        bundle: Its folder.
        metrics: On posts that were not learned from, at the bundle's thresholds; empty without any.
        best_epoch: The epoch that was kept, from 1; of several models the first one's.
        epochs: Epochs that were done.
        parameters: Of all members together.
        data_wait: Share of the training steps' time that was spent waiting for data.
        page: The report's page, or None where none was asked for.
    """

    bundle: Path
    version: str
    metrics: Mapping[str, float]
    best_epoch: int
    epochs: int
    parameters: int
    seconds: float
    data_wait: float = 0.0
    page: Path | None = None


def train(
    settings: TrainSettings, reader: FeatureReader, *, resume: Path | None = None
) -> TrainReport:
    """Train a fusion model, or an ensemble, and write its bundle and the report.

    What an earlier run has left in the folder, and the bundle that is replaced, are kept.

    Args:
        settings: All of them.
        reader: Where features come from; pickles, where there are several processes.
        resume: What `fusion.train.resume.find_start` takes; of k-fold training the folder of its
        run.

    Raises:
        ConfigError: Settings, data files, labels or a checkpoint are wrong, or the loss is NaN.
        FeatureError: Features are missing, broken, or made by different extractors.
        BundleError: The bundle cannot be written.
        WorkerDied: A process of the training was killed.
    """
    return processes.run(settings.trainer, partial(_train, settings, reader, resume))


def _train(
    settings: TrainSettings, reader: FeatureReader, resume: Path | None, fabric: Fabric
) -> TrainReport:
    folder = RunFolder(fabric, settings.trainer.save_dir, FUSION)
    with folder.locked():
        return _train_in(folder, settings, reader, resume, fabric)


def _train_in(
    folder: RunFolder,
    settings: TrainSettings,
    reader: FeatureReader,
    resume: Path | None,
    fabric: Fabric,
) -> TrainReport:
    started = time.monotonic()
    folds = settings.ensemble.folds
    processes.agree(fabric, partial(refuse_foreign, settings.bundle.folder))
    # Folds go on with the run in this folder, or refuse.
    with folder.beginning(resume, moves=not (folds and resume)) as place:
        prepared = prepare(settings, reader, fabric)
        mark = model_signature(settings.model, prepared.manifest, prepared.schema, prepared.labels)
        pool = processes.agree(fabric, partial(pool_of, settings, prepared)) if folds else None
        start = None if folds else start_of(fabric, settings, prepared, place, mark)
    if pool is not None:
        trained = FoldTraining(fabric, settings, prepared, mark, pool).train(place)
    else:
        trained = train_alone(fabric, settings, prepared, mark, start)
    measured = measure(settings, prepared, trained.held)
    finish = partial(_finish, fabric, settings, prepared, trained, measured, started=started)
    version, page = processes.agree(fabric, finish)
    trained.log.close()
    return TrainReport(
        bundle=settings.bundle.folder,
        version=version,
        metrics=measured.metrics,
        best_epoch=trained.best_epoch,
        epochs=trained.epochs,
        parameters=sum(p.numel() for m in members_of(trained.model) for p in m.parameters()),
        seconds=time.monotonic() - started,
        data_wait=trained.data_wait,
        page=page,
    )


def _finish(
    fabric: Fabric,
    settings: TrainSettings,
    prepared: Prepared,
    trained: Trained,
    measured: Measured,
    *,
    started: float,
) -> tuple[str, Path | None]:
    """Write bundle and report; the bundle's version and the report's page.

    One process does; the others have nothing to say.
    """
    if not fabric.is_global_zero:
        return "", None
    wanted = settings.report.enabled
    subsets = (
        subset_gaps(fabric, settings, prepared, trained.held, measured.calibration)
        if wanted
        else []
    )
    kept = keep_bundle(settings.bundle.folder)
    version = save_bundle(
        settings.bundle.folder,
        name=settings.bundle.name,
        model=trained.model,
        settings=settings.model,
        manifest=prepared.manifest,
        labels=prepared.labels,
        thresholds=measured.thresholds,
        metrics=measured.metrics,
        calibration=measured.calibration,
        subsets={subset.name: subset.gap for subset in subsets},
    )
    if kept is not None:
        notice(f"{settings.bundle.folder}: the bundle that was there is kept in {kept}")
    trained.log.write(
        "bundle",
        folder=str(settings.bundle.folder),
        version=version,
        data_wait=round(trained.data_wait, 4),
        **measured.metrics,
    )
    if len(measured.scores):
        aps = average_precisions(measured.scores, measured.targets)
        known = aps[~np.isnan(aps)]
        trained.log.curves(measured.targets, measured.scores, known, at=trained.best_epoch)
    if not wanted:
        return version, None
    seconds = time.monotonic() - started
    page = report_run(
        settings, prepared, trained, measured, subsets, version=version, seconds=seconds
    )
    return version, page
