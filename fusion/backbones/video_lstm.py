"""Training of the attention LSTM of scheme 2: features of frames -> tags."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from common.files import write_whole
from config.features import LstmSizes
from extractors.models.video_lstm import AttentionLstm
from fusion.backbones.media import STREAM, best_of_post
from fusion.data.collate import Batch


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
