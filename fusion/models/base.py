"""What every fusion model is, and the parts that they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import nn

from extractors.post import Modality
from fusion.collate import Batch
from fusion.schema import InputSchema


class FusionModel(nn.Module):
    """A batch of posts in, logits ``(posts, classes)`` out.

    Padding, and what stands in the padding, changes nothing; a missing modality is replaced by a
    learned vector.
    """

    def __init__(self, schema: InputSchema, modality_dropout: float) -> None:
        super().__init__()
        self.schema = schema
        self.modalities: tuple[Modality, ...] = tuple(schema.dims)
        self.drop = ModalityDropout(modality_dropout)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits float32 ``(posts, classes)``."""
        masks = self.drop(batch.masks)
        # Zero where masked: a NaN in the padding would pass through 0 · NaN.
        tokens = {
            m: batch.tokens[m].masked_fill(~masks[m][:, :, None], 0.0) for m in self.modalities
        }
        return self.fuse(tokens, masks).float()

    @abstractmethod
    def fuse(
        self, tokens: Mapping[Modality, torch.Tensor], masks: Mapping[Modality, torch.Tensor]
    ) -> torch.Tensor:
        """Logits from tokens ``(posts, n, dim)``, zero where masks ``(posts, n)`` are False."""

    @property
    @abstractmethod
    def head(self) -> nn.Linear:
        """The last layer, ``(…) ─► (classes)``."""

    def start_at(self, frequencies: torch.Tensor) -> None:
        """Let the untrained model predict each class's frequency ``(classes,)``: saves epochs."""
        nn.init.normal_(self.head.weight, std=0.02)
        with torch.no_grad():
            self.head.bias.copy_(torch.logit(frequencies.clamp(1e-3, 1 - 1e-3)))


class ModalityDropout(nn.Module):
    """In training, hides whole modalities of a post at random, but never the last one it has."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance

    def forward(self, masks: Mapping[Modality, torch.Tensor]) -> dict[Modality, torch.Tensor]:
        """Masks ``(posts, n)`` with the hidden modalities all False."""
        if not self.training or self.chance == 0:
            return dict(masks)
        names = list(masks)
        present = torch.stack([masks[m].any(dim=1) for m in names], dim=1)  # (posts, modalities)
        draw = torch.rand(present.shape, device=present.device)
        # The present one with the highest draw always stays.
        stays = draw.masked_fill(~present, -1.0).argmax(dim=1, keepdim=True)
        kept = (draw >= self.chance).scatter(1, stays, True)
        return {m: masks[m] & kept[:, i : i + 1] for i, m in enumerate(names)}


def masked_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that are there; zeros where there is none.

    Args:
        tokens: float ``(posts, n, dim)``, zero where masked.
        mask: bool ``(posts, n)``.

    Returns:
        float ``(posts, dim)``.
    """
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)  # (posts, 1)
    return tokens.sum(dim=1) / count
