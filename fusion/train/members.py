"""One training, and the models that are taken from it: the best one, or several snapshots."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from common.progress import notice
from config.train import TrainSettings
from fusion.bundle.bundle import Ensemble
from fusion.data.posts import PostList
from fusion.models import FusionModel, build_model
from fusion.train.checkpoint import (
    Checkpoint,
    Progress,
    Start,
    check_fit,
    find_start,
    load_checkpoint,
    save_checkpoint,
)
from fusion.train.distributed import all_ranks
from fusion.train.losses import Objective, TaggingLoss
from fusion.train.measure import HeldOutScores, Served, score_held_out
from fusion.train.optimizer import cycle_ends
from fusion.train.prepare import Prepared
from fusion.train.run_log import RunLog
from fusion.train.trainer import Trainer


@dataclass(frozen=True)
class Job:
    """Everything that is fixed before a model is made.

    Attributes:
        fabric: Launched.
        settings: All settings; ``trainer.save_dir`` is the folder of the run.
        prepared: Labels, posts and features.
        signature: Of the checkpoints; see `fusion.train.checkpoint.model_signature`.
    """

    fabric: Fabric
    settings: TrainSettings
    prepared: Prepared
    signature: str


@dataclass(frozen=True)
class Trained:
    """The outcome of one training, or of all trainings of the folds.

    Attributes:
        model: As it will be served.
        held_out: Posts that were not learned from, with the scores of a model that has not seen
            them; empty without validation.
        best_epoch: The epoch that was kept, from 1; of several models the first one's.
        epochs: Epochs that were done, of each model.
        logs: Of each training.
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
    job: Job, posts: PostList, valid: PostList | None, *, seed: int, start: Start | None
) -> Trained:
    """Train a model, or its snapshots, and score the validation posts with the best weights.

    Args:
        job: The training's.
        posts: To learn from.
        valid: Chooses the best epoch.
        seed: Of weights, order and noise.
        start: Where to begin.

    Raises:
        ConfigError: A checkpoint does not fit, the loss is not finite, or a file cannot be
            written.
        FeatureError: Features cannot be read.
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
    trainer = Trainer(
        fabric,
        settings.trainer,
        optimizer,
        signature=job.signature,
        seed=seed,
        on_epoch_end=snapshots,
    )
    for note in prepared.notes:
        notice(f"warning: {note}", enabled=fabric.is_global_zero)
        trainer.log.write("warning", text=note)
    objective = Objective(
        model,
        TaggingLoss(settings.loss, positives),
        auxiliary=settings.model.auxiliary,
        mixup=settings.loss.mixup,
    )
    progress = trainer.fit(objective, prepared.data(settings, posts, valid), start)
    served = joined((model,) if snapshots is None else snapshots.models(), settings)
    held_out: tuple[HeldOutScores, ...] = ()
    if valid is not None:
        held_out = (score_held_out(fabric, settings, prepared, served, valid),)
    return Trained(
        model=served,
        held_out=held_out,
        best_epoch=progress.best_epoch,
        epochs=progress.epoch,
        logs=(trainer.log.path,),
        data_wait=trainer.wait.share,
        log=trainer.log,
    )


def joined(models: Sequence[FusionModel], settings: TrainSettings) -> Served:
    """Return one model, or several as an ensemble; in evaluation mode."""
    if len(models) == 1:
        return models[0].eval()
    return Ensemble(models, settings.ensemble.averaging).eval()


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
    """Return a model with the weights of a checkpoint."""
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


def seed_of(settings: TrainSettings, start: Start | None) -> int:
    """Return the seed of a run: the interrupted run's, the fixed one, or a new one."""
    if start is not None and start.exact:
        return start.checkpoint.progress.seed
    return settings.trainer.seed if settings.trainer.fix_random_seed else secrets.randbits(31)
