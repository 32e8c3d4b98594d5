"""What is minimised: a model and its loss as one module, so that DDP sees the whole of it."""

from __future__ import annotations

import torch
from torch import nn

from fusion.data.collate import Batch
from fusion.models import FusionModel
from fusion.train.losses import TaggingLoss
from fusion.train.mixup import mixed


class Objective(nn.Module):
    """A batch with targets in, the loss out.

    The loss of the model, and of each modality's own head for the posts that have the modality,
    weighted by ``auxiliary``, summed.
    """

    def __init__(
        self, model: nn.Module, loss: TaggingLoss, *, auxiliary: float = 0.0, mixup: float = 0.0
    ) -> None:
        """Make one.

        Args:
            model: Takes a `Batch`, gives logits ``(posts, classes)``; a `FusionModel` may have
                own heads.
            loss: Of logits and targets.
            auxiliary: Weight of the own heads' losses.
            mixup: α, 0 mixes nothing.
        """
        super().__init__()
        self.model, self.loss = model, loss
        self._auxiliary, self._mixup = auxiliary, mixup

    def forward(self, batch: Batch) -> torch.Tensor:
        """The loss, a scalar.

        Raises:
            ValueError: The batch has no targets.
        """
        if batch.targets is None:
            raise ValueError("a training batch needs targets")
        if self._mixup and self.model.training:
            batch = mixed(batch, self._mixup)
        if not self._auxiliary or not isinstance(self.model, FusionModel):
            alone: torch.Tensor = self.loss(self.model(batch), batch.targets)
            return alone
        said = self.model.outputs(batch)
        total: torch.Tensor = self.loss(said.logits, batch.targets)
        for modality, logits in said.own.items():
            own = self.loss(logits, batch.targets, said.there[modality])
            total = total + self._auxiliary * own
        return total
