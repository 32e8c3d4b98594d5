"""Models of one mean vector for each stream: their concatenation, and a gated multimodal unit."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import nn

from common.post import Stream
from config.fusion_models import ModelSettings
from fusion.models.base import (
    Fused,
    FusionModel,
    InputSchema,
    Stage,
    learned_vectors,
    masked_mean,
    or_missing,
)


class MeanPooling(nn.Module):
    """Each stream: LayerNorm -> mean of its tokens -> projection, or its "missing" vector."""

    def __init__(self, schema: InputSchema, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({m: nn.LayerNorm(d) for m, d in schema.dims.items()})
        self.projections = nn.ModuleDict({m: nn.Linear(d, width) for m, d in schema.dims.items()})
        self.missing = learned_vectors(schema, width)

    def forward(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> dict[Stream, torch.Tensor]:
        """Return ``(posts, width)`` of each stream."""
        return {m: self._vector(m, tokens[m], masks[m]) for m in tokens}

    def _vector(self, stream: Stream, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        missing: torch.Tensor = self.missing[stream]
        if not tokens.shape[1]:
            return missing.expand(tokens.shape[0], -1)
        pooled = masked_mean(self.norms[stream](tokens), mask)  # (posts, dim)
        projected = self.projections[stream](pooled)  # (posts, width)
        return or_missing(projected, mask, missing)


class ConcatMLP(FusionModel):
    """Mean of each stream's tokens -> projection -> concat -> layers with ReLU -> logits."""

    takes_none = True

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__(schema, settings)
        options = settings.concat_mlp
        self.pool = MeanPooling(schema, options.modality_width)
        widths = [options.modality_width * len(schema.dims)] + [options.width] * options.layers
        self.hidden = nn.ModuleList(nn.Linear(wide, narrow) for wide, narrow in pairwise(widths))
        self.dropout = nn.Dropout(options.dropout)
        self.classify = nn.Linear(widths[-1], schema.classes)
        self._add_own_heads(dict.fromkeys(schema.dims, options.modality_width))

    def layers(self) -> tuple[Stage, ...]:
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


class GMU(FusionModel):
    """Mean of each stream -> h -> Σ gate · tanh(h) -> FC, ReLU -> logits.

    The gates are a softmax, for each element, over the modalities that are there: with two it is
    the sigmoid of the paper. What stands for a missing modality is seen by the gates of the others
    and gets none itself, except in a post that has nothing at all.

    Source: arXiv 1702.01992, section 3.
    """

    takes_none = True

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

    def layers(self) -> tuple[Stage, ...]:
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
        present = torch.stack([masks[m].any(dim=1) for m in self.streams], dim=1)
        present = present | ~present.any(dim=1, keepdim=True)
        # (posts, modalities · width) -> (posts, modalities, width)
        gates = self.gates(vectors.flatten(1)).view(posts, count, width)
        gates = gates.masked_fill(~present[:, :, None], float("-inf")).softmax(dim=1)
        fused = (gates * torch.tanh(vectors)).sum(dim=1)  # (posts, width)
        hidden = torch.relu(self.hidden(self.dropout(fused)))
        return Fused(self.classify(self.dropout(hidden)), alone)
