"""Tokens of all modalities in one small transformer: the default fusion."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from config.errors import ConfigError
from config.train import ModelSettings
from extractors.post import Modality
from fusion.models.base import FusionModel
from fusion.schema import ORDERED, InputSchema

_CHANGING: frozenset[Modality] = frozenset({"video", "audio"})


def positions(count: int, width: int) -> torch.Tensor:
    """Sinusoidal position embeddings float32 ``(count, width)``.

    Source: "Attention is all you need", arXiv 1706.03762, section 3.5.
    """
    place = torch.arange(count, dtype=torch.float32)[:, None]
    half = (width + 1) // 2
    rate = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10_000.0) / half))
    angles = place * rate  # (count, half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


class Projection(nn.Module):
    """Features of one modality ─► tokens of the transformer's width.

    With ``motion`` a token also carries its change from the one before: how something moves is
    visible only there, and attention finds it in few examples only when it is handed over.
    """

    def __init__(self, dim: int, width: int, *, motion: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, width)
        self.change = nn.Linear(dim, width, bias=False) if motion else None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``(posts, n, dim)`` to ``(posts, n, width)``."""
        normed = self.norm(tokens)
        projected: torch.Tensor = self.project(normed)
        if self.change is None or not tokens.shape[1]:
            return projected
        step = torch.diff(normed, dim=1, prepend=normed[:, :1])  # (posts, n, dim), first is zero
        changed: torch.Tensor = self.change(step)
        return projected + changed


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_feed = nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mix tokens ``(posts, n, width)``; ``mask`` bool ``(posts, n)`` says which are there."""
        posts, count, width = tokens.shape
        parts = self.qkv(self.norm_attention(tokens))  # (posts, n, 3·width)
        shaped = parts.view(posts, count, 3, self.heads, width // self.heads)
        query, key, value = shaped.permute(2, 0, 3, 1, 4)  # each (posts, heads, n, width/heads)
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask[:, None, None, :],
            dropout_p=self.rate if self.training else 0.0,
        )
        joined = mixed.transpose(1, 2).reshape(posts, count, width)
        tokens = tokens + self.dropout(self.out(joined))
        fed: torch.Tensor = self.dropout(self.feed(self.norm_feed(tokens)))
        return tokens + fed


class TokenTransformer(FusionModel):
    """[CLS] and the tokens of every modality, or its learned "missing" token, in one sequence."""

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__(schema, settings.modality_dropout)
        options = settings.token_transformer
        width = options.width
        if width % options.heads:
            raise ConfigError(
                f"model.token_transformer.width: {width} is no multiple of heads {options.heads}"
            )
        self.projections = nn.ModuleDict(
            {
                m: Projection(d, width, motion=options.motion and m in _CHANGING)
                for m, d in schema.dims.items()
            }
        )
        self.kinds = nn.ParameterDict(
            {m: nn.Parameter(torch.randn(width) * 0.02) for m in schema.dims}
        )
        self.missing = nn.ParameterDict(
            {m: nn.Parameter(torch.randn(width) * 0.02) for m in schema.dims}
        )
        self.scales = nn.ParameterDict(
            {m: nn.Parameter(torch.tensor(0.2)) for m in schema.dims if m in ORDERED}
        )
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

    @property
    def head(self) -> nn.Linear:
        """The last layer."""
        return self.classify

    def fuse(
        self, tokens: Mapping[Modality, torch.Tensor], masks: Mapping[Modality, torch.Tensor]
    ) -> torch.Tensor:
        """Logits ``(posts, classes)``."""
        first = tokens[self.modalities[0]]
        posts = first.shape[0]
        sequence = [self.start.expand(posts, 1, -1)]
        there = [torch.ones(posts, 1, dtype=torch.bool, device=first.device)]
        for modality in self.modalities:
            mask = masks[modality]
            projected = self.projections[modality](tokens[modality])  # (posts, n, width)
            if modality in self.scales:
                places = self.places[: projected.shape[1]]
                projected = projected + self.scales[modality] * places
            stand_in = self.missing[modality].expand(posts, 1, -1)
            sequence.append(torch.cat([projected, stand_in], dim=1) + self.kinds[modality])
            # The stand-in is seen exactly where nothing else of the modality is.
            there += [mask, ~mask.any(dim=1, keepdim=True)]
        mixed = self.dropout(torch.cat(sequence, dim=1))  # (posts, 1 + Σ(n + 1), width)
        seen = torch.cat(there, dim=1)
        for block in self.blocks:
            mixed = block(mixed, seen)
        logits: torch.Tensor = self.classify(self.dropout(self.norm(mixed[:, 0])))
        return logits
