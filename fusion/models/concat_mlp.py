"""Concatenation of pooled modalities through plain layers: the simplest fusion."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import nn

from common.post import Stream
from config.fusion_models import ModelSettings
from fusion.data.schema import InputSchema
from fusion.models.base import Fused, FusionModel, Stage
from fusion.models.pooling import MeanPooling


class ConcatMLP(FusionModel):
    """Mean of each stream's tokens -> projection -> concat -> layers with ReLU -> logits."""

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__(schema, settings)
        options = settings.concat_mlp
        self.pool = MeanPooling(schema, options.modality_width)
        widths = [options.modality_width * len(schema.dims)] + [options.width] * options.layers
        self.hidden = nn.ModuleList(nn.Linear(wide, narrow) for wide, narrow in pairwise(widths))
        self.dropout = nn.Dropout(options.dropout)
        self.classify = nn.Linear(widths[-1], schema.classes)
        self._add_own_heads(dict.fromkeys(schema.dims, options.modality_width))

    @property
    def head(self) -> nn.Linear:
        return self.classify

    def layers(self) -> tuple[Stage, ...]:
        """Pooling, the hidden layers one by one, the head."""
        hidden = (Stage("fusion", (f"hidden.{i}",)) for i in range(len(self.hidden)))
        return (Stage("modality", ("pool",)), *hidden, Stage("head", ("classify",)))

    def fuse(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> Fused:
        alone = self.pool(tokens, masks)
        vector = torch.relu(torch.cat([alone[m] for m in self.streams], dim=1))
        for layer in self.hidden:
            vector = torch.relu(layer(self.dropout(vector)))  # (posts, width)
        return Fused(self.classify(self.dropout(vector)), alone)
