"""The moving parts of one training run: model, optimizer, schedule, average, progress."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import ConfigError
from common.progress import notice
from config.train import OptimizerSettings
from fusion.train.checkpoint import Checkpoint, Progress
from fusion.train.objective import Objective
from fusion.train.optimizer import MovingAverage, build_optimizer, saved_with
from fusion.train.resume import Start


class RunState:
    """What changes with every step, and what a checkpoint of it needs.

    Attributes:
        wrapped: Fabric's module, after `wrap`.
        wrapped_optimizer: Fabric's optimizer, which does its precision.
        average: Moving average of the weights, where there is one.
        loss: Mean of the last epoch.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        settings: OptimizerSettings,
        steps: int,
        progress: Progress,
    ) -> None:
        """Make the optimizer and its schedule.

        Args:
            fabric: Launched.
            model: On Fabric's device.
            settings: Of the optimizer.
            steps: Of the whole run.
            progress: So far.
        """
        self.model = model
        self.optimizer, self.schedule = build_optimizer(model, settings, steps)
        self.progress = progress
        self.wrapped: Any = model
        self.wrapped_optimizer: Any = self.optimizer
        self.average = MovingAverage(model, settings.ema_decay) if settings.ema_decay else None
        self.loss = 0.0
        self._fabric, self._name = fabric, settings.name

    def wrap(self, objective: Objective) -> None:
        """Give module and optimizer to Fabric."""
        if self._fabric.world_size > 1 and _normalises_batches(objective):
            if self._fabric.device.type == "cuda":
                nn.SyncBatchNorm.convert_sync_batchnorm(objective)  # type: ignore[no-untyped-call]
            else:
                notice(
                    "batch normalisation takes its statistics from each process's part of a "
                    "batch: results depend on the number of processes",
                    enabled=self._fabric.is_global_zero,
                )
        self.wrapped, self.wrapped_optimizer = self._fabric.setup(objective, self.optimizer)

    def stepped(self) -> None:
        """Take the step that the gradients say."""
        self.wrapped_optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.model)

    def averaged(self) -> AbstractContextManager[None]:
        """The moving average's weights for a while, where there is one."""
        return nullcontext() if self.average is None else self.average.applied(self.model)

    def fill(self, checkpoint: Checkpoint) -> None:
        """Add everything beside the weights."""
        checkpoint.optimizer = self.optimizer.state_dict()
        checkpoint.schedule = self.schedule.state_dict()
        checkpoint.average = None if self.average is None else self.average.state_dict()
        checkpoint.scaler = self._fabric.strategy.precision.state_dict()

    def restore(self, start: Start) -> None:
        """Go on where a checkpoint stopped; the weights are in the model already.

        Raises:
            ConfigError: Its optimizer, or the epoch that it stands in, is not this run's.
        """
        checkpoint, path, wanted = start.checkpoint, start.path, self.progress.shape
        before = saved_with(checkpoint.optimizer)
        if before != self._name:
            raise ConfigError(
                f"{path}: was made with optimizer {before}, this run has {self._name}"
            )
        found = checkpoint.progress
        if found.step and tuple(found.shape) != wanted:
            names = ("posts", "trainer.batch_size", "optimizer.accumulate")
            differ = next(i for i in range(3) if found.shape[i] != wanted[i])
            raise ConfigError(
                f"{path}: stands inside an epoch with {names[differ]} {found.shape[differ]}, "
                f"this run has {wanted[differ]}"
            )
        try:
            self.optimizer.load_state_dict(checkpoint.optimizer)
            self.schedule.load_state_dict(checkpoint.schedule)
            if self.average is not None and checkpoint.average is not None:
                self.average.load_state_dict(checkpoint.average)
            if checkpoint.scaler:
                self._fabric.strategy.precision.load_state_dict(checkpoint.scaler)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{path}: its optimizer does not fit this run: {error}") from error
        self.progress = found
        found.shape = wanted


def seed_all(seed: int) -> None:
    """Seed everything that draws."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


def _normalises_batches(module: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in module.modules())
