"""Train a timm model on posts' pictures, clips or sound, so that it can serve as an extractor.

The labels belong to posts, not to single pictures: a post's items are scored one by one and the
best (or mean) score of each class is the post's (multiple-instance learning).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from common.errors import ConfigError
from common.precision import (
    Arithmetic,
    Precision,
    autocast,
    require_device,
    resolve_precision,
    set_threads,
)
from common.progress import Bar, Watch, progress_bar
from demo.backbone_data import ItemArray, ItemBatch, ItemSet
from fusion.backbones.augment import Kind
from fusion.backbones.model import Pooling, PostTagger, create_backbone, save_backbone
from fusion.metrics import ranking as metrics

_CLIP_NORM = 5.0


@dataclass(frozen=True)
class BackboneReport:
    """Outcome of a training.

    Attributes:
        path: The state_dict that was written.
        dim: Length of one feature.
        best_epoch: The epoch that was kept, from 1.
        gap: GAP@20 on the validation posts at that epoch.
        mean_ap: mAP there.
        hit_at_1: Hit@1 there.
        per_class_ap: float64 ``(classes,)``, NaN for classes without positives.
        losses: Mean training loss of each epoch.
        seconds: Wall time of the training.
    """

    path: Path
    arch: str
    kind: Kind
    dim: int
    parameters: int
    posts: int
    valid_posts: int
    best_epoch: int
    gap: float
    mean_ap: float
    hit_at_1: float
    per_class_ap: npt.NDArray[np.float64]
    losses: tuple[float, ...]
    seconds: float


@dataclass
class _Best:
    gap: float = -1.0
    epoch: int = 0
    scores: npt.NDArray[np.float32] | None = None
    state: dict[str, torch.Tensor] | None = None


def train_backbone(
    arch: str,
    items: Sequence[ItemArray],
    targets: npt.ArrayLike,
    valid_items: Sequence[ItemArray],
    valid_targets: npt.ArrayLike,
    *,
    kind: Kind,
    out: Path,
    epochs: int = 10,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    image_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    watch: Watch | None = None,
    pooling: Pooling = "max",
    max_items: int = 6,
    weights: str = "scratch",
    weight_decay: float = 0.05,
    device: str = "cpu",
    precision: Precision = "auto",
    threads: int | None = None,
) -> BackboneReport:
    """Train a timm model with posts' labels and save it for the extractors.

    The epoch with the best validation GAP is kept. The file loads strictly into
    ``timm.create_model(arch, num_classes=0, in_chans=3)`` (patches: ``in_chans=1``). Pixels are
    normalised with the architecture's own mean and deviation, patches are taken as they are.

    Args:
        arch: timm's name.
        items: One array per post: pictures uint8 ``(n, S, S, 3)``, clips uint8
            ``(n, m, S, S, 3)``, patches float32 ``(n, 96, 64)``. Posts with n = 0 are left out.
        targets: ``(posts, classes)`` of 0 and 1.
        valid_items: Like ``items``.
        valid_targets: Like ``targets``.
        kind: What the items are.
        out: Path of the ``.safetensors`` file.
        epochs: Passes over the posts.
        batch_size: Posts in a batch.
        learning_rate: Peak of warm-up and cosine.
        image_size: Side of the pictures, checked against the arrays when given.
        seed: Fixes initial weights, order and augmentation.
        progress: Show a progress bar.
        watch: Is told of every step, for a bar that another process shows.
        pooling: How the scores of a post's items become the post's.
        max_items: Items of one post in a batch.
        weights: ``scratch``, ``pretrained``, or the path of a state_dict to start from.
        weight_decay: Of AdamW, on matrices only.
        device: ``cpu`` or ``cuda:N``.
        precision: Of the backbone's forward pass.
        threads: CPU threads; None leaves them.

    Raises:
        ConfigError: The architecture, weights or device cannot be had, or the loss is no number.
        ValueError: Arrays are not what ``kind`` needs.
    """
    set_threads(threads)
    place = require_device(device)
    train = ItemSet.build(kind, items, targets, "training posts")
    valid = ItemSet.build(kind, valid_items, valid_targets, "validation posts")
    size = _input_size(train, valid, image_size)
    started = time.monotonic()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = create_backbone(arch, kind, size, weights)
        tagger = PostTagger(backbone, kind, size, train.targets.shape[1], pooling)
        tagger.start_at(torch.from_numpy(train.targets.mean(axis=0)))
        tagger.to(place).to(memory_format=torch.channels_last)
        chosen = _suited(backbone, precision, device)
        loop = _Loop(tagger, train, valid, device, chosen, batch_size, max_items, seed)
        open_bar = partial(progress_bar, f"{kind} {arch}", enabled=progress, watch=watch)
        best, losses = loop.run(epochs, learning_rate, weight_decay, open_bar)
    if best.scores is None or best.state is None:
        raise ConfigError("epochs: must be at least 1")
    backbone.load_state_dict(best.state)
    about = {"arch": arch, "kind": kind, "height": str(size[0]), "width": str(size[1])}
    save_backbone(backbone, out, about)
    return BackboneReport(
        path=out,
        arch=arch,
        kind=kind,
        dim=tagger.dim,
        parameters=sum(p.numel() for p in backbone.parameters()),
        posts=len(train),
        valid_posts=len(valid),
        best_epoch=best.epoch,
        gap=best.gap,
        mean_ap=metrics.mean_average_precision(best.scores, valid.targets),
        hit_at_1=metrics.hit_at_one(best.scores, valid.targets),
        per_class_ap=metrics.average_precisions(best.scores, valid.targets),
        losses=tuple(losses),
        seconds=time.monotonic() - started,
    )


def _input_size(train: ItemSet, valid: ItemSet, image_size: int | None) -> tuple[int, int]:
    sizes = {
        part.items[0].shape[1:] if part.kind == "patch" else part.items[0].shape[-3:-1]
        for part in (train, valid)
    }
    if len(sizes) != 1 or (image_size is not None and sizes != {(image_size, image_size)}):
        wanted = f", not {image_size}" if image_size is not None else ""
        raise ValueError(f"items have the sizes {sorted(sizes)}{wanted}")
    height, width = next(iter(sizes))
    return int(height), int(width)


@dataclass
class _Loop:
    tagger: PostTagger
    train: ItemSet
    valid: ItemSet
    device: str
    precision: Arithmetic
    batch_size: int
    max_items: int
    seed: int

    def run(
        self,
        epochs: int,
        peak: float,
        weight_decay: float,
        open_bar: Callable[[int], AbstractContextManager[Bar]],
    ) -> tuple[_Best, list[float]]:
        optimizer = torch.optim.AdamW(_groups(self.tagger, weight_decay), lr=peak)
        steps = math.ceil(len(self.train) / self.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _warm_up_cosine(step, steps * epochs)
        )
        random = np.random.default_rng(self.seed)
        best, losses = _Best(), []
        with open_bar(steps * epochs) as bar:
            for epoch in range(1, epochs + 1):
                losses.append(self._epoch(optimizer, schedule, random, bar))
                scores = self.scores()
                gap = metrics.global_average_precision(scores, self.valid.targets)
                bar.note(f"epoch {epoch} loss {losses[-1]:.4f} gap {gap:.4f}")
                # Equal is better too: of equal epochs the later has seen the lower rate.
                if gap >= best.gap:
                    state = {k: v.clone() for k, v in self.tagger.backbone.state_dict().items()}
                    best = _Best(gap, epoch, scores, state)
        return best, losses

    def _epoch(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
        random: np.random.Generator,
        bar: Bar,
    ) -> float:
        self.tagger.train()
        total = 0.0
        for batch in self.train.batches(self.batch_size, self.max_items, random):
            logits, lesson = self._logits(batch)
            wanted = batch.targets.to(logits.device)
            # Summed over classes: with few positives the mean would leave hardly any gradient.
            loss = nn.functional.binary_cross_entropy_with_logits(logits, wanted)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ConfigError(
                    f"the training loss is {value}: lower the learning rate, "
                    "or look for items that are not finite"
                )
            optimizer.zero_grad(set_to_none=True)
            (loss * logits.shape[1] + lesson).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.tagger.parameters(), _CLIP_NORM)
            optimizer.step()
            schedule.step()
            total += value * len(batch.rows)
            bar.advance()
        return total / len(self.train)

    def _logits(self, batch: ItemBatch) -> tuple[torch.Tensor, torch.Tensor]:
        items, owners = batch.items.to(self.device), batch.owners.to(self.device)
        with autocast(self.device, self.precision):
            logits, lesson = self.tagger(items, owners, len(batch.rows))
        return logits, lesson

    @torch.no_grad()
    def scores(self) -> npt.NDArray[np.float32]:
        """Return scores ``(posts, classes)`` of the validation posts."""
        self.tagger.eval()
        parts = [
            torch.sigmoid(self._logits(batch)[0]).cpu().numpy()
            for batch in self.valid.batches(self.batch_size, max(self.max_items, 16), None)
        ]
        return np.concatenate(parts)


def _suited(backbone: nn.Module, precision: Precision, device: str) -> Arithmetic:
    """Resolve ``auto``: depthwise filters are 2 to 3 times slower in bf16 on CPUs."""
    depthwise = any(isinstance(m, nn.Conv2d) and m.groups > 8 for m in backbone.modules())
    if precision == "auto" and device == "cpu" and depthwise:
        return "fp32"
    return resolve_precision(precision, device, setting="precision")


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay matrices and filters, not biases and norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _warm_up_cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: a tenth of the steps up, then a cosine down to 0."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
