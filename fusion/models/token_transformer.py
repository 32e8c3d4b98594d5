"""Tokens of all modalities in one small transformer: the default fusion."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from common.post import Stream
from config.fusion_models import ModelSettings
from fusion.data.schema import InputSchema
from fusion.models.base import Fused, FusionModel, Stage, learned_vectors, masked_mean
from fusion.models.blocks import Block, position_scales, positions, projections, refuse_uneven


class TokenTransformer(FusionModel):
    """[CLS] and the tokens of every stream, or its learned "missing" token, in one sequence."""

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__(schema, settings)
        options = settings.token_transformer
        width = options.width
        refuse_uneven(width, options.heads, "model.token_transformer")
        self.projections = projections(schema, width, motion=options.motion)
        self.kinds = learned_vectors(schema, width)
        self.missing = learned_vectors(schema, width)
        self.scales = position_scales(schema)
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(
            Block(width, options.heads, options.dropout) for _ in range(options.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, schema.classes)
        self.places: torch.Tensor
        self.register_buffer(
            "places", positions(max(schema.tokens.values()), width), persistent=False
        )
        self._add_own_heads(dict.fromkeys(schema.dims, width))

    @property
    def head(self) -> nn.Linear:
        return self.classify

    def layers(self) -> tuple[Stage, ...]:
        """Return projections, the blocks one by one, the head."""
        blocks = (Stage("fusion", (f"blocks.{i}",)) for i in range(len(self.blocks)))
        first = Stage("modality", ("projections", "kinds", "missing", "scales", "start"))
        return (first, *blocks, Stage("head", ("norm", "classify")))

    def fuse(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> Fused:
        first = tokens[self.streams[0]]
        posts = first.shape[0]
        sequence = [self.start.expand(posts, 1, -1)]
        there = [torch.ones(posts, 1, dtype=torch.bool, device=first.device)]
        alone: dict[Stream, torch.Tensor] = {}
        for stream in self.streams:
            mask = masks[stream]
            projected = self.projections[stream](tokens[stream])  # (posts, n, width)
            if self.has_own_heads:
                alone[stream] = masked_mean(projected, mask)
            if stream in self.scales:
                places = self.places[: projected.shape[1]]
                projected = projected + self.scales[stream] * places
            stand_in = self.missing[stream].expand(posts, 1, -1)
            sequence.append(torch.cat([projected, stand_in], dim=1) + self.kinds[stream])
            # The stand-in is seen exactly where nothing else of the modality is.
            there += [mask, ~mask.any(dim=1, keepdim=True)]
        mixed = self.dropout(torch.cat(sequence, dim=1))  # (posts, 1 + Σ(n + 1), width)
        seen = torch.cat(there, dim=1)
        for block in self.blocks:
            mixed = block(mixed, seen)
        return Fused(self.classify(self.dropout(self.norm(mixed[:, 0]))), alone)
