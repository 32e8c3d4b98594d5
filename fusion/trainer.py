"""The training loop on Lightning Fabric. It knows batches and logits, and nothing of the model."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, Dataset

from config.errors import ConfigError
from config.train import OptimizerSettings, TrainerSettings
from fusion import metrics
from fusion.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from fusion.collate import Batch, Collate, Sample
from fusion.objective import Objective
from fusion.optimizer import MovingAverage, build_optimizer, saved_with
from fusion.progress import Bar, progress_bar
from fusion.sampling import EpochBatches, epoch_seed

Scored = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class TrainData:
    """What a run learns from.

    Attributes:
        valid: None trains without validation.
        loaders: Processes that read; 0 reads in this one.
    """

    train: Dataset[Sample]
    valid: Dataset[Sample] | None
    collate: Collate
    train_count: int
    loaders: int = 0


class Trainer:
    """Trains one model; `fit` leaves it with the best weights.

    Files under ``save_dir``: ``ckpt/last.pt`` after every epoch, ``ckpt/best.pt`` by GAP, and
    ``log/train.jsonl``.
    """

    def __init__(
        self,
        fabric: Fabric,
        settings: TrainerSettings,
        optimizer: OptimizerSettings,
        *,
        signature: str,
        seed: int,
    ) -> None:
        self._fabric, self._settings, self._optimizing = fabric, settings, optimizer
        self._signature, self._seed = signature, seed
        self.log = RunLog(settings.save_dir / "log" / "train.jsonl", enabled=fabric.is_global_zero)
        self.last = settings.save_dir / "ckpt" / "last.pt"
        self.best = settings.save_dir / "ckpt" / "best.pt"

    def fit(self, objective: Objective, data: TrainData, resume: Path | None = None) -> Progress:
        """Train to the last epoch, or until no validation gets better.

        Args:
            objective: The model and what is minimised.
            data: Posts.
            resume: A checkpoint to go on from.

        Raises:
            ConfigError: The loss is no number, a checkpoint does not fit or cannot be written.
            FeatureError: Features cannot be read.
        """
        batches = EpochBatches(
            data.train_count,
            self._settings.batch_size,
            self._seed,
            rank=self._fabric.global_rank,
            world=self._fabric.world_size,
        )
        model = objective.model
        objective.to(self._fabric.device)
        an_epoch = -(-len(batches) // self._optimizing.accumulate)
        steps = an_epoch * self._settings.epochs
        run = _Run(model, *build_optimizer(model, self._optimizing, steps), Progress(self._seed))
        if self._optimizing.ema_decay:
            run.average = MovingAverage(model, self._optimizing.ema_decay)
        if resume is not None:
            self._restore(run, load_checkpoint(resume, self._signature), resume)
        run.wrapped, run.wrapped_optimizer = self._fabric.setup(objective, run.optimizer)
        loader = self._loader(data, data.train, batch_sampler=batches)
        start = run.progress.epoch
        with progress_bar("train", steps - start * an_epoch, enabled=self._bar_enabled()) as bar:
            for epoch in range(start + 1, self._settings.epochs + 1):
                if self._finished(run.progress):
                    break
                batches.epoch = epoch
                self._epoch(run, loader, epoch, bar)
                self._end_epoch(run, data, epoch, bar)
        self._take_best(run)
        return run.progress

    def scores(self, model: nn.Module, data: TrainData, posts: Dataset[Sample]) -> Scored:
        """Scores and targets of posts, both float32 ``(posts, classes)``, over the whole set."""
        loader = self._loader(data, posts, batch_size=self._settings.batch_size)
        training = model.training
        model.eval()
        found: list[npt.NDArray[np.float32]] = []
        truth: list[npt.NDArray[np.float32]] = []
        with torch.inference_mode():
            for batch in loader:
                # In full precision whatever the training's: as the bundle will be served.
                logits = model(batch.to(self._fabric.device))
                found.append(torch.sigmoid(logits.float()).cpu().numpy())
                truth.append(_targets(batch).numpy())
        model.train(training)
        return np.concatenate(found), np.concatenate(truth)

    # Parts -----------------------------------------------------------------------------------

    def _epoch(self, run: _Run, loader: Iterable[Batch], epoch: int, bar: Bar) -> None:
        # Seeded anew in every epoch: a resumed one draws what the interrupted one drew.
        _seed_all(epoch_seed(self._seed, epoch, self._fabric.global_rank))
        run.model.train()
        started, total, count = time.monotonic(), 0.0, 0
        for step, batches in enumerate(_together(loader, self._optimizing.accumulate), 1):
            loss = self._step(run, batches, f"epoch {epoch}, step {step}")
            posts = _posts(batches)
            total, count = total + loss * posts, count + posts
            bar.advance()
            if step % self._settings.log_interval == 0:
                rate = run.schedule.get_last_lr()[0]
                self.log.write("step", epoch=epoch, step=step, loss=loss, learning_rate=rate)
        run.loss = total / max(1, count)
        seconds = round(time.monotonic() - started, 3)
        self.log.write("epoch", epoch=epoch, loss=run.loss, posts=count, seconds=seconds)
        bar.note(f"epoch {epoch} loss {run.loss:.4f}{_shown(run.progress)}")

    def _step(self, run: _Run, batches: list[Batch], where: str) -> float:
        """Learn from batches as if they were one; their mean loss."""
        posts, total = _posts(batches), 0.0
        run.wrapped_optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(batches, 1):
            with self._fabric.no_backward_sync(run.wrapped, enabled=number < len(batches)):
                loss = run.wrapped(batch.to(self._fabric.device))
                loss = loss * (len(batch.post_ids) / posts)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise ConfigError(
                        f"{where}: the loss is {value}; lower optimizer.learning_rate, or look "
                        "for features that are not finite"
                    )
                self._fabric.backward(loss)
            total += value
        if self._optimizing.gradient_clip is not None:
            self._fabric.clip_gradients(
                run.wrapped, run.wrapped_optimizer, max_norm=self._optimizing.gradient_clip
            )
        run.wrapped_optimizer.step()
        run.schedule.step()
        if run.average is not None:
            run.average.update(run.model)
        return total

    def _end_epoch(self, run: _Run, data: TrainData, epoch: int, bar: Bar) -> None:
        progress = run.progress
        progress.epoch = epoch
        interval = self._settings.valid_interval
        last = epoch == self._settings.epochs
        if data.valid is not None and (last or (interval and epoch % interval == 0)):
            with run.averaged():
                scores, targets = self.scores(run.model, data, data.valid)
                _refuse_nan(scores, epoch)
                found = metrics.summary(scores, targets)
                self.log.write("valid", epoch=epoch, **found)
                self._judge(run, epoch, found["gap"])
            bar.note(f"epoch {epoch} loss {run.loss:.4f}{_shown(progress)}")
        elif data.valid is None:
            progress.best_epoch = epoch  # without validation the last is the best
            with run.averaged():
                self._save(run, self.best, whole=False)
        self._save(run, self.last, whole=True)

    def _judge(self, run: _Run, epoch: int, gap: float) -> None:
        progress = run.progress
        if gap < progress.best_gap:
            progress.stale += 1
            return
        # Of equal epochs the later one has seen the lower learning rate.
        progress.stale = 0 if gap > progress.best_gap else progress.stale + 1
        progress.best_gap, progress.best_epoch = gap, epoch
        self._save(run, self.best, whole=False)

    def _finished(self, progress: Progress) -> bool:
        return bool(self._settings.patience) and progress.stale >= self._settings.patience

    def _save(self, run: _Run, path: Path, *, whole: bool) -> None:
        if self._fabric.is_global_zero:
            checkpoint = Checkpoint(self._signature, run.progress, run.model.state_dict())
            if whole:
                checkpoint.optimizer = run.optimizer.state_dict()
                checkpoint.schedule = run.schedule.state_dict()
                checkpoint.average = None if run.average is None else run.average.state_dict()
            save_checkpoint(path, checkpoint)
        self._fabric.barrier()

    def _restore(self, run: _Run, checkpoint: Checkpoint, path: Path) -> None:
        run.model.load_state_dict(checkpoint.model)
        if not checkpoint.optimizer:  # best.pt: the weights are taken, the run starts anew
            return
        before, now = saved_with(checkpoint.optimizer), self._optimizing.name
        if before != now:
            raise ConfigError(f"{path}: was made with optimizer {before}, this run has {now}")
        try:
            run.optimizer.load_state_dict(checkpoint.optimizer)
            run.schedule.load_state_dict(checkpoint.schedule)
            if run.average is not None and checkpoint.average is not None:
                run.average.load_state_dict(checkpoint.average)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{path}: its optimizer does not fit this run: {error}") from error
        run.progress = checkpoint.progress
        beside = path.with_name(self.best.name)
        if beside.exists() and beside.resolve() != self.best.resolve():
            best = load_checkpoint(beside, self._signature)
            if self._fabric.is_global_zero:
                save_checkpoint(self.best, best)
        self.log.write("resumed", epoch=run.progress.epoch, checkpoint=str(path))

    def _take_best(self, run: _Run) -> None:
        if self.best.exists() and run.progress.best_epoch:
            run.model.load_state_dict(load_checkpoint(self.best, self._signature).model)

    def _loader(self, data: TrainData, posts: Dataset[Sample], **how: Any) -> DataLoader[Batch]:
        return DataLoader(
            posts,  # type: ignore[arg-type]
            collate_fn=data.collate,
            num_workers=data.loaders,
            # Spawned: forking a process that runs torch's threads can hang.
            multiprocessing_context="spawn" if data.loaders else None,
            persistent_workers=data.loaders > 0,
            pin_memory=self._fabric.device.type == "cuda",
            **how,
        )

    def _bar_enabled(self) -> bool:
        return self._settings.progress and self._fabric.is_global_zero


class _Run:
    """The moving parts of one `Trainer.fit`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
        progress: Progress,
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.progress = progress
        self.wrapped: Any = model  # Fabric's module and optimizer, which do its precision
        self.wrapped_optimizer: Any = optimizer
        self.average: MovingAverage | None = None
        self.loss = 0.0

    def averaged(self) -> AbstractContextManager[None]:
        """The moving average's weights for a while, where there is one."""
        return nullcontext() if self.average is None else self.average.applied(self.model)


class RunLog:
    """JSON lines of what happened, for people's scripts; flushed line by line."""

    def __init__(self, path: Path, *, enabled: bool) -> None:
        self._path, self._enabled = path, enabled

    def write(self, event: str, **values: Any) -> None:
        """Append one line.

        Raises:
            ConfigError: The file cannot be written.
        """
        if not self._enabled:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as error:
            raise ConfigError(f"{self._path}: the log cannot be written: {error}") from error


def _together(loader: Iterable[Batch], count: int) -> Iterator[list[Batch]]:
    """Batches in groups of ``count``; the last group may be smaller."""
    batches = iter(loader)
    while group := list(islice(batches, count)):
        yield group


def _posts(batches: list[Batch]) -> int:
    return sum(len(batch.post_ids) for batch in batches)


def _targets(batch: Batch) -> torch.Tensor:
    if batch.targets is None:
        raise ValueError("a training batch needs targets")
    return batch.targets


def _refuse_nan(scores: npt.NDArray[np.float32], epoch: int) -> None:
    if np.isnan(scores).any():
        raise ConfigError(
            f"epoch {epoch}: the model's scores are NaN; lower optimizer.learning_rate"
        )


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


def _shown(progress: Progress) -> str:
    return f" best gap {progress.best_gap:.4f}" if progress.best_gap >= 0 else ""
