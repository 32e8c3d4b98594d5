"""The squeeze-and-excitation gate."""

from __future__ import annotations

import torch
from torch import nn


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
