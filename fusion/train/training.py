"""A whole training, from data files to bundle and report: what `train_net.py` runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning_fabric import Fabric

from common.errors import ConfigError
from common.html import command
from common.post_set import PostSet
from common.progress import notice
from config.train import TrainSettings
from fusion.bundle.bundle import Bundle, members_of, save_bundle
from fusion.bundle.folder import keep_bundle, refuse_foreign, replacing
from fusion.data.dataset import FeatureFiles
from fusion.data.posts import PostList
from fusion.infer.inference import shown
from fusion.metrics.ranking import average_precisions
from fusion.models import chosen
from fusion.models.base import ORDERED
from fusion.report.predictions import Predictions
from fusion.report.subsets import SubsetGap
from fusion.report.view import PostView, view_post
from fusion.report.write import HeldOutFigures, ReportInput, write_report
from fusion.train import distributed
from fusion.train.checkpoint import model_signature, seed_of
from fusion.train.distributed import all_ranks
from fusion.train.fold_training import FOLDS, FoldTraining, pool_of
from fusion.train.members import (
    Job,
    Measured,
    Trained,
    measure,
    measure_test,
    start_of,
    subset_gaps,
    train_model,
)
from fusion.train.prepare import HeldOut, Prepared, prepare, rows_learned_from
from fusion.train.run_folder import link_latest, located, run_folder
from fusion.train.run_log import read_run
from fusion.train.trainer import OnValidation

_LOOKED_AT = 32  # posts that tell whether streams have several tokens


@dataclass(frozen=True)
class TrainReport:
    """The outcome of a training.

    Attributes:
        version: Of the bundle; empty in the processes that did not write it.
        metrics: On posts that were not trained on, at the bundle's thresholds; empty without any.
        seen_posts: Posts that the metrics are of, where parts were trained on all; else 0.
        best_epoch: The epoch that was kept, from 1; of several models the first one's.
        data_wait: Share of the training steps' time that was spent waiting for data.
        page: The report's page, or None if it is switched off.
        test: Figures of ``data.test``.
    """

    bundle: Path
    version: str
    run: Path
    metrics: Mapping[str, float]
    seen_posts: int
    best_epoch: int
    epochs: int
    parameters: int
    seconds: float
    data_wait: float = 0.0
    page: Path | None = None
    test: HeldOutFigures | None = None

    @property
    def text(self) -> str:
        """Return the outcome in lines for a person."""
        lines = [
            f"epochs {self.epochs}  best epoch {self.best_epoch}  "
            f"{shown(self.metrics, seen=self.seen_posts > 0)}",
            f"bundle {self.bundle}  version {self.version}  {self.seconds:.1f} s  "
            f"waiting for data {self.data_wait:.1%}",
        ]
        if self.test is not None:
            figures = shown(self.test.metrics, seen=self.test.seen_posts > 0)
            lines.append(f"test {self.test.posts} posts  {figures}")
        if self.page is not None:
            lines.append(f"report {self.page}")
        return "\n".join(lines) + "\n"


def train(
    settings: TrainSettings,
    reader: FeatureFiles,
    *,
    resume: Path | None = None,
    on_validation: OnValidation | None = None,
    again: Sequence[str] = ReportInput.again,
) -> TrainReport:
    """Train a fusion model, or an ensemble, and write its bundle and the report.

    ``resume`` is a ``save_dir``, or what `fusion.train.checkpoint.find_start` takes; of k-fold
    training the run's folder. ``reader`` and ``on_validation`` pickle, for trainings of several
    processes. ``again`` are the words of the command, for the advice of the report.
    """
    work = partial(_train, settings, reader, resume, on_validation, again=again)
    return distributed.run(settings.trainer, work)


def _train(
    settings: TrainSettings,
    reader: FeatureFiles,
    resume: Path | None,
    on_validation: OnValidation | None,
    fabric: Fabric,
    *,
    again: Sequence[str],
) -> TrainReport:
    started = time.monotonic()
    folds, save_dir = settings.ensemble.folds, settings.trainer.save_dir
    all_ranks(fabric, partial(refuse_foreign, settings.bundle.folder, "bundle.out"))
    resume = located(resume)
    folder = run_folder(fabric, save_dir, resume)
    if folds and resume is not None:
        _check_folds(resume, folder)
    settings = settings.model_copy(
        update={"trainer": settings.trainer.model_copy(update={"save_dir": folder})}
    )
    # Everything that can be wrong with the input is found before `latest` leads to this run.
    prepared = prepare(settings, reader, fabric)
    settings = _with_model(settings, prepared, fabric)
    signature = model_signature(settings.model, prepared.manifest, prepared.schema, prepared.labels)
    job = Job(fabric, settings, prepared, signature, on_validation, again)
    learned_rows = partial(rows_learned_from, settings, fabric, prepared)
    if folds:
        pool = all_ranks(fabric, partial(pool_of, settings, prepared))
        learned = PostSet(pool.hashes)
        held_out = left_out = HeldOut.of(pool, learned_rows(pool, PostSet()))
        if not settings.ensemble.pool_valid:
            held_out = HeldOut.of(prepared.valid, learned_rows(prepared.valid, learned))
        link_latest(fabric, folder)
        folding = FoldTraining(job, pool, left_out, held_out)
        trained = folding.train(resumed=resume is not None)
    else:
        start = start_of(job, resume)
        learned = PostSet(prepared.posts.hashes) | (start.learned_from if start else PostSet())
        held_out = HeldOut.of(prepared.valid, learned_rows(prepared.valid, learned))
        link_latest(fabric, folder)
        seed = seed_of(fabric, settings.trainer, start)
        trained = train_model(job, prepared.posts, held_out, seed=seed, start=start)
    measured = measure(job, trained.held_out, seen=held_out.seen)
    unseen = HeldOut.of(prepared.test, learned_rows(prepared.test, learned))
    if unseen.note:
        note = unseen.note.replace("validation", "test")
        notice(f"warning: {note}", enabled=fabric.is_global_zero)
    test = measure_test(job, trained.model, measured, unseen)
    write = partial(_write, job, trained, measured, learned, started, test=test)
    version, page = all_ranks(fabric, write)
    trained.log.close()
    return TrainReport(
        bundle=settings.bundle.folder,
        version=version,
        run=folder,
        metrics=measured.metrics,
        seen_posts=measured.seen_posts,
        best_epoch=trained.best_epoch,
        epochs=trained.epochs,
        parameters=sum(p.numel() for m in members_of(trained.model) for p in m.parameters()),
        seconds=time.monotonic() - started,
        data_wait=trained.data_wait,
        page=page,
        test=test,
    )


def _with_model(settings: TrainSettings, prepared: Prepared, fabric: Fabric) -> TrainSettings:
    """Return the settings with the fusion model that `auto` stands for."""
    if settings.model.name != "auto":
        return settings

    def ordered() -> bool:
        some = [prepared.posts[row] for row in range(min(_LOOKED_AT, len(prepared.posts)))]
        read = partial(prepared.reader.features, fingerprints=prepared.manifest.fingerprints)
        arrays = (read(record.post_id, record.features).arrays for record in some)
        return any(len(features[s]) > 1 for features in arrays for s in ORDERED & features.keys())

    posts = len(prepared.posts)
    model = chosen(settings.model, posts, ordered=all_ranks(fabric, ordered))
    notice(f"model.name: auto takes {model.name} ({posts} posts)", enabled=fabric.is_global_zero)
    return settings.model_copy(update={"model": model})


def _check_folds(resume: Path, folder: Path) -> None:
    """Check that ``--resume`` names a k-fold run in ``save_dir``."""
    if not (resume / FOLDS).exists() or resume.resolve() != folder.resolve():
        raise ConfigError(
            f"{resume}: with ensemble.folds, --resume takes the folder of a k-fold run in "
            "trainer.save_dir; other weights may have seen the posts that are left out"
        )


def _write(
    job: Job,
    trained: Trained,
    measured: Measured,
    learned_from: PostSet,
    started: float,
    *,
    test: HeldOutFigures | None,
) -> tuple[str, Path | None]:
    """Write bundle and report; return the bundle's version and the report's page."""
    settings, prepared = job.settings, job.prepared
    if not job.fabric.is_global_zero:
        return "", None
    subsets = []
    # Training posts say which modality's weights know them, not which one tells more of new posts.
    if settings.report.enabled and not measured.seen_posts:
        subsets = subset_gaps(job, trained.held_out, measured.calibration)
    bundle = Bundle(
        name=settings.bundle.name,
        labels=prepared.labels,
        manifest=prepared.manifest,
        settings=settings.model,
        model=trained.model,
        thresholds=measured.thresholds,
        metrics=measured.metrics,
        calibration=measured.calibration,
        subsets={subset.name: subset.gap for subset in subsets},
        seen_posts=measured.seen_posts,
        learned_from=learned_from,
    )
    with replacing(settings.bundle.folder):
        copy = keep_bundle(settings.bundle.folder)
        version = save_bundle(settings.bundle.folder, bundle)
    if copy is not None:
        notice(f"{settings.bundle.folder}: the bundle that was there is kept in {copy}")
    trained.log.write(
        "bundle",
        folder=str(settings.bundle.folder),
        version=version,
        data_wait=round(trained.data_wait, 4),
        **measured.metrics,
        **({"seen_posts": measured.seen_posts} if measured.seen_posts else {}),
    )
    if len(measured.scores):
        aps = average_precisions(measured.scores, measured.targets)  # NaN without positives
        defined = aps[~np.isnan(aps)]
        trained.log.curves(measured.targets, measured.scores, defined, at=trained.best_epoch)
    if not settings.report.enabled:
        return version, None
    seconds = time.monotonic() - started
    facts = _facts(job, trained, version=version, seconds=seconds)
    content = replace(_report(job, trained, measured, subsets), facts=facts, test=test)
    return version, write_report(settings.trainer.save_dir / "report", content, settings.report)


def _report(
    job: Job, trained: Trained, measured: Measured, subsets: Sequence[SubsetGap]
) -> ReportInput:
    """Return the content of the report, but for what is known of the run as a whole."""
    settings, prepared = job.settings, job.prepared
    places = [(part.posts, row) for part in trained.held_out for row in range(len(part.posts))]
    folder = settings.trainer.save_dir / "report"
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
    return ReportInput(
        title=settings.bundle.name,
        use=command(
            "insighttag", "tag", "POSTS", "--out", "tags.jsonl", "--bundle", settings.bundle.folder
        ),
        run=settings.trainer.save_dir,
        subtitle=_subtitle(settings, len(places), seen=bool(measured.seen_posts)),
        seen_posts=measured.seen_posts,
        facts={},
        predictions=predictions,
        frequencies=prepared.posts.positives() / len(prepared.posts),
        runs=[read_run(path) for path in trained.logs],
        subsets=subsets,
        calibration="none" if measured.calibration is None else measured.calibration.kind,
        view=partial(_views, settings=settings, folder=folder, places=places),
        again=job.again,
    )


def _subtitle(settings: TrainSettings, held_out: int, *, seen: bool) -> str:
    if not held_out:
        if settings.data.test is not None:
            return "There are no validation posts: the figures are on the test posts."
        return "There are no validation posts: nothing was measured."
    if seen:
        return (
            f"Measured on {held_out:,} training posts: parts of the model were trained on every "
            "one of them, so no figure here says anything about new posts. Extract features out of "
            "fold (scripts/out_of_fold_features.py), or validate on other posts."
        )
    folds = settings.ensemble.folds
    if folds and settings.ensemble.pool_valid:
        return f"Measured on {held_out:,} posts, each with the model that was not trained on it."
    return f"Measured on {held_out:,} validation posts."


def _facts(job: Job, trained: Trained, *, version: str, seconds: float) -> dict[str, Any]:
    settings, prepared, members = job.settings, job.prepared, members_of(trained.model)
    return {
        "bundle": str(settings.bundle.folder),
        "version": version,
        "model": settings.model.name,
        "members": len(members),
        "parameters": sum(p.numel() for m in members for p in m.parameters()),
        "tags": len(prepared.labels),
        "streams": ", ".join(prepared.manifest.dims),
        "posts to train on": len(prepared.posts),
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
    views = {}
    for row in set(rows):
        posts, place = places[row]
        views[row] = view_post(
            posts[place].post_id,
            posts.entry(place),
            data_file=posts.file(place),
            report=folder,
            post_url=settings.report.post_url,
            thumbnails=settings.report.thumbnails,
        )
    return views
