"""The training loop, on Lightning Fabric. It knows batches and logits, and nothing of the model.

- one process or several (DDP), full or mixed precision, gradient accumulation and clipping;
- a moving average of the weights, validated and saved in their place;
- validation by GAP, the best epoch's weights, early stopping;
- checkpoints from which a killed run goes on bit for bit as if it had not been killed;
- a log of every step and epoch, for scripts and for TensorBoard.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset

from common.errors import ConfigError, told
from common.post_set import PostSet
from common.progress import Bar, notice, progress_bar
from config.train import OptimizerSettings, TrainerSettings
from fusion.data.loading import DataWait, EpochBatches, Loading, step_seed
from fusion.metrics import ranking as metrics
from fusion.models.base import Batch, Sample
from fusion.train.checkpoint import (
    BEST,
    LAST,
    Checkpoint,
    Progress,
    Start,
    fill,
    load_checkpoint,
    save_checkpoint,
)
from fusion.train.distributed import same_everywhere
from fusion.train.losses import Objective
from fusion.train.optimizer import average_of, build_optimizer
from fusion.train.run_log import RunLog

Scored: TypeAlias = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
OnEpochEnd: TypeAlias = Callable[[int, nn.Module], None]
"""Takes the epoch, from 1, and the model with the weights that are validated: averaged ones if
there is a moving average. Called in every process, before the checkpoint of the epoch."""
OnValidation: TypeAlias = Callable[[int, float], None]
"""Takes the epoch, from 1, and the GAP of its validation; what it raises ends the training."""


class Diverged(ConfigError):
    """The loss or the scores are no numbers any more: other settings are needed."""


@dataclass(frozen=True)
class TrainData:
    """The posts of a run.

    Attributes:
        learned_from: The posts to train on, and those that the start was trained on.
        seen: The validation posts are among them: their figures say nothing of new posts.
        loaders: Processes that read; 0 reads in a thread of this one.
    """

    train: Dataset[Sample]
    valid: Dataset[Sample] | None
    collate: Callable[[Sequence[Any]], Batch]
    train_count: int
    learned_from: PostSet = field(default_factory=PostSet)
    seen: bool = False
    loaders: int = 0


@dataclass
class _Run:
    """The moving parts of one `Trainer.fit`; `module` and `wrapped_optimizer` are Fabric's."""

    data: TrainData
    batches: EpochBatches
    loading: Loading
    model: nn.Module
    module: Any
    optimizer: torch.optim.Optimizer
    wrapped_optimizer: Any
    schedule: torch.optim.lr_scheduler.LambdaLR
    average: AveragedModel | None
    progress: Progress
    loss: float = 0.0

    @property
    def validated(self) -> nn.Module:
        """Return the model that is validated and served: the moving average if there is one."""
        return self.model if self.average is None else self.average.module


class Trainer:
    """The training of one model; `fit` leaves it with the best weights.

    Files under ``save_dir``: ``ckpt/last.pt`` after every epoch, ``ckpt/best.pt`` by GAP, and
    ``log/train.jsonl``. ``wait`` counts how long the steps of this process waited for data.
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
        on_validation: OnValidation | None = None,
    ) -> None:
        self._fabric, self._settings, self._optimizer = fabric, settings, optimizer
        self._signature, self._seed = signature, seed
        self._on_epoch_end, self._on_validation = on_epoch_end, on_validation
        self.log = RunLog(
            settings.save_dir / "log" / "train.jsonl",
            enabled=fabric.is_global_zero,
            tensorboard=settings.tensorboard,
        )
        self.last = settings.save_dir / "ckpt" / LAST
        self.best = settings.save_dir / "ckpt" / BEST
        self.wait = DataWait()

    def fit(self, objective: Objective, data: TrainData, start: Start | None = None) -> Progress:
        """Train to the last epoch, or until validation stops getting better."""
        run, steps = self._begin(objective, data, start)
        epochs, patience = self._settings.epochs, self._settings.patience
        shown = self._settings.progress and self._fabric.is_global_zero
        notice(f"log: {self._settings.save_dir / 'log' / 'train.jsonl'}", enabled=shown)
        solutions = self._solutions(run)
        # How many solutions a model has is not known before they are found.
        total = steps if solutions is None else None
        with closing(run.loading), progress_bar("train", total, enabled=shown) as bar:
            for epoch in range(run.progress.epoch + 1, epochs + 1):
                if patience and run.progress.stale >= patience:
                    break
                if solutions is None:
                    self._train_epoch(run, epoch, bar)
                elif not self._solve(run, solutions, epoch):
                    break
                else:
                    bar.advance()
                self._validate(run, epoch, bar, due=solutions is not None)
                if self._on_epoch_end is not None:
                    self._on_epoch_end(epoch, run.validated)
                self._save(run, whole=True)
        if self.best.exists() and run.progress.best_epoch:
            run.model.load_state_dict(load_checkpoint(self.best, self._signature).model)
        return run.progress

    def logits(self, model: nn.Module, data: TrainData, posts: Dataset[Sample]) -> Scored:
        """Return logits and targets of posts as `score_posts` does, on every rank."""
        with closing(Loading(data.collate, data.loaders, self._fabric.device)) as loading:
            return score_posts(self._fabric, model, loading, posts, self._settings.batch_size)

    def _begin(
        self, objective: Objective, data: TrainData, start: Start | None
    ) -> tuple[_Run, int]:
        """Build everything that training changes, and restore it from a checkpoint."""
        fabric, settings, accumulate = self._fabric, self._settings, self._optimizer.accumulate
        try:
            batches = EpochBatches(
                data.train_count,
                settings.batch_size,
                self._seed,
                rank=fabric.global_rank,
                world=fabric.world_size,
            )
        except ValueError as error:
            raise ConfigError(
                f"trainer.batch_size: {error} processes; take larger batches or fewer processes"
            ) from error
        epoch_steps = -(-len(batches) // accumulate)
        steps = epoch_steps * settings.epochs
        model = objective.model
        objective.to(fabric.device)
        if start is not None:
            fill(model, start)
        optimizer, schedule = build_optimizer(model, self._optimizer, steps)
        decay = self._optimizer.ema_decay
        average = average_of(model, decay) if decay else None
        # A checkpoint inside an epoch only fits a run with the same batches.
        progress = Progress(self._seed, shape=(data.train_count, settings.batch_size, accumulate))
        if start is not None and start.exact:
            progress = self._restored(start, progress, optimizer, schedule)
            saved = start.checkpoint.average
            if average is not None and saved is not None:
                average.module.load_state_dict(saved["state"])
                average.n_averaged.fill_(saved["steps"] + 1)
            self._bring_best(start)
            self.log.write(
                "resumed", epoch=progress.epoch, step=progress.step, checkpoint=str(start.path)
            )
        self._synchronise_norms(objective)
        module, wrapped_optimizer = fabric.setup(objective, optimizer)
        done = progress.epoch * epoch_steps + progress.step
        self.log.begin(epoch_steps, done=done)
        loading = Loading(data.collate, data.loaders, fabric.device)
        run = _Run(
            data=data,
            batches=batches,
            loading=loading,
            model=model,
            module=module,
            optimizer=optimizer,
            wrapped_optimizer=wrapped_optimizer,
            schedule=schedule,
            average=average,
            progress=progress,
        )
        return run, steps - done

    def _train_epoch(self, run: _Run, epoch: int, bar: Bar) -> None:
        """Learn from every post once; of an interrupted epoch, from the rest of it."""
        progress, accumulate, batches = run.progress, self._optimizer.accumulate, run.batches
        batches.epoch, batches.start = epoch, progress.step * accumulate
        started, wait = time.monotonic(), DataWait()
        last = -(-len(batches) // accumulate)
        run.model.train()
        with closing(run.loading.batches(run.data.train, batches)) as reading:
            for group in wait.watch(_groups(reading, accumulate)):
                step = progress.step + 1
                # Every step has its own seed: a resumed run draws what the first one would have.
                _seed_all(step_seed(self._seed, epoch, step, self._fabric.global_rank))
                first = progress.step * accumulate
                posts = sum(batches.posts(first + n) for n in range(len(group)))
                loss = self._step(run, group, posts, f"epoch {epoch}, step {step}")
                progress.step, progress.posts = step, progress.posts + posts
                progress.loss += loss * posts
                bar.advance()
                self._after_step(run, epoch, loss, last)
        self.wait.add(wait)
        run.loss = progress.loss / max(1, progress.posts)
        self.log.write(
            "epoch",
            epoch=epoch,
            loss=run.loss,
            posts=progress.posts,
            seconds=round(time.monotonic() - started, 3),
            data_wait=round(wait.share, 4),
        )
        progress.epoch, progress.step, progress.posts, progress.loss = epoch, 0, 0, 0.0
        bar.note(_note(run))

    def _solutions(self, run: _Run) -> Iterator[float] | None:
        """Return the solutions of a model that takes no steps, past those of an earlier run."""
        count, size = run.data.train_count, self._settings.batch_size
        rows = [list(range(at, min(at + size, count))) for at in range(0, count, size)]
        model: Any = run.model
        find = getattr(model, "solutions", None)
        batches = (
            batch.to(self._fabric.device) for batch in run.loading.batches(run.data.train, rows)
        )
        solutions: Iterator[float] | None = None if find is None else find(batches)
        return None if solutions is None else islice(solutions, run.progress.epoch, None)

    def _solve(self, run: _Run, solutions: Iterator[float], epoch: int) -> bool:
        """Take the next solution; False if there is none. Every process finds the same."""
        started = time.monotonic()
        loss = next(solutions, None)
        if loss is None:
            return False
        if run.average is not None:
            run.average.module.load_state_dict(run.model.state_dict())
        run.loss, run.progress.epoch = loss, epoch
        seconds = round(time.monotonic() - started, 3)
        posts = run.data.train_count
        timing: dict[str, Any] = {"seconds": seconds, "data_wait": 0.0}
        self.log.write("epoch", epoch=epoch, loss=loss, posts=posts, method="solved", **timing)
        return True

    def _step(self, run: _Run, batches: list[Batch], posts: int, where: str) -> float:
        """Learn from batches as if they were one; return their mean loss over all processes."""
        fabric, world = self._fabric, self._fabric.world_size
        total = torch.zeros((), device=fabric.device)
        run.wrapped_optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(batches, 1):
            with fabric.no_backward_sync(run.module, enabled=number < len(batches)):
                loss = run.module(batch.to(fabric.device))
                # Each post counts alike, though processes have different numbers of them.
                loss = loss * (len(batch.post_ids) / posts)
                total += loss.detach()
                fabric.backward(loss * world)  # DDP takes the mean over processes
        # All processes learn of a bad loss at once: none waits for one that has given up.
        value = float(cast("torch.Tensor", fabric.all_reduce(total, reduce_op="sum")))
        if not math.isfinite(value):
            reason = "lower optimizer.learning_rate, or look for features that are not finite"
            raise same_everywhere(Diverged(f"{where}: the loss is {value}; {reason}"))
        if self._optimizer.gradient_clip is not None:
            fabric.clip_gradients(
                run.module, run.wrapped_optimizer, max_norm=self._optimizer.gradient_clip
            )
        run.wrapped_optimizer.step()
        run.schedule.step()
        if run.average is not None:
            run.average.update_parameters(run.model)
        return value

    def _after_step(self, run: _Run, epoch: int, loss: float, last: int) -> None:
        step = run.progress.step
        if step % self._settings.log_interval == 0:
            rate = run.schedule.get_last_lr()[0]
            self.log.write("step", epoch=epoch, step=step, loss=loss, learning_rate=rate)
        interval = self._settings.checkpoint_interval
        if interval and step % interval == 0 and step < last:
            self._save(run, whole=True)

    def _validate(self, run: _Run, epoch: int, bar: Bar, *, due: bool) -> None:
        """Score the validation posts if it is time, and save the weights if they are the best."""
        settings, progress, data = self._settings, run.progress, run.data
        if data.valid is None:
            progress.best_epoch = epoch  # the last epoch counts as the best
            self._save(run, whole=False)
            return
        interval = settings.valid_interval
        if not due and epoch != settings.epochs and not (interval and epoch % interval == 0):
            return
        logits, targets = score_posts(
            self._fabric, run.validated, run.loading, data.valid, settings.batch_size
        )
        if np.isnan(logits).any():
            raise Diverged(
                f"epoch {epoch}: the model's scores are NaN; lower optimizer.learning_rate"
            )
        summary = metrics.summary(logits, targets, thresholds=0.0)  # scores of 0.5
        seen = {"seen_posts": len(logits)} if data.seen else {}
        self.log.write("valid", epoch=epoch, **summary, **seen)
        gap = summary["gap"]
        # Of equal epochs the later one has seen the lower learning rate.
        progress.stale = 0 if gap > progress.best_gap else progress.stale + 1
        if gap >= progress.best_gap:
            progress.best_gap, progress.best_epoch = gap, epoch
            self._save(run, whole=False)
        bar.note(_note(run))
        if self._on_validation is not None:
            self._on_validation(epoch, gap)

    def _save(self, run: _Run, *, whole: bool) -> None:
        """Write ``last.pt``, from which a run goes on; or ``best.pt``, which only has weights."""
        if self._fabric.is_global_zero:
            model = run.model if whole else run.validated
            checkpoint = Checkpoint(
                self._signature,
                run.progress,
                model.state_dict(),
                learned_from=run.data.learned_from.as_text(),
            )
            if whole:
                checkpoint.optimizer = run.optimizer.state_dict()
                checkpoint.schedule = run.schedule.state_dict()
                if run.average is not None:
                    steps = int(run.average.n_averaged) - 1
                    checkpoint.average = {"steps": steps, "state": run.validated.state_dict()}
                checkpoint.scaler = self._fabric.strategy.precision.state_dict()
            save_checkpoint(self.last if whole else self.best, checkpoint)
        self._fabric.barrier()

    def _bring_best(self, start: Start) -> None:
        """Copy the best weights so far when the run goes on in another folder."""
        best = start.best
        if best is not None and best.resolve() != self.best.resolve():
            checkpoint = load_checkpoint(best, self._signature)
            if self._fabric.is_global_zero:
                save_checkpoint(self.best, checkpoint)
        self._fabric.barrier()

    def _restored(
        self,
        start: Start,
        progress: Progress,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
    ) -> Progress:
        """Fill optimizer and schedule from a checkpoint, and return how far its run had come."""
        checkpoint, path = start.checkpoint, start.path
        # Old ones without a name are adamw's.
        saved_name = checkpoint.optimizer["param_groups"][0].get("optimizer", "adamw")
        if saved_name != self._optimizer.name:
            raise ConfigError(
                f"{path}: was made with optimizer {saved_name}, this run has {self._optimizer.name}"
            )
        saved = checkpoint.progress
        if saved.step and tuple(saved.shape) != progress.shape:
            names = ("posts", "trainer.batch_size", "optimizer.accumulate")
            differ = next(i for i in range(3) if saved.shape[i] != progress.shape[i])
            raise ConfigError(
                f"{path}: was saved inside an epoch with {names[differ]} {saved.shape[differ]}, "
                f"this run has {progress.shape[differ]}"
            )
        with told(f"{path}: its optimizer does not fit this run", ValueError, KeyError):
            optimizer.load_state_dict(checkpoint.optimizer)
            schedule.load_state_dict(checkpoint.schedule)
            if checkpoint.scaler:
                self._fabric.strategy.precision.load_state_dict(checkpoint.scaler)
        saved.shape = progress.shape
        return saved

    def _synchronise_norms(self, objective: Objective) -> None:
        """Let batch normalisation see the whole batch of all processes, where torch can."""
        normalises = any(isinstance(part, _BatchNorm) for part in objective.modules())
        if self._fabric.world_size == 1 or not normalises:
            return
        if self._fabric.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(objective)  # type: ignore[no-untyped-call]
        else:
            notice(
                "batch normalisation takes its statistics from each process's part of a "
                "batch: results depend on the number of processes",
                enabled=self._fabric.is_global_zero,
            )


def _groups(loader: Iterable[Batch], count: int) -> Iterator[list[Batch]]:
    """Yield batches in groups of ``count``; the last group may be smaller."""
    batches = iter(loader)
    while group := list(islice(batches, count)):
        yield group


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


def _note(run: _Run) -> str:
    progress = run.progress
    seen = " of training posts" if run.data.seen else ""
    best = f" best gap {progress.best_gap:.4f}{seen}" if progress.best_gap >= 0 else ""
    return f"epoch {progress.epoch} loss {run.loss:.4f}{best}"


def score_posts(
    fabric: Fabric, model: nn.Module, loading: Loading, posts: Dataset[Sample], batch_size: int
) -> Scored:
    """Return logits and targets of all posts, float32 ``(posts, classes)``, on every rank.

    Every post is scored once, whatever the number of processes: metrics are those of one.
    """
    rank, world, count = fabric.global_rank, fabric.world_size, len(posts)  # type: ignore[arg-type]
    mine = range(rank, count, world)
    each = max(1, batch_size // world)
    rows = [list(mine[at : at + each]) for at in range(0, len(mine), each)]
    _share_buffers(fabric, model)
    training = model.training
    model.eval()
    scores: list[torch.Tensor] = []
    with torch.inference_mode(), closing(loading.batches(posts, rows)) as batches:
        for batch in batches:
            # In full precision whatever the training's: as the bundle will be served.
            logits = model(batch.to(fabric.device)).float().cpu()
            scores.append(torch.stack([logits, batch.truth]))  # (2, posts, classes)
    model.train(training)
    both = _gathered(fabric, scores, count) if world > 1 else torch.cat(scores, dim=1)
    return both[0].numpy(), both[1].numpy()


def _gathered(fabric: Fabric, scores: list[torch.Tensor], count: int) -> torch.Tensor:
    """Join the parts of all processes to ``(2, posts, classes)`` in the posts' order."""
    world, device = fabric.world_size, fabric.device
    # A process without a post does not know how many classes there are.
    classes = torch.tensor(scores[0].shape[2] if scores else 0, device=device)
    distributed.all_reduce(classes, distributed.ReduceOp.MAX)
    rows = -(-count // world)
    padded = torch.zeros(2, rows, int(classes), device=device)
    if scores:
        mine = torch.cat(scores, dim=1)
        padded[:, : mine.shape[1]] = mine.to(device)
    parts = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(parts, padded)
    # Post i is row i // world of process i % world; what is left over is padding.
    return torch.stack(parts, dim=2).flatten(1, 2)[:, :count].cpu()


def _share_buffers(fabric: Fabric, model: nn.Module) -> None:
    """Give every process the running statistics of the first, as its weights are."""
    if fabric.world_size > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)
