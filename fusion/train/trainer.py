"""The training loop on Lightning Fabric. It knows batches and logits, and nothing of the model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import Dataset

from common.errors import ConfigError
from common.progress import Bar, progress_bar
from config.train import OptimizerSettings, TrainerSettings
from fusion.data.collate import Batch, Collate, Sample
from fusion.data.loading import DataWait, Loading
from fusion.data.sampling import EpochBatches, step_seed
from fusion.metrics import ranking as metrics
from fusion.metrics.scoring import Scored, score_posts
from fusion.train.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from fusion.train.distributed import same_everywhere
from fusion.train.objective import Objective
from fusion.train.resume import BEST, LAST, Start, fill
from fusion.train.run_log import RunLog
from fusion.train.run_state import RunState, seed_all

OnEpochEnd: TypeAlias = Callable[[int, nn.Module], None]
"""Takes the epoch, from 1, and the model with the weights that are validated: averaged ones where
there is a moving average. Called in every process, before the checkpoint of the epoch."""


@dataclass(frozen=True)
class TrainData:
    """What a run learns from.

    Attributes:
        valid: None trains without validation.
        loaders: Processes that read; 0 reads in a thread of this one.
    """

    train: Dataset[Sample]
    valid: Dataset[Sample] | None
    collate: Collate
    train_count: int
    loaders: int = 0


@dataclass(frozen=True)
class _Feed:
    """Where the batches of one `Trainer.fit` come from."""

    data: TrainData
    batches: EpochBatches
    loading: Loading


class Trainer:
    """Trains one model; `fit` leaves it with the best weights.

    Files under ``save_dir``: ``ckpt/last.pt`` after every epoch, ``ckpt/best.pt`` by GAP, and
    ``log/train.jsonl``.

    Attributes:
        log: What happens.
        last: The checkpoint to go on from.
        best: The checkpoint with the best weights.
        wait: How long the steps of this process waited for data.
    """

    def __init__(
        self,
        fabric: Fabric,
        settings: TrainerSettings,
        optimizer: OptimizerSettings,
        *,
        signature: str,
        seed: int,
        on_epoch_end: OnEpochEnd | None = None,
    ) -> None:
        self._fabric, self._settings, self._optimizing = fabric, settings, optimizer
        self._signature, self._seed = signature, seed
        self._on_epoch_end = on_epoch_end
        self.log = RunLog(
            settings.save_dir / "log" / "train.jsonl",
            enabled=fabric.is_global_zero,
            tensorboard=settings.tensorboard,
        )
        self.last = settings.save_dir / "ckpt" / LAST
        self.best = settings.save_dir / "ckpt" / BEST
        self.wait = DataWait()

    def fit(self, objective: Objective, data: TrainData, start: Start | None = None) -> Progress:
        """Train to the last epoch, or until no validation gets better.

        Args:
            objective: The model and what is minimised.
            data: Posts.
            start: Where to begin; None begins with the model's weights as they are.

        Raises:
            ConfigError: The loss is no number, a checkpoint does not fit or cannot be written.
            FeatureError: Features cannot be read.
        """
        batches = self._batches(data)
        an_epoch = -(-len(batches) // self._optimizing.accumulate)
        steps = an_epoch * self._settings.epochs
        model = objective.model
        objective.to(self._fabric.device)
        if start is not None:
            fill(model, start)
        # What a checkpoint inside an epoch must share with the run that goes on.
        shape = (data.train_count, self._settings.batch_size, self._optimizing.accumulate)
        progress = Progress(self._seed, shape=shape)
        run = RunState(self._fabric, model, self._optimizing, steps, progress)
        if start is not None and start.exact:
            self._restore(run, start)
        run.wrap(objective)
        done = run.progress.epoch * an_epoch + run.progress.step
        self.log.begin(an_epoch, done=done)
        loading = Loading(data.collate, data.loaders, self._fabric.device)
        feed = _Feed(data, batches, loading)
        with (
            closing(loading),
            progress_bar("train", steps - done, enabled=self._bar_enabled()) as bar,
        ):
            for epoch in range(run.progress.epoch + 1, self._settings.epochs + 1):
                if self._finished(run.progress):
                    break
                self._epoch(run, feed, epoch, bar)
                self._end_epoch(run, feed, epoch, bar)
        self._take_best(run)
        return run.progress

    def scores(
        self,
        model: nn.Module,
        data: TrainData,
        posts: Dataset[Sample],
        loading: Loading | None = None,
    ) -> Scored:
        """Scores and targets of posts, both float32 ``(posts, classes)``, over the whole set.

        Every process scores a part of them, and has the whole at the end.
        """
        reading = loading or Loading(data.collate, data.loaders, self._fabric.device)
        try:
            return score_posts(self._fabric, model, reading, posts, self._settings.batch_size)
        finally:
            if loading is None:
                reading.close()

    # Parts -----------------------------------------------------------------------------------

    def _batches(self, data: TrainData) -> EpochBatches:
        try:
            return EpochBatches(
                data.train_count,
                self._settings.batch_size,
                self._seed,
                rank=self._fabric.global_rank,
                world=self._fabric.world_size,
            )
        except ValueError as error:
            raise ConfigError(
                f"trainer.batch_size: {error} processes; take larger batches or fewer processes"
            ) from error

    def _epoch(self, run: RunState, feed: _Feed, epoch: int, bar: Bar) -> None:
        progress, together, batches = run.progress, self._optimizing.accumulate, feed.batches
        batches.epoch, batches.start = epoch, progress.step * together
        started, wait = time.monotonic(), DataWait()
        last = -(-len(batches) // together)
        run.model.train()
        with closing(feed.loading.batches(feed.data.train, batches)) as read:
            for group in wait.watch(_together(read, together)):
                step = progress.step + 1
                # What a step draws depends on nothing before it: a resumed one draws the same.
                seed_all(step_seed(self._seed, epoch, step, self._fabric.global_rank))
                first = progress.step * together
                posts = sum(batches.posts(first + n) for n in range(len(group)))
                loss = self._step(run, group, posts, f"epoch {epoch}, step {step}")
                progress.step, progress.posts = step, progress.posts + posts
                progress.loss += loss * posts
                bar.advance()
                self._after_step(run, epoch, loss, last)
        self.wait.add(wait)
        run.loss = progress.loss / max(1, progress.posts)
        seconds = round(time.monotonic() - started, 3)
        self.log.write(
            "epoch",
            epoch=epoch,
            loss=run.loss,
            posts=progress.posts,
            seconds=seconds,
            data_wait=round(wait.share, 4),
        )
        progress.epoch, progress.step, progress.posts, progress.loss = epoch, 0, 0, 0.0
        bar.note(f"epoch {epoch} loss {run.loss:.4f}{_shown(progress)}")

    def _step(self, run: RunState, batches: list[Batch], posts: int, where: str) -> float:
        """Learn from batches as if they were one; their mean loss over all processes.

        Args:
            run: Is changed.
            batches: This process's parts.
            posts: Of the batches in all processes.
            where: For errors.
        """
        fabric, world = self._fabric, self._fabric.world_size
        total = torch.zeros((), device=fabric.device)
        run.wrapped_optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(batches, 1):
            with fabric.no_backward_sync(run.wrapped, enabled=number < len(batches)):
                loss = run.wrapped(batch.to(fabric.device))
                # Each post counts alike, though processes have different numbers of them.
                loss = loss * (len(batch.post_ids) / posts)
                total += loss.detach()
                fabric.backward(loss * world)  # DDP takes the mean over processes
        # Known in all processes at once, so that none waits for one that has given up.
        value = float(cast("torch.Tensor", fabric.all_reduce(total, reduce_op="sum")))
        if not math.isfinite(value):
            reason = "lower optimizer.learning_rate, or look for features that are not finite"
            raise same_everywhere(ConfigError(f"{where}: the loss is {value}; {reason}"))
        if self._optimizing.gradient_clip is not None:
            fabric.clip_gradients(
                run.wrapped, run.wrapped_optimizer, max_norm=self._optimizing.gradient_clip
            )
        run.stepped()
        return value

    def _after_step(self, run: RunState, epoch: int, loss: float, last: int) -> None:
        step = run.progress.step
        if step % self._settings.log_interval == 0:
            rate = run.schedule.get_last_lr()[0]
            self.log.write("step", epoch=epoch, step=step, loss=loss, learning_rate=rate)
        interval = self._settings.checkpoint_interval
        if interval and step % interval == 0 and step < last:
            self._save(run, whole=True)

    def _end_epoch(self, run: RunState, feed: _Feed, epoch: int, bar: Bar) -> None:
        progress, data = run.progress, feed.data
        interval = self._settings.valid_interval
        last = epoch == self._settings.epochs
        with run.averaged():
            if data.valid is not None and (last or (interval and epoch % interval == 0)):
                scores, targets = self.scores(run.model, data, data.valid, feed.loading)
                _refuse_nan(scores, epoch)
                found = metrics.summary(scores, targets)
                self.log.write("valid", epoch=epoch, **found)
                self._judge(run, epoch, found["gap"])
                bar.note(f"epoch {epoch} loss {run.loss:.4f}{_shown(progress)}")
            elif data.valid is None:
                progress.best_epoch = epoch  # without validation the last is the best
                self._save(run, whole=False)
            if self._on_epoch_end is not None:
                self._on_epoch_end(epoch, run.model)
        self._save(run, whole=True)

    def _judge(self, run: RunState, epoch: int, gap: float) -> None:
        progress = run.progress
        if gap < progress.best_gap:
            progress.stale += 1
            return
        # Of equal epochs the later one has seen the lower learning rate.
        progress.stale = 0 if gap > progress.best_gap else progress.stale + 1
        progress.best_gap, progress.best_epoch = gap, epoch
        self._save(run, whole=False)

    def _finished(self, progress: Progress) -> bool:
        return bool(self._settings.patience) and progress.stale >= self._settings.patience

    def _save(self, run: RunState, *, whole: bool) -> None:
        if self._fabric.is_global_zero:
            checkpoint = Checkpoint(self._signature, run.progress, run.model.state_dict())
            if whole:
                run.fill(checkpoint)
            save_checkpoint(self.last if whole else self.best, checkpoint)
        self._fabric.barrier()

    def _restore(self, run: RunState, start: Start) -> None:
        run.restore(start)
        best = start.best
        if best is not None and best.resolve() != self.best.resolve():
            found = load_checkpoint(best, self._signature)
            if self._fabric.is_global_zero:
                save_checkpoint(self.best, found)
        self._fabric.barrier()
        progress = run.progress
        self.log.write(
            "resumed", epoch=progress.epoch, step=progress.step, checkpoint=str(start.path)
        )

    def _take_best(self, run: RunState) -> None:
        if self.best.exists() and run.progress.best_epoch:
            run.model.load_state_dict(load_checkpoint(self.best, self._signature).model)

    def _bar_enabled(self) -> bool:
        return self._settings.progress and self._fabric.is_global_zero


def _together(loader: Iterable[Batch], count: int) -> Iterator[list[Batch]]:
    """Batches in groups of ``count``; the last group may be smaller."""
    batches = iter(loader)
    while group := list(islice(batches, count)):
        yield group


def _refuse_nan(scores: npt.NDArray[np.float32], epoch: int) -> None:
    if np.isnan(scores).any():
        raise ConfigError(
            f"epoch {epoch}: the model's scores are NaN; lower optimizer.learning_rate"
        )


def _shown(progress: Progress) -> str:
    return f" best gap {progress.best_gap:.4f}" if progress.best_gap >= 0 else ""
