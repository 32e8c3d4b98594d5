"""From the tokens of one stream to one vector."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from common.post import Stream
from config.fusion_models import NextVladSettings
from fusion.data.schema import InputSchema
from fusion.models.base import learned_vectors, masked_mean


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
        pooled = masked_mean(self.norms[stream](tokens), mask)  # (posts, dim)
        projected = self.projections[stream](pooled)  # (posts, width)
        return torch.where(mask.any(dim=1, keepdim=True), projected, self.missing[stream])


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation that learns from the rows that are there, and from no padding.

    With fewer than two such rows it takes what it has learned so far: one row has no variance.
    """

    def forward(self, rows: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise ``(..., channels)``; ``mask`` bool ``(...)`` says which rows are there."""
        flat = rows.flatten(0, -2)  # (rows, channels)
        if not self.training:
            return self._learned(flat).view(rows.shape)
        chosen = flat if mask is None else flat[mask.flatten()]  # (rows that are there, channels)
        if len(chosen) < 2:
            return self._learned(flat).view(rows.shape)
        normed = super().forward(chosen)
        if mask is None:
            return normed.view(rows.shape)
        # (rows that are there, channels) -> (rows, channels): the others become zeros.
        spread = torch.zeros_like(flat, dtype=normed.dtype)
        return spread.masked_scatter(mask.flatten()[:, None], normed).view(rows.shape)

    def _learned(self, flat: torch.Tensor) -> torch.Tensor:
        return functional.batch_norm(
            flat, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class NeXtVLAD(nn.Module):
    """Tokens of one stream -> their differences from learned clusters, in groups.

    FC N -> λN; attention sigmoid(FC λN -> G); assignment softmax over K of BN(linear λN -> G·K),
    times attention; sum of weight · (x - centre) over tokens and groups; L2 per cluster; BN.
    λN is rounded up to a multiple of G.

    Source: arXiv 1811.05014, section 3; linrongc/youtube-8m, nextvlad.py.
    """

    def __init__(self, dim: int, settings: NextVladSettings, *, share: int = 1) -> None:
        """Make one for tokens of length ``dim``, with clusters and groups divided by ``share``."""
        super().__init__()
        self.clusters = max(1, settings.clusters // share)
        self.groups = max(1, settings.groups // share)
        self.narrow = -(-settings.expansion * dim // self.groups)  # λN/G, rounded up
        wide = self.narrow * self.groups
        self.width = self.clusters * self.narrow
        self.expand = nn.Linear(dim, wide)
        self.attend = nn.Linear(wide, self.groups)
        self.assign = nn.Linear(wide, self.groups * self.clusters, bias=False)
        self.norm_assign = MaskedBatchNorm(self.groups * self.clusters)
        self.centres = nn.Parameter(torch.randn(self.clusters, self.narrow) * self.narrow**-0.5)
        self.norm = MaskedBatchNorm(self.width)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map ``(posts, n, dim)`` and bool ``(posts, n)`` to ``(posts, clusters · λN/G)``.

        Posts without tokens get something that means nothing.
        """
        posts, count, _ = tokens.shape
        wide = self.expand(tokens)  # (posts, n, λN)
        attention = torch.sigmoid(self.attend(wide)) * mask[:, :, None]  # (posts, n, G)
        assigned = self.norm_assign(self.assign(wide), mask)  # (posts, n, G·K)
        # (posts, n, G·K) -> (posts, n, G, K)
        assigned = assigned.view(posts, count, self.groups, self.clusters).softmax(dim=3)
        # (posts, n·G, K): a group of a token is a row.
        weights = (assigned * attention[..., None]).flatten(1, 2)
        rows = wide.view(posts, count * self.groups, self.narrow)  # (posts, n·G, λN/G)
        summed = weights.transpose(1, 2) @ rows  # (posts, K, λN/G)
        residual = summed - weights.sum(dim=1)[:, :, None] * self.centres
        vector = functional.normalize(residual, dim=2).flatten(1)  # (posts, K·λN/G)
        normed: torch.Tensor = self.norm(vector, mask.any(dim=1))
        return normed
