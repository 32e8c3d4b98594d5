"""Concatenation of pooled modalities with a squeeze-and-excitation gate: the baseline."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from config.train import ModelSettings
from extractors.post import Modality
from fusion.models.base import FusionModel, masked_mean
from fusion.schema import InputSchema


class SqueezeExcitation(nn.Module):
    """Gate of a vector by itself: H ─► H/r, BN, ReLU ─► H, sigmoid, multiply.

    Source: linrongc/youtube-8m, nextvlad.py (the SE context gate).
    """

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        narrow = max(1, width // reduction)
        self.squeeze = nn.Linear(width, narrow, bias=False)
        self.norm = nn.BatchNorm1d(narrow)
        self.excite = nn.Linear(narrow, width)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """``(posts, width)`` in and out."""
        gate = torch.relu(self.norm(self.squeeze(vectors)))
        return vectors * torch.sigmoid(self.excite(gate))


class ConcatSE(FusionModel):
    """Mean of each modality's tokens ─► projection ─► concat ─► dropout ─► FC ─► SE ─► logits.

    Source: the TAAC-2021 multimodal tagging baseline, with mean pooling.
    """

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__(schema, settings.modality_dropout)
        options = settings.concat_se
        width = options.modality_width
        self.norms = nn.ModuleDict({m: nn.LayerNorm(d) for m, d in schema.dims.items()})
        self.projections = nn.ModuleDict({m: nn.Linear(d, width) for m, d in schema.dims.items()})
        self.missing = nn.ParameterDict(
            {m: nn.Parameter(torch.randn(width) * 0.02) for m in schema.dims}
        )
        self.dropout = nn.Dropout(options.dropout)
        self.join = nn.Linear(width * len(schema.dims), options.width)
        self.gate = SqueezeExcitation(options.width, options.reduction)
        self.classify = nn.Linear(options.width, schema.classes)

    @property
    def head(self) -> nn.Linear:
        """The last layer."""
        return self.classify

    def fuse(
        self, tokens: Mapping[Modality, torch.Tensor], masks: Mapping[Modality, torch.Tensor]
    ) -> torch.Tensor:
        """Logits ``(posts, classes)``."""
        vectors = []
        for modality in self.modalities:
            mask = masks[modality]
            normed = self.norms[modality](tokens[modality])  # (posts, n, dim)
            pooled = masked_mean(normed.masked_fill(~mask[:, :, None], 0.0), mask)
            projected = self.projections[modality](pooled)  # (posts, modality_width)
            there = mask.any(dim=1, keepdim=True)
            vectors.append(torch.where(there, projected, self.missing[modality]))
        joined = self.join(self.dropout(torch.cat(vectors, dim=1)))  # (posts, width)
        logits: torch.Tensor = self.classify(self.gate(joined))
        return logits
