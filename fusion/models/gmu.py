"""Gated multimodal unit: learned gates weigh the modalities that are there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from common.post import Stream
from config.fusion_models import ModelSettings
from fusion.data.schema import InputSchema
from fusion.models.base import Fused, FusionModel, Stage
from fusion.models.pooling import MeanPooling


class GMU(FusionModel):
    """Mean of each stream -> h -> Σ gate · tanh(h) -> FC, ReLU -> logits.

    The gates are a softmax, for each element, over the modalities that are there: with two it is
    the sigmoid of the paper. What stands for a missing modality is seen by the gates of the others
    and gets none itself, except in a post that has nothing at all.

    Source: arXiv 1702.01992, section 3.
    """

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__(schema, settings)
        options = settings.gmu
        self.width = options.width
        self.pool = MeanPooling(schema, self.width)
        joined = self.width * len(schema.dims)
        self.gates = nn.Linear(joined, joined)
        self.hidden = nn.Linear(self.width, self.width)
        self.dropout = nn.Dropout(options.dropout)
        self.classify = nn.Linear(self.width, schema.classes)
        self._add_own_heads(dict.fromkeys(schema.dims, self.width))

    @property
    def head(self) -> nn.Linear:
        return self.classify

    def layers(self) -> tuple[Stage, ...]:
        """Pooling, gates, the layer behind them, the head."""
        return (
            Stage("modality", ("pool",)),
            Stage("fusion", ("gates",)),
            Stage("fusion", ("hidden",)),
            Stage("head", ("classify",)),
        )

    def fuse(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> Fused:
        alone = self.pool(tokens, masks)
        vectors = torch.stack([alone[m] for m in self.streams], dim=1)
        posts, count, width = vectors.shape  # (posts, modalities, width)
        there = torch.stack([masks[m].any(dim=1) for m in self.streams], dim=1)
        there = there | ~there.any(dim=1, keepdim=True)
        # (posts, modalities · width) -> (posts, modalities, width)
        gates = self.gates(vectors.flatten(1)).view(posts, count, width)
        gates = gates.masked_fill(~there[:, :, None], float("-inf")).softmax(dim=1)
        fused = (gates * torch.tanh(vectors)).sum(dim=1)  # (posts, width)
        hidden = torch.relu(self.hidden(self.dropout(fused)))
        return Fused(self.classify(self.dropout(hidden)), alone)
