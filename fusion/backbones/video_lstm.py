"""The attention LSTM of scheme 2 as it is trained: features of frames ─► a vector, and tags.

`extractors.models.video_lstm` runs the same layers, under the same names, without dropout and tags.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from common.files import write_whole
from config.features import LstmSizes
from fusion.backbones.media import STREAM, best_of_post
from fusion.data.collate import Batch


class AttentionLstm(nn.Module):
    """FC, tanh ─► LSTM both ways ─► dropout ─► softmax attention, summed ─► FC, ReLU ─► FC, tanh.

    Source: PaddleVideo, VideoTag's attention LSTM.
    """

    def __init__(self, dim: int, sizes: LstmSizes) -> None:
        super().__init__()
        self.project = nn.Linear(dim, sizes.projection)
        self.lstm = nn.LSTM(sizes.projection, sizes.hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(sizes.dropout)
        self.attend = nn.Linear(2 * sizes.hidden, 1)
        self.join = nn.Linear(2 * sizes.hidden, sizes.join)
        self.narrow = nn.Linear(sizes.join, sizes.width)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """``(videos, n, dim)``, n at least 1, to ``(videos, width)``."""
        states, _ = self.lstm(torch.tanh(self.project(frames)))  # (videos, n, 2·hidden)
        states = self.dropout(states)
        weights = self.attend(states).float().softmax(dim=1)  # (videos, n, 1)
        summed = (weights * states).sum(dim=1)  # (videos, 2·hidden)
        vector: torch.Tensor = torch.tanh(self.narrow(torch.relu(self.join(summed))))
        return vector


class LstmTagger(nn.Module):
    """Features of the frames of posts' videos ─► logits of the posts."""

    def __init__(self, dim: int, sizes: LstmSizes, classes: int) -> None:
        super().__init__()
        self.lstm = AttentionLstm(dim, sizes)
        self.classify = nn.Linear(sizes.width, classes)

    def start_at(self, frequencies: torch.Tensor) -> None:
        """Let the untrained classifier predict each class's frequency ``(classes,)``."""
        nn.init.normal_(self.classify.weight, std=0.01)
        with torch.no_grad():
            self.classify.bias.copy_(torch.logit(frequencies.clamp(1e-3, 1 - 1e-3)))

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits float32 ``(posts, classes)`` from tokens ``(posts, videos, n, dim)``."""
        mask = batch.masks[STREAM]  # (posts, videos)
        scores = self.classify(self.lstm(batch.tokens[STREAM][mask].float()))
        return best_of_post(scores.float(), mask, self.classify.bias)


def save_lstm(lstm: AttentionLstm, out: Path, about: dict[str, str]) -> None:
    """Write the state_dict that ``features.video.lstm.weights`` loads, whole or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    from safetensors.torch import save

    state = {k: v.detach().cpu().contiguous() for k, v in lstm.state_dict().items()}
    # One key: safetensors writes several in random order.
    write_whole(out, save(state, metadata={"lstm": json.dumps(about, sort_keys=True)}))
