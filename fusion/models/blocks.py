"""Parts of the models: positions, projection of features to tokens, the block, and the gate."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from common.errors import ConfigError
from common.post import Stream
from fusion.data.schema import ORDERED, InputSchema

_CHANGING: frozenset[Stream] = frozenset({"video", "audio"})


def positions(count: int, width: int) -> torch.Tensor:
    """Sinusoidal position embeddings float32 ``(count, width)``.

    Source: "Attention is all you need", arXiv 1706.03762, section 3.5.
    """
    place = torch.arange(count, dtype=torch.float32)[:, None]
    half = (width + 1) // 2
    rate = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10_000.0) / half))
    angles = place * rate  # (count, half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def refuse_uneven(width: int, heads: int, key: str) -> None:
    """See that attention heads divide the width.

    Raises:
        ConfigError: They do not; names the section ``key``.
    """
    if width % heads:
        raise ConfigError(f"{key}.width: {width} is no multiple of heads {heads}")


class Projection(nn.Module):
    """Features of one stream -> tokens of the transformer's width.

    With ``motion`` a token also carries its change from the one before: how something moves is
    visible only there, and attention finds it in few examples only when it is handed over.
    """

    def __init__(self, dim: int, width: int, *, motion: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, width)
        self.change = nn.Linear(dim, width, bias=False) if motion else None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map ``(posts, n, dim)`` to ``(posts, n, width)``."""
        normed = self.norm(tokens)
        projected: torch.Tensor = self.project(normed)
        if self.change is None or not tokens.shape[1]:
            return projected
        step = torch.diff(normed, dim=1, prepend=normed[:, :1])  # (posts, n, dim), first is zero
        changed: torch.Tensor = self.change(step)
        return projected + changed


def projections(schema: InputSchema, width: int, *, motion: bool) -> nn.ModuleDict:
    """Return a `Projection` for each stream; motion only for those that move."""
    return nn.ModuleDict(
        {m: Projection(d, width, motion=motion and m in _CHANGING) for m, d in schema.dims.items()}
    )


def position_scales(schema: InputSchema) -> nn.ParameterDict:
    """Return a learned weight of positions for each stream whose tokens have an order."""
    return nn.ParameterDict(
        {m: nn.Parameter(torch.tensor(0.2)) for m in schema.dims if m in ORDERED}
    )


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward.

    With ``skip`` each of the two is left out for a post with that chance in training.

    Source: stochastic depth, arXiv 1603.09382.
    """

    def __init__(self, width: int, heads: int, dropout: float, *, skip: float = 0.0) -> None:
        super().__init__()
        self.heads, self.rate, self.skip = heads, dropout, skip
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
        # (posts, n, 3·width) -> (posts, n, 3, heads, width/heads)
        shaped = parts.view(posts, count, 3, self.heads, width // self.heads)
        query, key, value = shaped.permute(2, 0, 3, 1, 4)  # each (posts, heads, n, width/heads)
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask[:, None, None, :],
            dropout_p=self.rate if self.training else 0.0,
        )
        # (posts, heads, n, width/heads) -> (posts, n, width)
        joined = mixed.transpose(1, 2).reshape(posts, count, width)
        tokens = tokens + self._sometimes(self.dropout(self.out(joined)))
        return tokens + self._sometimes(self.dropout(self.feed(self.norm_feed(tokens))))

    def _sometimes(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.skip == 0:
            return branch
        stays = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.skip
        return branch * stays / (1 - self.skip)


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
