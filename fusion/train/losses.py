"""Losses of multi-label tagging; all take logits, never probabilities.

All but `two_way_loss` give the cost of every class of every post; `TaggingLoss` smooths, weighs
and averages; `Objective` is a model with its loss. Targets may lie between 0 and 1: smoothed and
mixed ones do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional

from common.post import Stream
from config.train import (
    AsymmetricSettings,
    FocalSettings,
    LossName,
    LossSettings,
    TwoWaySettings,
)
from fusion.models import FusionModel
from fusion.models.base import Batch


def cross_entropy_costs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the binary cross entropy float32 ``(posts, classes)``."""
    return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def focal_costs(
    logits: torch.Tensor, targets: torch.Tensor, settings: FocalSettings
) -> torch.Tensor:
    """Return float32 ``(posts, classes)``: ``-α·t·(1-p)^γ·log p - (1-α)·(1-t)·p^γ·log(1-p)``.

    Source: arXiv 1708.02002, equation 5.
    """
    yes, no = functional.logsigmoid(logits), functional.logsigmoid(-logits)  # log p, log(1-p)
    # Powers as exponentials: the gradient of 0^γ with γ below 1 is infinite.
    positive = -targets * torch.exp(settings.gamma * no) * yes
    negative = -(1 - targets) * torch.exp(settings.gamma * yes) * no
    if settings.alpha is None:
        return positive + negative
    return settings.alpha * positive + (1 - settings.alpha) * negative


def asymmetric_costs(
    logits: torch.Tensor, targets: torch.Tensor, settings: AsymmetricSettings
) -> torch.Tensor:
    """Return ``-t·(1-p)^γ⁺·log p - (1-t)·q^γ⁻·log(1-q)`` with ``q = max(p - margin, 0)``.

    Source: arXiv 2009.14119, equation 7.
    """
    yes, no = functional.logsigmoid(logits), functional.logsigmoid(-logits)  # log p, log(1-p)
    positive = -targets * torch.exp(settings.gamma_positive * no) * yes
    if settings.margin == 0:
        return positive - (1 - targets) * torch.exp(settings.gamma_negative * yes) * no
    moved = torch.sigmoid(logits) - settings.margin
    counts = moved > 0
    # Where nothing counts a harmless number stands: 0^γ has no finite gradient for γ below 1.
    base = torch.where(counts, moved, 0.5)
    negative = -(1 - targets) * base**settings.gamma_negative * torch.log1p(-base)
    return positive + torch.where(counts, negative, 0.0)


def two_way_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    present: torch.Tensor,
    settings: TwoWaySettings,
) -> torch.Tensor:
    """Return how far positives stand below negatives: in each post, and in each class, summed.

    For a post ``softplus(Tn * lse(negatives / Tn) + Tp * lse(-positives / Tp))``, and for a class
    the same over the posts of the batch; means over the posts and classes with a positive. A
    target between 0 and 1 counts as that part of a positive, and the rest of it as a negative.
    ``weights`` ``(classes,)`` weigh the classes in the second way.

    Source: Kobayashi, "Two-way Multi-Label Loss", CVPR 2023, equations 6 to 9.
    """
    logits, targets = logits[present], targets[present]  # (n, classes)
    total = logits.sum() * 0  # a gradient also where nothing can be compared
    for dim, weight in ((1, logits.new_ones(logits.shape[:1])), (0, weights)):
        # A row without a positive has no worst positive; one without a negative no worst negative.
        some = (targets > 0).any(dim) & (targets < 1).any(dim)
        if not some.any():
            continue
        scores = logits[some] if dim == 1 else logits[:, some]
        truth = targets[some] if dim == 1 else targets[:, some]
        rise, fall = settings.negative, settings.positive
        worst_negative = rise * torch.logsumexp(scores / rise + torch.log(1 - truth), dim)
        worst_positive = fall * torch.logsumexp(-scores / fall + torch.log(truth), dim)
        costs = functional.softplus(worst_negative + worst_positive) * weight[some]
        total = total + costs.mean()
    return total


def class_weights(positives: torch.Tensor, beta: float) -> torch.Tensor:
    """Return weights by the effective number of positives ``(classes,)``, float32 with mean 1.

    β of 0 weighs all classes alike, near 1 by 1 / positives; one without positives counts as one
    with one. Source: arXiv 1901.05555, equation 4.
    """
    counts = positives.double().clamp(min=1)
    weights = (1 - beta) / (1 - beta**counts)
    return (weights / weights.mean()).float()


def smoothed(targets: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Move targets by ε/2 from 0 and 1 towards each other."""
    return targets * (1 - epsilon) + epsilon / 2


class TaggingLoss(nn.Module):
    """The loss that settings name; ``positives`` are the training posts of each class."""

    def __init__(self, settings: LossSettings, positives: torch.Tensor) -> None:
        super().__init__()
        self._settings = settings
        self.weights: torch.Tensor
        self.register_buffer("weights", class_weights(positives, settings.class_balance), False)

    def forward(
        self, logits: torch.Tensor, targets: torch.Tensor, present: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the mean cost of logits and targets in [0, 1], both ``(posts, classes)``.

        Posts where ``present`` ``(posts,)`` is False cost nothing, and count in the mean: so the
        costs of parts of a batch add up to that of the batch. Not so in `two_way_loss`, whose
        means are over what it compares.
        """
        settings, logits = self._settings, logits.float()
        if settings.label_smoothing:
            targets = smoothed(targets, settings.label_smoothing)
        if settings.name == "two_way":
            if present is None:
                present = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
            return two_way_loss(logits, targets, self.weights, present, settings.two_way)
        costs = _FORMS[settings.name](logits, targets, settings) * self.weights  # (posts, classes)
        if present is None:
            return costs.mean()
        # Chosen, not multiplied: 0 · inf is NaN, and (posts, 1, 1) · (posts,) would mask nothing.
        return torch.where(present[:, None], costs, 0.0).mean()


_FORMS: Mapping[LossName, Callable[[torch.Tensor, torch.Tensor, LossSettings], torch.Tensor]] = {
    "bce": lambda x, t, _: cross_entropy_costs(x, t),
    "focal": lambda x, t, settings: focal_costs(x, t, settings.focal),
    "asymmetric": lambda x, t, settings: asymmetric_costs(x, t, settings.asymmetric),
}


class Objective(nn.Module):
    """A batch with targets in, the loss out; ``mixup`` is its α, 0 mixes nothing.

    The loss of the model, and of each modality's own head for the posts that have the modality,
    weighted by ``auxiliary``, summed.
    """

    def __init__(
        self, model: nn.Module, loss: TaggingLoss, *, auxiliary: float = 0.0, mixup: float = 0.0
    ) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self._auxiliary, self._mixup = auxiliary, mixup

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the loss, a scalar."""
        if self._mixup and self.model.training:
            batch = mixed(batch, self._mixup)
        if not self._auxiliary or not isinstance(self.model, FusionModel):
            alone: torch.Tensor = self.loss(self.model(batch), batch.truth)
            return alone
        said = self.model.outputs(batch)
        total: torch.Tensor = self.loss(said.logits, batch.truth)
        for modality, logits in said.own.items():
            own = self.loss(logits, batch.truth, said.present[modality])
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
    """Mix each post with the one at ``partners`` ``(posts,)``, of which ``1 - shares`` comes in.

    A token is the weighted mean of the two posts' tokens at its place; where one of them has none,
    the other's stays whole, so that a modality of one post only is not faded. Targets are mixed.
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
