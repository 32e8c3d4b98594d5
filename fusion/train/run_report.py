"""The report of a run: gathers what `fusion.report` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from config.train import TrainSettings
from fusion.bundle.bundle import members_of
from fusion.data.posts import PostList, PostPool
from fusion.report.predictions import Predictions
from fusion.report.subsets import SubsetGap
from fusion.report.worst import PostView, view_post
from fusion.report.write import ReportInput, write_report
from fusion.train.measure import Measured
from fusion.train.members import Trained
from fusion.train.prepare import Prepared
from fusion.train.run_log import read_run

FOLDER = "report"


def report_run(
    settings: TrainSettings,
    prepared: Prepared,
    trained: Trained,
    measured: Measured,
    subsets: Sequence[SubsetGap],
    *,
    version: str,
    seconds: float,
) -> Path:
    """Write the report folder next to the run's checkpoints; return the page.

    Raises:
        ConfigError: It cannot be written.
    """
    places = [(part.posts, row) for part in trained.held_out for row in range(len(part.posts))]
    folder = settings.trainer.save_dir / FOLDER
    predictions = None
    if places:
        predictions = Predictions(
            post_ids=tuple(posts[row].post_id for posts, row in places),
            names=prepared.labels.names,
            raw=measured.raw,
            scores=measured.scores,
            targets=measured.targets.astype(bool),
            thresholds=measured.thresholds,
        )
    given = ReportInput(
        title=settings.bundle.name,
        subtitle=_subtitle(settings, len(places)),
        facts=_facts(settings, prepared, trained, version=version, seconds=seconds),
        predictions=predictions,
        runs=[read_run(path) for path in trained.logs],
        subsets=subsets,
        calibration="none" if measured.calibration is None else measured.calibration.kind,
        view=partial(_views, settings=settings, folder=folder, places=places),
    )
    return write_report(folder, given, settings.report, progress=settings.trainer.progress)


def _subtitle(settings: TrainSettings, held: int) -> str:
    if not held:
        return "There are no validation posts: nothing was measured."
    folds = settings.ensemble.folds
    if folds and settings.ensemble.pool_valid:
        return f"Measured on {held:,} posts, each with the model that has not learned from it."
    return f"Measured on {held:,} validation posts."


def _facts(
    settings: TrainSettings, prepared: Prepared, trained: Trained, *, version: str, seconds: float
) -> dict[str, Any]:
    members = members_of(trained.model)
    return {
        "bundle": str(settings.bundle.folder),
        "version": version,
        "model": settings.model.name,
        "members": len(members),
        "parameters": sum(p.numel() for m in members for p in m.parameters()),
        "tags": len(prepared.labels),
        "streams": ", ".join(prepared.manifest.dims),
        "posts to learn from": len(prepared.posts),
        "validation posts": 0 if prepared.valid is None else len(prepared.valid),
        "epochs": trained.epochs,
        "best epoch": trained.best_epoch,
        "seconds": round(seconds, 1),
        "share of steps spent waiting for data": round(trained.data_wait, 4),
        "loss": settings.loss.name,
        "optimizer": settings.optimizer.name,
        "learning rate": settings.optimizer.learning_rate,
        "batch size": settings.trainer.batch_size,
        "calibration": settings.bundle.calibration,
    }


def _views(
    rows: Sequence[int],
    *,
    settings: TrainSettings,
    folder: Path,
    places: Sequence[tuple[PostList, int]],
) -> Mapping[int, PostView]:
    """Return views of some posts, from the data files, by row."""
    found = {}
    for row in set(rows):
        posts, place = places[row]
        while isinstance(posts, PostPool):
            posts, place = posts.place(place)
        found[row] = view_post(
            posts[place].post_id,
            posts.entry(place),
            data_file=posts.path,
            report=folder,
            post_url=settings.report.post_url,
            thumbnails=settings.report.thumbnails,
        )
    return found
