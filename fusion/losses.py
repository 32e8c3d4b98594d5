"""Losses of multi-label tagging; all take logits, never probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch.nn import functional

from config.train import LossName

Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def binary_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean binary cross entropy in its logits form, which cannot overflow.

    Args:
        logits: float ``(posts, classes)``.
        targets: float ``(posts, classes)`` of 0 and 1.
    """
    return functional.binary_cross_entropy_with_logits(logits.float(), targets)


LOSSES: Mapping[LossName, Loss] = {"bce": binary_cross_entropy}
