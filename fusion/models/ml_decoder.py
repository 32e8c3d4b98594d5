"""Queries that look at the tokens of all streams, each for some of the classes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from common.post import Stream
from config.fusion_models import ModelSettings
from fusion.models.base import Fused, GroupLinear, InputSchema, Stage
from fusion.models.transformers import OneSequence, refuse_uneven


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
