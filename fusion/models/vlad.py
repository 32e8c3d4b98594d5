"""NeXtVLAD of streams with a squeeze-and-excitation gate: the baseline, and a wider model."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from torch import nn
from torch.nn import functional

from common.post import Stream
from config.fusion_models import ModelSettings, NextVladSettings
from fusion.models.base import (
    Fused,
    FusionModel,
    InputSchema,
    Stage,
    learned_vectors,
    masked_mean,
    or_missing,
)


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


class SqueezeExcitation(nn.Module):
    """Gate of a vector by itself: H -> H/r, BN, ReLU -> H, sigmoid, multiply.

    Source: linrongc/youtube-8m, nextvlad.py (the SE context gate).
    """

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        narrow = max(1, width // reduction)
        self.squeeze = nn.Linear(width, narrow, bias=False)
        self.norm = nn.BatchNorm1d(narrow)
        self.excite = nn.Linear(narrow, width)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Gate ``(posts, width)``; the shape stays."""
        gate = torch.relu(self.norm(self.squeeze(vectors)))
        return vectors * torch.sigmoid(self.excite(gate))


class _Pooled(FusionModel):
    """The layers that both models begin with: LayerNorm -> NeXtVLAD, or the mean of the tokens."""

    def _add_pooling(
        self, schema: InputSchema, settings: NextVladSettings, clustered: Set[Stream]
    ) -> dict[Stream, int]:
        """Make them, NeXtVLAD for the ``clustered`` streams; return the widths of the vectors."""
        self.norms = nn.ModuleDict({m: nn.LayerNorm(d) for m, d in schema.dims.items()})
        vlads: dict[str, NeXtVLAD] = {
            m: NeXtVLAD(d, settings, share=2 if m == "audio" else 1)
            for m, d in schema.dims.items()
            if m in clustered
        }
        self.vlads = nn.ModuleDict(vlads)
        return {m: vlads[m].width if m in vlads else d for m, d in schema.dims.items()}

    def _pooled(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> dict[Stream, torch.Tensor]:
        """Map ``(posts, n, dim)`` and bool ``(posts, n)`` to ``(posts, width)``, by stream."""
        normed = {m: self.norms[m](tokens[m]) for m in self.streams}  # (posts, n, dim) each
        return {
            m: self.vlads[m](x, masks[m]) if m in self.vlads else masked_mean(x, masks[m])
            for m, x in normed.items()
        }


class ConcatSE(_Pooled):
    """One vector of each stream -> projection -> concat -> dropout -> FC -> SE -> logits.

    Source: the TAAC-2021 multimodal tagging baseline, whose pooling of video and sound is NeXtVLAD.
    """

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__(schema, settings)
        options = settings.concat_se
        width = options.modality_width
        clustered: set[Stream] = {"video", "audio"} if options.pooling == "nextvlad" else set()
        widths = self._add_pooling(schema, options.nextvlad, clustered)
        self.projections = nn.ModuleDict({m: nn.Linear(w, width) for m, w in widths.items()})
        self.missing = learned_vectors(schema, width)
        self.dropout = nn.Dropout(options.dropout)
        self.join = nn.Linear(width * len(schema.dims), options.width)
        self.gate = SqueezeExcitation(options.width, options.reduction)
        self.classify = nn.Linear(options.width, schema.classes)
        self._add_own_heads(dict.fromkeys(schema.dims, width))

    def layers(self) -> tuple[Stage, ...]:
        return (
            Stage("modality", ("norms", "vlads", "projections", "missing")),
            Stage("fusion", ("join", "gate")),
            Stage("head", ("classify",)),
        )

    def fuse(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> Fused:
        pooled = self._pooled(tokens, masks)
        alone = {  # (posts, modality_width) each
            m: or_missing(self.projections[m](vector), masks[m], self.missing[m])
            for m, vector in pooled.items()
        }
        vectors = torch.cat(list(alone.values()), dim=1)
        joined = self.join(self.dropout(vectors))  # (posts, width)
        return Fused(self.classify(self.gate(joined)), alone)


class NeXtVLADSE(_Pooled):
    """LayerNorm -> NeXtVLAD of each stream -> concat -> dropout -> FC, BN -> SE -> logits.

    Source: arXiv 1811.05014; linrongc/youtube-8m, nextvlad.py. There the features are whitened
    and need no LayerNorm, and the classifier is a mixture of experts.
    """

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__(schema, settings)
        options = settings.nextvlad_se
        # One vector says all of a whole video: there is nothing to cluster.
        widths = self._add_pooling(schema, options.nextvlad, set(schema.dims) - {"video_lstm"})
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

    def layers(self) -> tuple[Stage, ...]:
        return (
            Stage("modality", ("norms", "vlads", "missing")),
            Stage("fusion", ("join", "norm", "gate")),
            Stage("head", ("classify",)),
        )

    def fuse(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> Fused:
        pooled = self._pooled(tokens, masks)
        alone = {m: or_missing(v, masks[m], self.missing[m]) for m, v in pooled.items()}
        vectors = torch.cat(list(alone.values()), dim=1)  # (posts, Σ K·λN/G)
        joined = self.norm(self.join(self.dropout(vectors)))  # (posts, width)
        return Fused(self.classify(self.gate(joined)), alone)
