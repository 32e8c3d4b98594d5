"""Linear probe: logistic regression over all modalities' mean vectors, solved at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, normalize

from common.post import Stream
from config.fusion_models import ModelSettings
from fusion.models.base import Batch, Fused, FusionModel, InputSchema, Stage, masked_mean

# Iterations of L-BFGS for one penalty. The loss is within 1% of its end after 50 on 95 tags of
# 2,250 posts; half leaves rare tags unlearned, double changes no figure.
_ITERATIONS = 100


class Centre(nn.Module):
    """Vectors of length 1 on average over the training posts, minus their mean there.

    Length before the mean is taken away: a stream whose vectors are much alike counts for less.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Map ``(posts, dim)`` to the same."""
        return (vectors - self.mean) * self.scale

    def fit(self, vectors: torch.Tensor) -> None:
        """Take mean and length of vectors ``(posts, dim)``; of none, leave them as they are."""
        if len(vectors):
            self.mean.copy_(vectors.mean(dim=0))
            length = vectors.square().sum(dim=1).mean().sqrt()
            self.scale.copy_(1 / length.clamp(min=1e-6))


class LinearProbe(FusionModel):
    """Mean of each stream's tokens -> one length, centred -> joined -> linear layer -> logits.

    A missing stream stands at its mean. Elements of a stream are not scaled one by one: that would
    make as much of the rarest n-gram of a text as of the commonest. With ``linear_probe.unit`` each
    post's vector has length 1, before and after the mean is taken away.

    The weights are found at once (`solutions`), so neither loss nor optimizer of the training
    count; they could be trained by steps as any others.

    With ``linear_probe.alone`` each stream has a probe of its own, too, solved from the posts that
    have it; the score is the mean of theirs and of the one of all.
    """

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__(schema, settings)
        self._penalties = settings.linear_probe.penalties
        self._unit = settings.linear_probe.unit
        self.start: tuple[torch.Tensor, torch.Tensor] | None = None
        """Weights ``(classes, dims)`` and biases to which the penalty pulls; none: to zero."""
        self.centres = nn.ModuleDict({m: Centre(d) for m, d in schema.dims.items()})
        self.classify = nn.Linear(sum(schema.dims.values()), schema.classes)
        alone = schema.dims if settings.linear_probe.alone else {}
        self.each = nn.ModuleDict({m: nn.Linear(d, schema.classes) for m, d in alone.items()})
        self._add_own_heads(schema.dims)

    def layers(self) -> tuple[Stage, ...]:
        return (Stage("head", ("classify", "each") if len(self.each) else ("classify",)),)

    def classifiers(self) -> tuple[nn.Linear, ...]:
        return (cast("nn.Linear", self.classify), *cast("Iterable[nn.Linear]", self.each.values()))

    def fuse(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> Fused:
        alone = {}
        for m in self.streams:
            there = masks[m].any(dim=1, keepdim=True)
            alone[m] = self._rows(m, self._mean(tokens[m], masks[m])) * there
        logits = self.classify(torch.cat([alone[m] for m in self.streams], dim=1))
        if len(self.each):
            said = torch.stack([logits, *(self.each[m](alone[m]) for m in self.streams)])
            has = torch.stack([masks[m].any(dim=1) for m in self.streams])
            logits = mean_score(said.float(), torch.cat([torch.ones_like(has[:1]), has]))
        return Fused(logits, alone)

    def _mean(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mean = masked_mean(tokens, mask)
        return normalize(mean.float(), dim=1) if self._unit else mean

    def _rows(self, stream: Stream, means: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.centres[stream](means)
        return normalize(rows, dim=1) if self._unit else rows

    def solutions(self, batches: Iterable[Batch]) -> Iterator[float]:
        """Set the weights of one penalty after another; yield the loss of each."""
        means: dict[Stream, list[torch.Tensor]] = {m: [] for m in self.streams}
        there: dict[Stream, list[torch.Tensor]] = {m: [] for m in self.streams}
        truth = []
        for batch in batches:
            for m in self.streams:
                tokens, mask = batch.tokens[m], batch.masks[m]
                means[m].append(self._mean(tokens, mask))
                there[m].append(mask.any(dim=1))
            truth.append(batch.truth)
        parts, rows = [], []
        for m in self.streams:
            vectors, has = torch.cat(means[m]), torch.cat(there[m])
            cast("Centre", self.centres[m]).fit(vectors[has])
            parts.append(self._rows(m, vectors) * has[:, None])
            rows.append(has)
        inputs, targets = torch.cat(parts, dim=1), torch.cat(truth)
        start = self.start and (self.start[0].to(inputs), self.start[1].to(inputs))
        heads: list[Any] = [self.classify]
        solved = [logistic(inputs, targets, self._penalties, start)]
        at = 0
        for m, part, has in zip(self.streams, parts, rows, strict=True):
            own = start and (start[0][:, at : at + part.shape[1]], start[1])
            at += part.shape[1]
            if m in self.each and has.any():
                # Of a stream of which the texts say nothing, their biases suit no weights either.
                own = own if own and own[0].any() else None
                heads.append(self.each[m])
                solved.append(logistic(part[has], targets[has], self._penalties, own))
        for found in zip(*solved, strict=True):
            with torch.no_grad():
                for head, (weight, bias, _) in zip(heads, found, strict=True):
                    head.weight.copy_(weight)
                    head.bias.copy_(bias)
            yield sum(loss for _, _, loss in found) / len(found)


def mean_score(logits: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Return logits of the mean probability of several models ``(models, posts, classes)``.

    Only of those with True in ``there`` ``(models, posts)``, of which each post has one.
    """
    lost = ~there[:, :, None]
    yes, no = (
        logsigmoid(each).masked_fill(lost, float("-inf")).logsumexp(dim=0)
        for each in (logits, -logits)
    )
    return yes - no


def logistic(
    inputs: torch.Tensor,
    targets: torch.Tensor,
    penalties: Iterable[float],
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Solve one logistic regression for each class and penalty, from inputs ``(posts, dim)``.

    Yields weights ``(classes, dim)``, biases ``(classes,)`` and the mean loss for each penalty: the
    minimum of the summed cross entropy + penalty / 2 * |weights|^2. With a start, weights and
    biases are its own plus what is solved for, and the penalty counts the change of both: a tag of
    few posts stays near its start, one of none there.
    """
    rotation, said, counted = None, inputs.new_zeros(()), None
    if start is not None:
        said, counted = inputs @ start[0].T + start[1], targets.any(dim=0).to(inputs)
    if inputs.shape[1] > len(inputs):
        # With the penalty the weights lie in the span of the posts: as many directions are enough.
        values, vectors = torch.linalg.eigh((inputs @ inputs.T).double())
        some = values > values[-1] * 1e-7
        root = values[some].sqrt()
        rotation = inputs.T @ (vectors[:, some] / root).float()  # (dim, directions)
        inputs = (vectors[:, some] * root).float()
    weight = inputs.new_zeros(targets.shape[1], inputs.shape[1], requires_grad=True)
    frequencies = targets.mean(dim=0).clamp(1e-4, 1 - 1e-4)
    bias = torch.logit(frequencies) if start is None else torch.zeros_like(frequencies)
    bias = bias.requires_grad_()
    for penalty in penalties:
        solver: Any = torch.optim.LBFGS(
            [weight, bias], max_iter=_ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
        )

        def closure(solver: Any = solver, penalty: float = penalty) -> torch.Tensor:
            solver.zero_grad()
            logits = inputs @ weight.T + bias + said
            loss: Any = binary_cross_entropy_with_logits(
                logits, targets, weight=counted, reduction="sum"
            )
            size = weight.square().sum() + (0 if start is None else bias.square().sum())
            loss = (loss + penalty / 2 * size) / len(inputs)
            loss.backward()
            return cast("torch.Tensor", loss)

        with torch.enable_grad():
            solver.step(closure)
        with torch.no_grad():
            found = weight if rotation is None else weight @ rotation.T
            loss = binary_cross_entropy_with_logits(inputs @ weight.T + bias + said, targets)
            solution = (found.clone(), bias.clone())
            if start is not None:
                solution = (found + start[0], bias + start[1])
        # Outside: generators that are stepped in turn would leave each other's gradients off.
        yield *solution, float(loss)
