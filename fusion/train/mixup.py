"""Mixup: a post and another one of its batch become one that has something of both."""

from __future__ import annotations

import torch

from common.post import Stream
from fusion.data.collate import Batch


def mixed(batch: Batch, alpha: float) -> Batch:
    """Each post mixed with another at random, by a share drawn from Beta(α, α).

    Source: arXiv 1710.09412; for tokens as in `mixed_with`.
    """
    count = len(batch.post_ids)
    partners = torch.randperm(count)
    shares = torch.distributions.Beta(alpha, alpha).sample((count,))
    return mixed_with(batch, partners, shares)


def mixed_with(batch: Batch, partners: torch.Tensor, shares: torch.Tensor) -> Batch:
    """Each post mixed with a given other one.

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
