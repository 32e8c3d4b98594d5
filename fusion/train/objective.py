"""The objective: a model and its loss as one module, so that DDP sees the whole of it."""

from __future__ import annotations

import torch
from torch import nn

from common.post import Stream
from fusion.data.collate import Batch
from fusion.models import FusionModel
from fusion.train.losses import TaggingLoss


class Objective(nn.Module):
    """A batch with targets in, the loss out.

    The loss of the model, and of each modality's own head for the posts that have the modality,
    weighted by ``auxiliary``, summed.
    """

    def __init__(
        self, model: nn.Module, loss: TaggingLoss, *, auxiliary: float = 0.0, mixup: float = 0.0
    ) -> None:
        """Make one.

        Args:
            model: Takes a `Batch`, gives logits ``(posts, classes)``; a `FusionModel` may have
                own heads.
            loss: Of logits and targets.
            auxiliary: Weight of the own heads' losses.
            mixup: α, 0 mixes nothing.
        """
        super().__init__()
        self.model, self.loss = model, loss
        self._auxiliary, self._mixup = auxiliary, mixup

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the loss, a scalar.

        Raises:
            ValueError: The batch has no targets.
        """
        if batch.targets is None:
            raise ValueError("a training batch needs targets")
        if self._mixup and self.model.training:
            batch = mixed(batch, self._mixup)
        if not self._auxiliary or not isinstance(self.model, FusionModel):
            alone: torch.Tensor = self.loss(self.model(batch), batch.targets)
            return alone
        said = self.model.outputs(batch)
        total: torch.Tensor = self.loss(said.logits, batch.targets)
        for modality, logits in said.own.items():
            own = self.loss(logits, batch.targets, said.there[modality])
            total = total + self._auxiliary * own
        return total


def mixed(batch: Batch, alpha: float) -> Batch:
    """Mix each post with another at random, by a share drawn from Beta(α, α).

    Source: arXiv 1710.09412; for tokens as in `mixed_with`.
    """
    count = len(batch.post_ids)
    partners = torch.randperm(count)
    shares = torch.distributions.Beta(alpha, alpha).sample((count,))
    return mixed_with(batch, partners, shares)


def mixed_with(batch: Batch, partners: torch.Tensor, shares: torch.Tensor) -> Batch:
    """Mix each post with a given other one.

    A token is the weighted mean of the two posts' tokens at its place; where one of them has none,
    the other's stays whole, so that a modality of one post only is not faded. Targets are mixed.

    Args:
        batch: With targets.
        partners: int64 ``(posts,)``, the other post's place in the batch.
        shares: float ``(posts,)`` in [0, 1], how much of a post stays.
    """
    device = next(iter(batch.tokens.values())).device
    partners, shares = partners.to(device), shares.to(device)
    tokens: dict[Stream, torch.Tensor] = {}
    masks: dict[Stream, torch.Tensor] = {}
    for stream, own in batch.tokens.items():
        mask = batch.masks[stream]
        other, other_mask = own[partners], mask[partners]
        # How much of the token is the post's own: all or nothing where only one has it.
        share = shares[:, None].expand(mask.shape)
        share = torch.where(mask & other_mask, share, mask.to(share.dtype))[:, :, None]
        # Not multiplied by 0: what stands in the padding may be anything.
        blend = share * own + (1 - share) * other  # (posts, n, dim)
        tokens[stream] = torch.where(share == 1, own, torch.where(share == 0, other, blend))
        masks[stream] = mask | other_mask
    targets = batch.targets
    if targets is not None:
        targets = shares[:, None] * targets + (1 - shares[:, None]) * targets[partners]
    return Batch(batch.post_ids, tokens, masks, targets)
