"""Late fusion: every modality has a model of its own, and only their logits meet."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from common.post import Stream
from config.fusion_models import ModelSettings
from fusion.models.base import Fused, FusionModel, InputSchema, Stage, masked_mean


class LateFusion(FusionModel):
    """Mean of each stream's tokens -> linear head; the mean of the logits of those that are there.

    Each head is trained alone, by the loss of own heads (``model.auxiliary``, 1 if that is 0): few
    posts are enough for it, and no modality leans on another. The weights of the mean are learned
    for each class. A post that has nothing gets each class's frequency.
    """

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        weight = settings.auxiliary or 1.0
        super().__init__(schema, settings.model_copy(update={"auxiliary": weight}))
        self.norms = nn.ModuleDict({m: nn.LayerNorm(d) for m, d in schema.dims.items()})
        self.dropout = nn.Dropout(settings.late.dropout)
        self.mixing = nn.Parameter(torch.zeros(len(schema.dims), schema.classes))
        self._add_own_heads(schema.dims)

    def layers(self) -> tuple[Stage, ...]:
        """Make norms and the weights of the mean; the heads are the own ones."""
        return (Stage("modality", ("norms",)), Stage("fusion", ("mixing",)), Stage("head", ()))

    def classifiers(self) -> tuple[nn.Linear, ...]:
        """Return nothing: the heads are the own ones."""
        return ()

    def undecayed(self) -> frozenset[str]:
        """Return the weights of the mean, whose start at 0 says that all count alike."""
        return frozenset({"mixing"})

    def fuse(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> Fused:
        alone = {
            m: self.dropout(masked_mean(self.norms[m](tokens[m]), masks[m])) for m in self.streams
        }
        # Detached: the loss of the mean trains its weights only.
        heads = self._own_heads()
        said = torch.stack([heads[m](alone[m]).detach() for m in self.streams], dim=1)
        present = torch.stack([masks[m].any(dim=1) for m in self.streams], dim=1)
        present = present | ~present.any(dim=1, keepdim=True)  # (posts, streams)
        # (posts, streams, classes)
        weights = self.mixing.masked_fill(~present[:, :, None], float("-inf")).softmax(dim=1)
        return Fused((weights * said).sum(dim=1), alone)
