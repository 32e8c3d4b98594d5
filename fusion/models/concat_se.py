"""Concatenation of pooled modalities with a squeeze-and-excitation gate: the baseline."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from common.post import Stream
from config.fusion_models import ModelSettings
from fusion.data.schema import InputSchema
from fusion.models.base import Fused, FusionModel, Stage, learned_vectors, masked_mean
from fusion.models.blocks import SqueezeExcitation
from fusion.models.pooling import NeXtVLAD

_CLUSTERED: frozenset[Stream] = frozenset({"video", "audio"})


class ConcatSE(FusionModel):
    """One vector of each stream -> projection -> concat -> dropout -> FC -> SE -> logits.

    Source: the TAAC-2021 multimodal tagging baseline, whose pooling of video and sound is NeXtVLAD.
    """

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__(schema, settings)
        options = settings.concat_se
        width = options.modality_width
        self.norms = nn.ModuleDict({m: nn.LayerNorm(d) for m, d in schema.dims.items()})
        clustered = _CLUSTERED & set(schema.dims) if options.pooling == "nextvlad" else set()
        vlads: dict[str, NeXtVLAD] = {
            m: NeXtVLAD(d, options.nextvlad, share=2 if m == "audio" else 1)
            for m, d in schema.dims.items()
            if m in clustered
        }
        widths = {m: vlads[m].width if m in vlads else d for m, d in schema.dims.items()}
        self.vlads = nn.ModuleDict(vlads)
        self.projections = nn.ModuleDict({m: nn.Linear(w, width) for m, w in widths.items()})
        self.missing = learned_vectors(schema, width)
        self.dropout = nn.Dropout(options.dropout)
        self.join = nn.Linear(width * len(schema.dims), options.width)
        self.gate = SqueezeExcitation(options.width, options.reduction)
        self.classify = nn.Linear(options.width, schema.classes)
        self._add_own_heads(dict.fromkeys(schema.dims, width))

    @property
    def head(self) -> nn.Linear:
        return self.classify

    def layers(self) -> tuple[Stage, ...]:
        """Return the stages: the modalities' own layers, the fusion, the head."""
        return (
            Stage("modality", ("norms", "vlads", "projections", "missing")),
            Stage("fusion", ("join", "gate")),
            Stage("head", ("classify",)),
        )

    def fuse(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> Fused:
        alone: dict[Stream, torch.Tensor] = {}
        for stream in self.streams:
            mask = masks[stream]
            normed = self.norms[stream](tokens[stream])  # (posts, n, dim)
            clustered = stream in self.vlads
            pooled = self.vlads[stream](normed, mask) if clustered else masked_mean(normed, mask)
            projected = self.projections[stream](pooled)  # (posts, modality_width)
            there = mask.any(dim=1, keepdim=True)
            alone[stream] = torch.where(there, projected, self.missing[stream])
        vectors = torch.cat([alone[m] for m in self.streams], dim=1)
        joined = self.join(self.dropout(vectors))  # (posts, width)
        return Fused(self.classify(self.gate(joined)), alone)
