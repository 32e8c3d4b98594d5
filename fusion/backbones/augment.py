"""Light augmentation of pictures, clips and spectrogram patches.

Nothing is mirrored: which way things point or move may be what the label is about.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Kind: TypeAlias = Literal["picture", "clip", "patch"]


def channels_first(batch: npt.NDArray[np.float32], kind: Kind) -> torch.Tensor:
    """Put the channels of a batch of items before their height and width."""
    tensor = torch.from_numpy(batch)
    if kind == "patch":
        return tensor.unsqueeze(1)  # (items, 1, 96, 64)
    if kind == "clip":
        return tensor.permute(0, 1, 4, 2, 3)  # (items, m, 3, S, S)
    return tensor.permute(0, 3, 1, 2)  # (items, 3, S, S), channels last in memory


def augment(
    item: npt.NDArray[np.float32], kind: Kind, random: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Shift a little and change light or loudness; one draw for all frames of a clip.

    Args:
        item: float32, one item; pixels in [0, 255], patches log-mel.
        kind: What the item is.
        random: Source of chance.

    Returns:
        float32 of the same shape.
    """
    if kind == "patch":
        louder = random.uniform(-0.7, 0.7)  # log amplitude
        shifted: npt.NDArray[np.float32] = np.roll(
            item, int(random.integers(-10, 11)), axis=0
        ) + np.float32(louder)
        band = int(random.integers(0, 60))
        shifted[:, band : band + int(random.integers(0, 5))] = shifted.mean()
        return shifted
    size = item.shape[-2]
    reach = max(1, size // 16)
    down, right = (int(v) for v in random.integers(-reach, reach + 1, 2))
    # Shifted by index, the border repeated: no black edges that a model could read.
    ys = np.clip(np.arange(size) + down, 0, size - 1)
    xs = np.clip(np.arange(size) + right, 0, size - 1)
    moved = item[..., ys[:, None], xs[None, :], :]
    contrast, light = random.uniform(0.8, 1.2), random.uniform(-20, 20)
    lit = (moved - 127.5) * np.float32(contrast) + np.float32(127.5 + light)
    clipped: npt.NDArray[np.float32] = np.clip(lit, 0, 255)
    return clipped
