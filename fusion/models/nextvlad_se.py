"""NeXtVLAD of every modality with a squeeze-and-excitation gate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from config.train import ModelSettings
from extractors.post import Modality
from fusion.models.base import Fused, FusionModel, Stage
from fusion.models.gate import SqueezeExcitation
from fusion.models.pooling import NeXtVLAD
from fusion.schema import InputSchema


class NeXtVLADSE(FusionModel):
    """LayerNorm ─► NeXtVLAD of each modality ─► concat ─► dropout ─► FC, BN ─► SE ─► logits.

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
        }
        self.vlads = nn.ModuleDict(vlads)
        self.missing = nn.ParameterDict(
            {m: nn.Parameter(torch.randn(v.width) * 0.02) for m, v in vlads.items()}
        )
        self.dropout = nn.Dropout(options.dropout)
        joined = sum(v.width for v in vlads.values())
        self.join = nn.Linear(joined, options.width, bias=False)  # BN has the bias
        self.norm = nn.BatchNorm1d(options.width)
        self.gate = SqueezeExcitation(options.width, options.reduction)
        self.classify = nn.Linear(options.width, schema.classes)
        self._add_own_heads({m: vlads[m].width for m in schema.dims})

    @property
    def head(self) -> nn.Linear:
        """The last layer."""
        return self.classify

    def layers(self) -> tuple[Stage, ...]:
        """What each modality has, what joins them, the head."""
        return (
            Stage("modality", ("norms", "vlads", "missing")),
            Stage("fusion", ("join", "norm", "gate")),
            Stage("head", ("classify",)),
        )

    def fuse(
        self, tokens: Mapping[Modality, torch.Tensor], masks: Mapping[Modality, torch.Tensor]
    ) -> Fused:
        """Logits ``(posts, classes)``."""
        alone: dict[Modality, torch.Tensor] = {}
        for modality in self.modalities:
            mask = masks[modality]
            vector = self.vlads[modality](self.norms[modality](tokens[modality]), mask)
            there = mask.any(dim=1, keepdim=True)
            alone[modality] = torch.where(there, vector, self.missing[modality])
        vectors = torch.cat([alone[m] for m in self.modalities], dim=1)  # (posts, Σ K·λN/G)
        joined = self.norm(self.join(self.dropout(vectors)))  # (posts, width)
        return Fused(self.classify(self.gate(joined)), alone)
