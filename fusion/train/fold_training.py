"""k-fold training: k models, each scored on the posts that it was not trained on."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError, told
from common.files import write_whole
from common.post_set import PostSet
from common.progress import notice
from config.train import TrainSettings
from fusion.bundle.bundle import joined, members_of
from fusion.data.posts import PostList, stratified_folds
from fusion.models import FusionModel
from fusion.train.checkpoint import BEST, LAST, find_start, seed_of
from fusion.train.distributed import all_ranks
from fusion.train.members import (
    HeldOutScores,
    Job,
    Trained,
    model_of,
    score_held_out,
    train_model,
)
from fusion.train.prepare import HeldOut, Prepared
from fusion.train.run_log import RunLog

FOLDS, DONE, SCORES = "folds.json", "done.json", "scores.npy"


def pool_of(settings: TrainSettings, prepared: Prepared) -> PostList:
    """Return the posts that the folds share out."""
    lists = [prepared.posts]
    if settings.ensemble.pool_valid and prepared.valid is not None:
        lists.append(prepared.valid)
    pool, count = PostList.joined(lists), settings.ensemble.folds
    if len(pool) < 2 * count:
        raise ConfigError(f"ensemble.folds: {len(pool)} posts are too few for {count}")
    return pool


class FoldTraining:
    """k trainings in ``fold-1`` and so on; those that are done are not done again."""

    def __init__(self, job: Job, pool: PostList, left_out: HeldOut, valid: HeldOut) -> None:
        """Prepare the folds; `train` starts them.

        Args:
            job: The training.
            pool: The posts that the folds share out.
            left_out: Those of the pool that a fold may be measured on when it leaves them out.
            valid: The posts that the ensemble is measured on, unless ``ensemble.pool_valid``.
        """
        self._job, self._pool, self._left_out, self._valid = job, pool, left_out, valid
        self._fabric, self._settings = job.fabric, job.settings
        self._folder = job.settings.trainer.save_dir
        self._log = RunLog(self._folder / "log" / "train.jsonl", enabled=job.fabric.is_global_zero)
        self._shown = job.settings.trainer.progress and job.fabric.is_global_zero

    def train(self, *, resumed: bool) -> Trained:
        """Train every fold and score the posts that it was not trained on."""
        job, count = self._job, self._settings.ensemble.folds
        seed = all_ranks(self._fabric, partial(self._begin, resumed=resumed))
        ends, labels = self._pool.label_rows()
        parts = stratified_folds(ends, labels, len(job.prepared.labels), count, seed)
        for note in dict.fromkeys((self._left_out.note, self._valid.note)):
            if note:
                notice(f"warning: {note}", enabled=self._fabric.is_global_zero)
                self._log.write("warning", text=note)
        folds = [self._fold(i, parts == i, seed, resumed=resumed) for i in range(count)]
        models = [model for fold in folds for model in members_of(fold.model)]
        model = joined(models, self._settings.ensemble.averaging)
        held_out = tuple(scores for fold in folds for scores in fold.held_out)
        if self._valid.posts and not self._settings.ensemble.pool_valid:
            held_out = (score_held_out(job, model, self._valid.posts),)
        return Trained(
            model=model,
            held_out=held_out,
            best_epoch=folds[0].best_epoch,
            epochs=folds[0].epochs,
            logs=tuple(log for fold in folds for log in fold.logs),
            data_wait=float(np.mean([fold.data_wait for fold in folds])),
            log=self._log,
        )

    def _begin(self, *, resumed: bool) -> int:
        """Return the run's seed; write down which run this is, or check that it is the same."""
        identity = {"run": self._digest(), "folds": self._settings.ensemble.folds}
        path = self._folder / FOLDS
        if resumed:
            saved = _read_json(path)
            if {key: saved.get(key) for key in identity} != identity:
                raise ConfigError(
                    f"{path}: that run had other posts, folds or settings; start without --resume"
                )
            return int(saved["seed"])
        seed = seed_of(self._fabric, self._settings.trainer, None)
        if self._fabric.is_global_zero:
            _write(path, json.dumps({**identity, "seed": seed}).encode())
        self._fabric.barrier()
        return seed

    def _digest(self) -> str:
        """Return a digest of everything that makes the models what they are."""
        settings = self._settings.model_dump(mode="json")
        options = {key: settings[key] for key in ("model", "loss", "optimizer", "ensemble")}
        trainer = {key: settings["trainer"][key] for key in ("epochs", "batch_size", "patience")}
        parts = [self._job.signature, options, trainer, self._pool.digest()]
        if self._left_out.note and self._left_out.posts:
            parts.append(self._left_out.posts.digest())
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _fold(
        self, fold: int, left_out: npt.NDArray[np.bool_], seed: int, *, resumed: bool
    ) -> Trained:
        """Train a fold, or load what is there, with the scores of the posts left out."""
        folder, fabric = self._folder / f"fold-{fold + 1}", self._fabric
        trainer = self._settings.trainer.model_copy(update={"save_dir": folder})
        settings = self._settings.model_copy(update={"trainer": trainer})
        prepared = self._job.prepared if fold == 0 else replace(self._job.prepared, notes=())
        job = Job(fabric, settings, prepared, self._job.signature)
        rest = self._pool.take(np.flatnonzero(~left_out))
        measured = PostSet(() if self._left_out.posts is None else self._left_out.posts.hashes)
        out = self._pool.take(np.flatnonzero(left_out & measured.holds(self._pool.hashes)))
        held_out = HeldOut(out, self._left_out.seen) if len(out) else HeldOut(None)
        count = settings.ensemble.folds
        # Every process looks before one of them may write.
        done = resumed and (folder / DONE).exists()
        fabric.barrier()
        if done:
            notice(f"fold {fold + 1} of {count}: there already", enabled=self._shown)
            model = joined(_trained_models(job), settings.ensemble.averaging)
            raw = np.load(folder / SCORES, allow_pickle=False).astype(np.float64)
            scores = (HeldOutScores(model, out, raw),) if len(out) else ()
            log = RunLog(folder / "log" / "train.jsonl", enabled=False)
            facts = _read_json(folder / DONE)
            return Trained(model, scores, logs=(log.path,), log=log, **facts)
        notice(f"fold {fold + 1} of {count}", enabled=self._shown)
        start = None
        if resumed and (folder / "ckpt" / LAST).exists():
            start = all_ranks(fabric, partial(find_start, folder, job.signature))
        trained = train_model(job, rest, held_out, seed=seed + fold, start=start)
        facts = {key: getattr(trained, key) for key in ("best_epoch", "epochs", "data_wait")}
        self._log.write("fold", fold=fold + 1, learned=len(rest), left_out=len(out), **facts)
        if fabric.is_global_zero:
            buffer = io.BytesIO()
            raw = trained.held_out[0].raw if trained.held_out else np.empty(0)
            np.save(buffer, raw, allow_pickle=False)
            _write(folder / SCORES, buffer.getvalue())
            _write(folder / DONE, json.dumps(facts).encode())
        trained.log.close()
        return trained


def _trained_models(job: Job) -> tuple[FusionModel, ...]:
    count = job.settings.ensemble.snapshots
    names = [BEST] if count == 1 else [f"snapshot-{i}.pt" for i in range(1, count + 1)]
    return tuple(model_of(job, job.settings.trainer.save_dir / "ckpt" / name) for name in names)


def _write(path: Path, content: bytes) -> None:
    with told(f"{path}: cannot be written"):
        write_whole(path, content)


def _read_json(path: Path) -> dict[str, Any]:
    with told(f"{path}: cannot be read", OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold keys and values")
    return content
