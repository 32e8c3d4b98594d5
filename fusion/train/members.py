"""The models that one training gives: the best, or several snapshots."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import nn

from config.train import TrainSettings
from fusion.bundle.ensemble import Ensemble
from fusion.data.loading import DataWait
from fusion.data.posts import PostList
from fusion.models import FusionModel, build_model
from fusion.train import distributed as processes
from fusion.train.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from fusion.train.measure import Held, Served, score_held
from fusion.train.one_model import train_model
from fusion.train.optimizer import cycle_ends
from fusion.train.prepare import Prepared
from fusion.train.resume import Start, check_fit, find_start
from fusion.train.run_log import RunLog


@dataclass(frozen=True)
class Trained:
    """What a training has made.

    Attributes:
        model: As it will be served.
        held: Posts that were not learned from, with the scores of a model that has not seen them;
            empty without validation.
        best_epoch: The epoch that was kept, from 1; of several models the first one's.
        epochs: Epochs that were done, of each model.
        logs: Of each training.
        data_wait: Share of the training steps' time that was spent waiting for data.
    """

    model: Served
    held: tuple[Held, ...]
    best_epoch: int
    epochs: int
    logs: tuple[Path, ...]
    data_wait: float
    log: RunLog


@dataclass(frozen=True)
class One:
    """What one training has made."""

    models: tuple[FusionModel, ...]
    progress: Progress
    log: RunLog
    wait: DataWait

    def served(self, settings: TrainSettings) -> Served:
        """The models as they answer together."""
        return joined(self.models, settings)


def train_alone(
    fabric: Fabric, settings: TrainSettings, prepared: Prepared, mark: str, start: Start | None
) -> Trained:
    """Train once, on all posts to learn from.

    Args:
        fabric: Launched.
        settings: All of them.
        prepared: Labels, posts and features.
        mark: The signature of checkpoints.
        start: Where to begin.

    Raises:
        ConfigError: A checkpoint does not fit, the loss is no number, or a file cannot be written.
        FeatureError: Features cannot be read.
    """
    seed = int(fabric.broadcast(seed_of(settings, start)))
    posts = (prepared.posts, prepared.valid)
    one = train_one(fabric, settings, prepared, posts, mark=mark, seed=seed, start=start)
    model = one.served(settings)
    held: tuple[Held, ...] = ()
    if prepared.valid is not None:
        held = (score_held(fabric, settings, prepared, model, prepared.valid),)
    return Trained(
        model=model,
        held=held,
        best_epoch=one.progress.best_epoch,
        epochs=one.progress.epoch,
        logs=(one.log.path,),
        data_wait=one.wait.share,
        log=one.log,
    )


def joined(models: Sequence[FusionModel], settings: TrainSettings) -> Served:
    """One model, or several as an ensemble; in evaluation mode."""
    if len(models) == 1:
        return models[0].eval()
    return Ensemble(models, settings.ensemble.averaging).eval()


def train_one(
    fabric: Fabric,
    settings: TrainSettings,
    prepared: Prepared,
    posts: tuple[PostList, PostList | None],
    *,
    mark: str,
    seed: int,
    start: Start | None,
) -> One:
    """One training, and the models that are taken from it."""
    count = settings.ensemble.snapshots
    if count > 1:
        cycles = settings.optimizer.model_copy(update={"cycles": count})
        settings = settings.model_copy(update={"optimizer": cycles})
    snapshots = _Snapshots(fabric, settings, mark, seed, start)
    model, trainer, progress = train_model(
        fabric,
        settings,
        prepared,
        prepared.data(settings, *posts),
        mark=mark,
        seed=seed,
        start=start,
        on_epoch_end=snapshots if count > 1 else None,
    )
    models = snapshots.models(prepared, fabric.device) if count > 1 else (model,)
    return One(models, progress, trainer.log, trainer.wait)


class _Snapshots:
    """Weights at the ends of the learning rate's cycles: ``ckpt/snapshot-1.pt`` and so on."""

    def __init__(
        self, fabric: Fabric, settings: TrainSettings, mark: str, seed: int, start: Start | None
    ) -> None:
        self._fabric, self._settings, self._mark, self._seed = fabric, settings, mark, seed
        # A run that goes on in another folder finds the first ones where it came from.
        self._before = start.path.parent if start is not None and start.exact else None
        self._ends = cycle_ends(settings.trainer.epochs, settings.ensemble.snapshots)

    def __call__(self, epoch: int, model: nn.Module) -> None:
        """Save the weights where a cycle ends."""
        if epoch in self._ends and self._fabric.is_global_zero:
            state = {name: value.cpu() for name, value in model.state_dict().items()}
            checkpoint = Checkpoint(self._mark, Progress(self._seed, epoch=epoch), state)
            save_checkpoint(self._path(epoch), checkpoint)

    def models(self, prepared: Prepared, device: torch.device) -> tuple[FusionModel, ...]:
        """All of them, the earliest first.

        Raises:
            ConfigError: One is missing.
        """
        self._fabric.barrier()
        return tuple(
            model_of(self._found(epoch), self._settings, prepared, self._mark, device)
            for epoch in self._ends
        )

    def _path(self, epoch: int) -> Path:
        number = self._ends.index(epoch) + 1
        return self._settings.trainer.save_dir / "ckpt" / f"snapshot-{number}.pt"

    def _found(self, epoch: int) -> Path:
        path = self._path(epoch)
        if not path.exists() and self._before is not None:
            return self._before / path.name
        return path


def model_of(
    path: Path, settings: TrainSettings, prepared: Prepared, mark: str, device: torch.device
) -> FusionModel:
    """A model with the weights of a checkpoint."""
    model = build_model(prepared.schema, settings.model)
    model.load_state_dict(load_checkpoint(path, mark).model)
    return model.to(device)


def start_of(
    fabric: Fabric, settings: TrainSettings, prepared: Prepared, resume: Path | None, mark: str
) -> Start | None:
    """What `fusion.train.resume.find_start` finds, in every process; None begins anew.

    Raises:
        ConfigError: As `fusion.train.resume.find_start`.
        BundleError: As `fusion.train.resume.find_start`.
    """
    if resume is None:
        return None

    def find() -> Start:
        start = find_start(resume, mark, allow_pickle=settings.trainer.allow_pickle)
        with torch.device("meta"):  # names and shapes alone
            check_fit(build_model(prepared.schema, settings.model), start)
        return start

    return processes.agree(fabric, find)


def seed_of(settings: TrainSettings, start: Start | None) -> int:
    """The seed of a run: the interrupted one's, the one that is fixed, or a new one."""
    if start is not None and start.exact:
        return start.checkpoint.progress.seed
    return settings.trainer.seed if settings.trainer.fix_random_seed else secrets.randbits(31)
