"""Transformers over all streams: one sequence of tokens, queries to it, or bottlenecks between."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from common.errors import ConfigError
from common.post import Stream
from config.fusion_models import ModelSettings
from fusion.models.base import (
    ORDERED,
    Fused,
    FusionModel,
    GroupLinear,
    InputSchema,
    Stage,
    learned_vectors,
    masked_mean,
)

_CHANGING: frozenset[Stream] = frozenset({"video", "audio"})


def positions(count: int, width: int) -> torch.Tensor:
    """Return sinusoidal position embeddings float32 ``(count, width)``.

    Source: "Attention is all you need", arXiv 1706.03762, section 3.5.
    """
    place = torch.arange(count, dtype=torch.float32)[:, None]
    half = (width + 1) // 2
    rate = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10_000.0) / half))
    angles = place * rate  # (count, half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def refuse_uneven(width: int, heads: int, key: str) -> None:
    """Refuse attention heads that do not divide the width of the section ``key``."""
    if width % heads:
        raise ConfigError(f"{key}.width: {width} is not a multiple of heads {heads}")


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


class OneSequence(FusionModel):
    """The base of models over one sequence: the tokens of every stream, or its "missing" token."""

    takes_none = True

    def __init__(
        self, schema: InputSchema, settings: ModelSettings, width: int, *, motion: bool
    ) -> None:
        super().__init__(schema, settings)
        self.projections = projections(schema, width, motion=motion)
        self.kinds = learned_vectors(schema, width)
        self.missing = learned_vectors(schema, width)
        self.scales = position_scales(schema)
        self.places: torch.Tensor
        self.register_buffer(
            "places", positions(max(schema.tokens.values()), width), persistent=False
        )

    def sequence(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[Stream, torch.Tensor]]:
        """Return tokens ``(posts, Σ(n + 1), width)``, their mask, and `Fused.alone`."""
        rows, seen = [], []
        alone: dict[Stream, torch.Tensor] = {}
        for stream in self.streams:
            mask = masks[stream]
            stand_in = self.missing[stream].expand(mask.shape[0], 1, -1)
            projected = stand_in[:, :0]
            if mask.shape[1]:
                projected = self.projections[stream](tokens[stream])  # (posts, n, width)
            if self.has_own_heads:
                alone[stream] = masked_mean(projected, mask)
            if stream in self.scales:
                places = self.places[: projected.shape[1]]
                projected = projected + self.scales[stream] * places
            rows.append(torch.cat([projected, stand_in], dim=1) + self.kinds[stream])
            # The stand-in is seen exactly where nothing else of the modality is.
            seen += [mask, ~mask.any(dim=1, keepdim=True)]
        return torch.cat(rows, dim=1), torch.cat(seen, dim=1), alone


class TokenTransformer(OneSequence):
    """[CLS] and the tokens of every stream, or its learned "missing" token, in one sequence."""

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        options = settings.token_transformer
        width = options.width
        refuse_uneven(width, options.heads, "model.token_transformer")
        super().__init__(schema, settings, width, motion=options.motion)
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(
            Block(width, options.heads, options.dropout) for _ in range(options.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, schema.classes)
        self._add_own_heads(dict.fromkeys(schema.dims, width))

    def layers(self) -> tuple[Stage, ...]:
        blocks = (Stage("fusion", (f"blocks.{i}",)) for i in range(len(self.blocks)))
        first = Stage("modality", ("projections", "kinds", "missing", "scales", "start"))
        return (first, *blocks, Stage("head", ("norm", "classify")))

    def fuse(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> Fused:
        rows, seen, alone = self.sequence(tokens, masks)
        start = self.start.expand(rows.shape[0], 1, -1)
        mixed = self.dropout(torch.cat([start, rows], dim=1))  # (posts, 1 + Σ(n + 1), width)
        seen = torch.cat([torch.ones_like(seen[:, :1]), seen], dim=1)
        for block in self.blocks:
            mixed = block(mixed, seen)
        return Fused(self.classify(self.dropout(self.norm(mixed[:, 0]))), alone)


class MLDecoder(OneSequence):
    """One decoder layer without self-attention: queries -> attention to the tokens -> classes.

    The queries are fixed random vectors; what tells them apart is learned in the layers behind
    them. Each answers for the same number of classes, in the order of the label map.

    Source: arXiv 2111.12933, sections 3.2 and 3.3.
    """

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        options = settings.ml_decoder
        width, self.heads, self.rate = options.width, options.heads, options.dropout
        refuse_uneven(width, self.heads, "model.ml_decoder")
        super().__init__(schema, settings, width, motion=options.motion)
        queries = min(options.queries, schema.classes)
        self.queries: torch.Tensor
        self.register_buffer("queries", torch.randn(queries, width))
        self.norm_tokens = nn.LayerNorm(width)
        self.norm_queries = nn.LayerNorm(width)
        self.ask = nn.Linear(width, width)
        self.answer = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm_attention = nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, options.feed_forward),
            nn.ReLU(),
            nn.Dropout(options.dropout),
            nn.Linear(options.feed_forward, width),
        )
        self.norm_feed = nn.LayerNorm(width)
        self.dropout = nn.Dropout(options.dropout)
        self.classify = GroupLinear(width, schema.classes, queries)
        self._add_own_heads(dict.fromkeys(schema.dims, width))

    def layers(self) -> tuple[Stage, ...]:
        """Return projections, the decoder layer, the head."""
        decoder = ("norm_tokens", "norm_queries", "ask", "answer", "out", "norm_attention")
        return (
            Stage("modality", ("projections", "kinds", "missing", "scales")),
            Stage("fusion", (*decoder, "feed", "norm_feed")),
            Stage("head", ("classify",)),
        )

    def fuse(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> Fused:
        rows, seen, alone = self.sequence(tokens, masks)
        rows = self.norm_tokens(rows)
        asking = self.queries.expand(rows.shape[0], -1, -1)  # (posts, queries, width)
        asking = self.norm_queries(asking + self.dropout(asking))
        asking = self.norm_attention(asking + self.dropout(self._attend(asking, rows, seen)))
        asking = self.norm_feed(asking + self.dropout(self.feed(asking)))
        return Fused(self.classify(asking), alone)

    def _attend(self, asking: torch.Tensor, rows: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        query = self.ask(asking).unflatten(2, (self.heads, -1)).transpose(1, 2)
        # (posts, n, 2 * width) -> 2 of (posts, heads, n, width/heads)
        both = self.answer(rows).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            query,
            both[0],
            both[1],
            attn_mask=seen[:, None, None, :],
            dropout_p=self.rate if self.training else 0.0,
        )
        joined: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return joined


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

    def layers(self) -> tuple[Stage, ...]:
        first = Stage("modality", ("projections", "starts", "missing", "scales"))
        blocks: list[Stage] = []
        for i in range(len(self.blocks)):
            shared = i >= self.first_shared
            names = (f"blocks.{i}", "bottlenecks") if i == self.first_shared else (f"blocks.{i}",)
            blocks.append(Stage("fusion" if shared else "modality", names))
        return (first, *blocks, Stage("head", ("norms", "classify")))

    def undecayed(self) -> frozenset[str]:
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
        present = torch.stack([masks[m].any(dim=1) for m in self.streams], dim=1)
        weights = (present | ~present.any(dim=1, keepdim=True)).float()  # (posts, modalities)
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
            present = mask.any(dim=1, keepdim=True)
            seen[stream] = torch.cat([torch.ones_like(present), mask, ~present], dim=1)
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
        exchanged: dict[Stream, torch.Tensor] = {}
        updates: list[torch.Tensor] = []
        for stream, block in _of_streams(layer):
            both = torch.cat([shared, streams[stream]], dim=1)
            mixed = block(both, torch.cat([always, seen[stream]], dim=1))
            updates.append(mixed[:, :count])
            exchanged[stream] = mixed[:, count:]
        return exchanged, torch.stack(updates).mean(dim=0)


def _of_streams(layer: nn.Module) -> list[tuple[Stream, nn.Module]]:
    """Return the blocks of one layer, by stream."""
    if not isinstance(layer, nn.ModuleDict):
        raise TypeError("a layer holds a block for each stream")
    return [(cast(Stream, stream), block) for stream, block in layer.items()]
