"""Multimodal bottleneck transformer: modalities meet in a few shared tokens only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from common.post import Stream
from config.fusion_models import ModelSettings
from fusion.data.schema import InputSchema
from fusion.models.base import Fused, FusionModel, Stage, learned_vectors
from fusion.models.blocks import Block, position_scales, positions, projections, refuse_uneven


class MBT(FusionModel):
    """A transformer for each stream; in the last layers they share bottleneck tokens.

    In such a layer each modality attends to itself and to the bottleneck tokens, and the updates
    of these are averaged over the modalities. The logits are the mean of what the [CLS] tokens of
    the modalities that are there say. A missing modality is its learned token: it updates the
    bottleneck, so that the others know, and says nothing itself, except in a post that has nothing.

    Source: arXiv 2107.00135, section 3.
    """

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__(schema, settings)
        options = settings.mbt
        width, last = options.width, max(1, options.layers - 1)
        refuse_uneven(width, options.heads, "model.mbt")
        self.first_shared = options.layers - options.fusion_layers
        self.projections = projections(schema, width, motion=options.motion)
        self.starts = learned_vectors(schema, width)
        self.missing = learned_vectors(schema, width)
        self.scales = position_scales(schema)
        self.bottlenecks = nn.Parameter(torch.randn(options.bottlenecks, width) * 0.02)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    m: Block(
                        width,
                        options.heads,
                        options.dropout,
                        skip=options.stochastic_depth * i / last,
                    )
                    for m in schema.dims
                }
            )
            for i in range(options.layers)
        )
        self.norms = nn.ModuleDict({m: nn.LayerNorm(width) for m in schema.dims})
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
        """Return projections, the layers one by one, the head."""
        first = Stage("modality", ("projections", "starts", "missing", "scales"))
        blocks: list[Stage] = []
        for i in range(len(self.blocks)):
            shared = i >= self.first_shared
            names = (f"blocks.{i}", "bottlenecks") if i == self.first_shared else (f"blocks.{i}",)
            blocks.append(Stage("fusion" if shared else "modality", names))
        return (first, *blocks, Stage("head", ("norms", "classify")))

    def undecayed(self) -> frozenset[str]:
        """Return the names of the bottleneck tokens, which are vectors."""
        return frozenset({"bottlenecks"})

    def fuse(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> Fused:
        streams, seen = self._embed(tokens, masks)
        for layer in self.blocks[: self.first_shared]:
            streams = {m: block(streams[m], seen[m]) for m, block in _of_streams(layer)}
        alone = {m: stream[:, 0] for m, stream in streams.items()}
        posts = next(iter(streams.values())).shape[0]
        shared = self.bottlenecks.expand(posts, -1, -1)  # (posts, bottlenecks, width)
        for layer in self.blocks[self.first_shared :]:
            streams, shared = self._exchange(layer, streams, seen, shared)
        there = torch.stack([masks[m].any(dim=1) for m in self.streams], dim=1)
        weights = (there | ~there.any(dim=1, keepdim=True)).float()  # (posts, modalities)
        weights = weights / weights.sum(dim=1, keepdim=True)
        said = [self.classify(self.dropout(self.norms[m](streams[m][:, 0]))) for m in streams]
        logits = (torch.stack(said, dim=1) * weights[:, :, None]).sum(dim=1)
        return Fused(logits, alone)

    def _embed(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> tuple[dict[Stream, torch.Tensor], dict[Stream, torch.Tensor]]:
        """Return [CLS], tokens and stand-in ``(posts, 1 + n + 1, width)``, and their mask."""
        streams: dict[Stream, torch.Tensor] = {}
        seen: dict[Stream, torch.Tensor] = {}
        for stream in self.streams:
            mask = masks[stream]
            projected = self.projections[stream](tokens[stream])  # (posts, n, width)
            if stream in self.scales:
                places = self.places[: projected.shape[1]]
                projected = projected + self.scales[stream] * places
            start = self.starts[stream].expand(mask.shape[0], 1, -1)
            stand_in = self.missing[stream].expand(mask.shape[0], 1, -1)
            streams[stream] = self.dropout(torch.cat([start, projected, stand_in], dim=1))
            there = mask.any(dim=1, keepdim=True)
            seen[stream] = torch.cat([torch.ones_like(there), mask, ~there], dim=1)
        return streams, seen

    def _exchange(
        self,
        layer: nn.Module,
        streams: Mapping[Stream, torch.Tensor],
        seen: Mapping[Stream, torch.Tensor],
        shared: torch.Tensor,
    ) -> tuple[dict[Stream, torch.Tensor], torch.Tensor]:
        count = shared.shape[1]
        always = torch.ones(shared.shape[:2], dtype=torch.bool, device=shared.device)
        found: dict[Stream, torch.Tensor] = {}
        updates: list[torch.Tensor] = []
        for stream, block in _of_streams(layer):
            both = torch.cat([shared, streams[stream]], dim=1)
            mixed = block(both, torch.cat([always, seen[stream]], dim=1))
            updates.append(mixed[:, :count])
            found[stream] = mixed[:, count:]
        return found, torch.stack(updates).mean(dim=0)


def _of_streams(layer: nn.Module) -> list[tuple[Stream, nn.Module]]:
    """Return the blocks of one layer, by stream."""
    if not isinstance(layer, nn.ModuleDict):
        raise TypeError("a layer holds a block for each stream")
    return [(cast(Stream, stream), block) for stream, block in layer.items()]
