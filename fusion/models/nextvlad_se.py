"""NeXtVLAD of every stream with a squeeze-and-excitation gate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from common.post import Stream
from config.fusion_models import ModelSettings
from fusion.data.schema import InputSchema
from fusion.models.base import Fused, FusionModel, Stage, masked_mean
from fusion.models.blocks import SqueezeExcitation
from fusion.models.pooling import NeXtVLAD

_WHOLE: frozenset[Stream] = frozenset({"video_lstm"})
"""One vector says it all: there is nothing to cluster."""


class NeXtVLADSE(FusionModel):
    """LayerNorm -> NeXtVLAD of each stream -> concat -> dropout -> FC, BN -> SE -> logits.

    Source: arXiv 1811.05014; linrongc/youtube-8m, nextvlad.py. There the features are whitened
    and need no LayerNorm, and the classifier is a mixture of experts.
    """

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__(schema, settings)
        options = settings.nextvlad_se
        self.norms = nn.ModuleDict({m: nn.LayerNorm(d) for m, d in schema.dims.items()})
        vlads: dict[str, NeXtVLAD] = {
            m: NeXtVLAD(d, options.nextvlad, share=2 if m == "audio" else 1)
            for m, d in schema.dims.items()
            if m not in _WHOLE
        }
        widths = {m: vlads[m].width if m in vlads else d for m, d in schema.dims.items()}
        self.vlads = nn.ModuleDict(vlads)
        self.missing = nn.ParameterDict(
            {m: nn.Parameter(torch.randn(w) * 0.02) for m, w in widths.items()}
        )
        self.dropout = nn.Dropout(options.dropout)
        joined = sum(widths.values())
        self.join = nn.Linear(joined, options.width, bias=False)  # BN has the bias
        self.norm = nn.BatchNorm1d(options.width)
        self.gate = SqueezeExcitation(options.width, options.reduction)
        self.classify = nn.Linear(options.width, schema.classes)
        self._add_own_heads(widths)

    @property
    def head(self) -> nn.Linear:
        return self.classify

    def layers(self) -> tuple[Stage, ...]:
        """Return the stages: the modalities' own layers, the fusion, the head."""
        return (
            Stage("modality", ("norms", "vlads", "missing")),
            Stage("fusion", ("join", "norm", "gate")),
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
            vector = self.vlads[stream](normed, mask) if clustered else masked_mean(normed, mask)
            there = mask.any(dim=1, keepdim=True)
            alone[stream] = torch.where(there, vector, self.missing[stream])
        vectors = torch.cat([alone[m] for m in self.streams], dim=1)  # (posts, Σ K·λN/G)
        joined = self.norm(self.join(self.dropout(vectors)))  # (posts, width)
        return Fused(self.classify(self.gate(joined)), alone)
