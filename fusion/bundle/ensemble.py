"""Several models of one architecture that answer as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from fusion.data.collate import Batch
from fusion.models import FusionModel

Averaging = Literal["probabilities", "logits"]


class Ensemble(nn.Module):
    """The mean of its members; takes a batch and gives logits, as each of them does.

    Args:
        members: At least one, of one schema.
        averaging: What is averaged.
    """

    def __init__(
        self, members: Sequence[FusionModel], averaging: Averaging = "probabilities"
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.averaging: Averaging = averaging

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits float32 ``(posts, classes)``, whose sigmoid is the ensemble's score."""
        logits = torch.stack([member(batch) for member in self.members])  # (members, posts, cls)
        return averaged(logits, self.averaging)


def averaged(logits: torch.Tensor, averaging: Averaging) -> torch.Tensor:
    """Logits ``(members, …)`` ─► the ensemble's logits ``(…)``.

    The mean of probabilities is taken in logarithms: where all members are sure, a mean of
    float32 probabilities would be exactly 0 or 1, and posts that differ would tie.
    """
    if averaging == "logits":
        return logits.mean(dim=0)
    yes = functional.logsigmoid(logits).logsumexp(dim=0)
    no = functional.logsigmoid(-logits).logsumexp(dim=0)
    return yes - no
