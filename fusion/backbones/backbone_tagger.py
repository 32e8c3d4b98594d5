"""A picture model that tags posts by their pictures, or by segments of their clips (TSN)."""

from __future__ import annotations

import torch
from torch import nn

from fusion.backbones.media import STREAM, best_of_post
from fusion.backbones.model import Normalize
from fusion.data.collate import Batch


class MediaTagger(nn.Module):
    """Backbone ─► dropout ─► classifier ─► mean over segments ─► best of the post's media.

    A picture is a clip of one segment. The labels belong to posts, so a post's score is that of
    its best medium (multiple-instance learning).

    Source: TSN (arXiv 1608.00859), segments with an averaging consensus.
    """

    def __init__(self, backbone: nn.Module, size: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.normalize = Normalize(backbone, "picture")
        self.dim = _feature_dim(backbone, size)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(self.dim, classes)

    def start_at(self, frequencies: torch.Tensor) -> None:
        """Let the untrained classifier predict each class's frequency ``(classes,)``."""
        nn.init.normal_(self.classify.weight, std=0.01)
        with torch.no_grad():
            self.classify.bias.copy_(torch.logit(frequencies.clamp(1e-3, 1 - 1e-3)))

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits float32 ``(posts, classes)`` of uint8 ``(posts, n, segments, S, S, 3)``."""
        mask = batch.masks[STREAM]  # (posts, n)
        media = batch.tokens[STREAM][mask]  # (media, segments, S, S, 3)
        count, segments = media.shape[:2]
        flat = media.flatten(0, 1).permute(0, 3, 1, 2)  # (media·segments, 3, S, S)
        pixels = self.normalize(flat.float()).contiguous(memory_format=torch.channels_last)
        scores = self.classify(self.dropout(self.backbone(pixels)))
        # (media·segments, classes) -> (media, segments, classes) -> (media, classes)
        consensus = scores.float().view(count, segments, -1).mean(dim=1)
        return best_of_post(consensus, mask, self.classify.bias)


def _feature_dim(backbone: nn.Module, size: int) -> int:
    training = backbone.training
    backbone.eval()
    with torch.no_grad():
        found = backbone(torch.zeros(1, 3, size, size))
    backbone.train(training)
    return int(found.shape[1])
