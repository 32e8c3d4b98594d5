"""One training of one fusion model."""

from __future__ import annotations

import numpy as np
import torch
from lightning_fabric import Fabric

from common.progress import notice
from config.train import TrainSettings
from fusion.data.dataset import PostDataset
from fusion.data.posts import PostList
from fusion.models import FusionModel, build_model
from fusion.train.checkpoint import Progress
from fusion.train.losses import TaggingLoss
from fusion.train.objective import Objective
from fusion.train.prepare import Prepared
from fusion.train.resume import Start
from fusion.train.trainer import OnEpochEnd, TrainData, Trainer


def train_model(
    fabric: Fabric,
    settings: TrainSettings,
    prepared: Prepared,
    data: TrainData,
    *,
    mark: str,
    seed: int,
    start: Start | None = None,
    on_epoch_end: OnEpochEnd | None = None,
) -> tuple[FusionModel, Trainer, Progress]:
    """One model, trained; with the best weights, on the training's device.

    Args:
        fabric: Launched.
        settings: All of them.
        prepared: Labels and features.
        data: What this model learns from.
        mark: The signature of its checkpoints.
        seed: Of weights, order and noise.
        start: Where to begin.
        on_epoch_end: Sees the model after every epoch.
    """
    positives = torch.from_numpy(_posts_of(data).positives().astype(np.float32))
    torch.manual_seed(seed)
    model = build_model(prepared.schema, settings.model)
    model.start_at(positives / data.train_count)
    trainer = Trainer(
        fabric,
        settings.trainer,
        settings.optimizer,
        signature=mark,
        seed=seed,
        on_epoch_end=on_epoch_end,
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
    return model, trainer, trainer.fit(objective, data, start)


def _posts_of(data: TrainData) -> PostList:
    if not isinstance(data.train, PostDataset):
        raise TypeError("training takes a PostDataset")
    return data.train.posts
