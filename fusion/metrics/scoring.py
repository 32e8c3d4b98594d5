"""Logits of a whole set of posts, each process a part of them."""

from __future__ import annotations

from contextlib import closing
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import distributed, nn
from torch.utils.data import Dataset

from fusion.data.collate import Batch, Sample
from fusion.data.loading import Loading

Scored: TypeAlias = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


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
    found: list[torch.Tensor] = []
    with torch.inference_mode(), closing(loading.batches(posts, rows)) as batches:
        for batch in batches:
            # In full precision whatever the training's: as the bundle will be served.
            logits = model(batch.to(fabric.device)).float().cpu()
            found.append(torch.stack([logits, targets_of(batch)]))  # (2, posts, classes)
    model.train(training)
    both = _gathered(fabric, found, count) if world > 1 else torch.cat(found, dim=1)
    return both[0].numpy(), both[1].numpy()


def targets_of(batch: Batch) -> torch.Tensor:
    """Return the targets of a batch, float32 ``(posts, classes)``.

    Raises:
        ValueError: It has none.
    """
    if batch.targets is None:
        raise ValueError("a training batch needs targets")
    return batch.targets


def _gathered(fabric: Fabric, found: list[torch.Tensor], count: int) -> torch.Tensor:
    """Join the parts of all processes to ``(2, posts, classes)`` in the posts' order."""
    world, device = fabric.world_size, fabric.device
    # A process without a post does not know how many classes there are.
    classes = torch.tensor(found[0].shape[2] if found else 0, device=device)
    distributed.all_reduce(classes, distributed.ReduceOp.MAX)
    rows = -(-count // world)
    padded = torch.zeros(2, rows, int(classes), device=device)
    if found:
        mine = torch.cat(found, dim=1)
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
