"""A bidirectional LSTM with attention for each stream."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from common.post import Stream
from config.fusion_models import AttentionLstmSettings, ModelSettings
from fusion.models.base import Fused, FusionModel, InputSchema, Stage, learned_vectors, or_missing


class Branch(nn.Module):
    """Tokens of one stream: FC, tanh -> LSTM both ways -> dropout -> sum by softmax attention.

    Source: PaddleVideo, VideoTag's attention LSTM.
    """

    def __init__(self, dim: int, options: AttentionLstmSettings) -> None:
        super().__init__()
        self.width = 2 * options.hidden
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, options.projection)
        # Two of one direction: what goes back begins at each post's own end, not in its padding.
        self.ahead = nn.LSTM(options.projection, options.hidden, batch_first=True)
        self.back = nn.LSTM(options.projection, options.hidden, batch_first=True)
        self.dropout = nn.Dropout(options.dropout)
        self.attend = nn.Linear(self.width, 1)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map ``(posts, n, dim)`` and bool ``(posts, n)`` to ``(posts, 2·hidden)``.

        Posts without tokens get something that means nothing.
        """
        count = tokens.shape[1]
        projected = torch.tanh(self.project(self.norm(tokens)))  # (posts, n, projection)
        lengths = mask.sum(dim=1, keepdim=True)  # (posts, 1)
        place = torch.arange(count, device=mask.device)[None, :]
        # The tokens of a post in reverse, its padding where it was.
        turned = torch.where(place < lengths, lengths - 1 - place, place)[:, :, None]
        ahead, _ = self.ahead(projected)  # (posts, n, hidden)
        back, _ = self.back(projected.gather(1, turned.expand_as(projected)))
        back = back.gather(1, turned.expand_as(back))
        states = self.dropout(torch.cat([ahead, back], dim=2))  # (posts, n, 2·hidden)
        weights = self.attend(states)[:, :, 0].float().masked_fill(~mask, float("-inf"))
        # All -inf for a post without tokens: its softmax would be NaN.
        weights = weights.masked_fill(lengths == 0, 0.0).softmax(dim=1)
        summed: torch.Tensor = (weights[:, :, None] * states).sum(dim=1)
        return summed


class AttentionLSTM(FusionModel):
    """A `Branch` for each stream -> concat -> FC, ReLU -> FC, tanh -> logits."""

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__(schema, settings)
        options = settings.attention_lstm
        width = 2 * options.hidden
        self.branches = nn.ModuleDict({m: Branch(d, options) for m, d in schema.dims.items()})
        self.missing = learned_vectors(schema, width)
        self.join = nn.Linear(width * len(schema.dims), options.join)
        self.narrow = nn.Linear(options.join, options.width)
        self.classify = nn.Linear(options.width, schema.classes)
        self._add_own_heads(dict.fromkeys(schema.dims, width))

    def layers(self) -> tuple[Stage, ...]:
        return (
            Stage("modality", ("branches", "missing")),
            Stage("fusion", ("join",)),
            Stage("fusion", ("narrow",)),
            Stage("head", ("classify",)),
        )

    def fuse(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> Fused:
        alone = {
            m: or_missing(self.branches[m](tokens[m], masks[m]), masks[m], self.missing[m])
            for m in self.streams
        }
        vectors = torch.cat(list(alone.values()), dim=1)
        vector = torch.tanh(self.narrow(torch.relu(self.join(vectors))))  # (posts, width)
        return Fused(self.classify(vector), alone)
