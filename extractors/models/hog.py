"""Pictures without weights: a histogram of oriented gradients (HOG) and one of colours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, normalize, unfold

from common.errors import ConfigError
from config.features import VisualSettings
from extractors.models.base import PictureEncoder
from extractors.models.weights import Weights

_CELL, _BLOCK, _BINS = 8, 2, 9  # pixels, cells, directions: as published
_CLIP = 0.2  # of one value in a block of norm 1, as published
_LEVELS = 6  # of each channel: 216 colours. With 4 red and orange are one, with 8 few pixels each
_LARGEST = 128  # pixels of a side: 8,100 values; twice as many would be 34,596


class Hog(PictureEncoder):
    """Pictures -> HOG and colours, each of norm 1; ``weights`` do not count.

    Source: Dalal and Triggs, CVPR 2005.
    """

    kind = "hog"

    def __init__(
        self, setting: str, settings: VisualSettings, device: str, *, size: tuple[int, int]
    ) -> None:
        super().__init__(setting, settings, device)
        self.size = size

    def _build(self, weights: Weights) -> Any:
        side = self.size[0]
        if side % _CELL or not _BLOCK * _CELL <= side <= _LARGEST:
            raise ConfigError(
                f"{self.setting}.image_size: hog takes a multiple of {_CELL} from "
                f"{_BLOCK * _CELL} to {_LARGEST}, as 64, not {side}"
            )
        blocks = side // _CELL - _BLOCK + 1
        self.dim = blocks * blocks * _BLOCK * _BLOCK * _BINS + _LEVELS**3
        self.arch = f"hog {_CELL} {_BLOCK} {_BINS} colours {_LEVELS}"
        return _Histograms()

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self._network(inputs[0])
        return features

    def _digest(self, weights: Weights, network: Any) -> str:
        return "none"


class _Histograms(nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map RGB uint8 ``(n, side, side, 3)`` to ``(n, dim)``."""
        # In full precision whatever the device's: it costs nothing.
        with torch.autocast(pixels.device.type, enabled=False):
            return torch.cat([gradients(pixels), colours(pixels)], dim=1)


def gradients(pixels: torch.Tensor) -> torch.Tensor:
    """Return HOG float32 ``(n, blocks * 36)`` of norm 1; zeros of a picture of one colour."""
    channels = pixels.permute(0, 3, 1, 2).float()  # (n, 3, h, w)
    x, y = torch.zeros_like(channels), torch.zeros_like(channels)
    x[..., 1:-1] = channels[..., 2:] - channels[..., :-2]
    y[..., 1:-1, :] = channels[..., 2:, :] - channels[..., :-2, :]
    # Of each pixel the channel that changes most.
    strength, channel = (x.square() + y.square()).max(dim=1, keepdim=True)
    angle = torch.atan2(y.gather(1, channel), x.gather(1, channel)) % torch.pi  # (n, 1, h, w)
    place = angle / torch.pi * _BINS - 0.5
    below = place.floor()
    share, below = place - below, below.long() % _BINS
    votes = torch.zeros(len(pixels), _BINS, *pixels.shape[1:3], device=pixels.device)
    votes.scatter_add_(1, below, strength.sqrt() * (1 - share))
    votes.scatter_add_(1, (below + 1) % _BINS, strength.sqrt() * share)
    cells = avg_pool2d(votes, _CELL)  # (n, bins, h / 8, w / 8)
    blocks = unfold(cells, _BLOCK)  # (n, bins * 4, blocks)
    blocks = normalize(normalize(blocks, dim=1).clamp(max=_CLIP), dim=1)
    return normalize(blocks.flatten(1), dim=1)


def colours(pixels: torch.Tensor) -> torch.Tensor:
    """Return roots of the shares of 216 colours, float32 ``(n, 216)`` of norm 1."""
    levels = pixels.long() * _LEVELS // 256  # (n, h, w, 3)
    index = ((levels[..., 0] * _LEVELS + levels[..., 1]) * _LEVELS + levels[..., 2]).flatten(1)
    counts = torch.zeros(len(pixels), _LEVELS**3, device=pixels.device)
    counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float32))
    return (counts / index.shape[1]).sqrt()
