"""Linear probe: logistic regression over all modalities' mean vectors, solved at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, normalize

from common.errors import ConfigError
from common.post import Stream
from config.fusion_models import ModelSettings
from fusion.models.base import Batch, Fused, FusionModel, InputSchema, Stage, masked_mean

# Iterations of L-BFGS for one penalty. The loss is within 1% of its end after 50 on 95 tags of
# 2,250 posts; half leaves rare tags unlearned, double changes no figure.
_ITERATIONS = 100

# For the calibration: in how many parts the authors are dealt, and iterations of each solution,
# whose weights are thrown away. 60 iterations changed GAP and mAP of openclipart by 0.0005.
_PARTS, _PART_ITERATIONS = 4, 40
# Pull of each tag's scale and shift to those of all tags. From a third to three times as much, mAP
# of openclipart moves by 0.004; without, tags of few posts have whatever suits these.
_PULL = 3.0


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

    With ``linear_probe.calibrate`` each probe's logits are then fitted to posts of other authors
    (`Authors`): as an author's posts resemble each other, a probe is too sure of what it has
    learned from them, that of pictures more than that of texts.
    """

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__(schema, settings)
        self._penalties = settings.linear_probe.penalties
        self._unit = settings.linear_probe.unit
        self._calibrated = settings.linear_probe.calibrate
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
            present = masks[m].any(dim=1, keepdim=True)
            alone[m] = self._rows(m, self._mean(tokens[m], masks[m])) * present
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
        present: dict[Stream, list[torch.Tensor]] = {m: [] for m in self.streams}
        truth, authors = [], list[str]()
        for batch in batches:
            for m in self.streams:
                tokens, mask = batch.tokens[m], batch.masks[m]
                means[m].append(self._mean(tokens, mask))
                present[m].append(mask.any(dim=1))
            truth.append(batch.truth)
            authors += batch.authors
        parts, rows = [], []
        for m in self.streams:
            vectors, has = torch.cat(means[m]), torch.cat(present[m])
            cast("Centre", self.centres[m]).fit(vectors[has])
            parts.append(self._rows(m, vectors) * has[:, None])
            rows.append(has)
        inputs, targets = torch.cat(parts, dim=1), torch.cat(truth)
        start = self.start and (self.start[0].to(inputs), self.start[1].to(inputs))
        heads: list[Any] = [self.classify]
        solved = [logistic(inputs, targets, self._penalties, start, self._dealt(authors))]
        at = 0
        for m, part, has in zip(self.streams, parts, rows, strict=True):
            own = start and (start[0][:, at : at + part.shape[1]], start[1])
            at += part.shape[1]
            if m in self.each and has.any():
                # Of a stream of which the texts say nothing, their biases suit no weights either.
                own = own if own and own[0].any() else None
                heads.append(self.each[m])
                theirs = self._dealt(list(compress(authors, has.tolist())))
                solved.append(logistic(part[has], targets[has], self._penalties, own, theirs))
        for solution in zip(*solved, strict=True):
            with torch.no_grad():
                for head, (weight, bias, _) in zip(heads, solution, strict=True):
                    head.weight.copy_(weight)
                    head.bias.copy_(bias)
            yield sum(loss for _, _, loss in solution) / len(solution)

    def _dealt(self, authors: Sequence[str]) -> Authors | None:
        return Authors.of(authors) if self._calibrated else None


def mean_score(logits: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Return logits of the mean probability of several models ``(models, posts, classes)``.

    Only of those with True in ``present`` ``(models, posts)``, of which each post has one.
    """
    lost = ~present[:, :, None]
    yes, no = (
        logsigmoid(each).masked_fill(lost, float("-inf")).logsumexp(dim=0)
        for each in (logits, -logits)
    )
    return yes - no


@dataclass(frozen=True)
class Authors:
    """How training posts are dealt to parts and weighted, so that authors are not told by heart.

    Attributes:
        part: int64 ``(posts,)``; the posts of an author are in one.
        weight: float32 ``(posts,)``: 1 / the root of the number of the author's posts, 1 on
            average, so that a few busy authors do not decide alone.
    """

    part: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(cls, authors: Sequence[str]) -> Authors:
        """Deal authors, the busiest first, each to the smallest part; "" is another each time."""
        names: list[str | int] = [author or row for row, author in enumerate(authors)]
        counts = Counter(names)
        if len(counts) < _PARTS:
            raise ConfigError(
                "model.linear_probe.calibrate: the training posts, or those with one of the "
                f"modalities, are of {len(counts)} authors, fewer than {_PARTS}: set it to false, "
                "or leave that modality out of data.modalities"
            )
        sizes, part = [0] * _PARTS, {}
        for author, count in counts.most_common():
            part[author] = sizes.index(min(sizes))
            sizes[part[author]] += count
        weight = torch.tensor([counts[name] ** -0.5 for name in names])
        return cls(torch.tensor([part[name] for name in names]), weight / weight.mean())


@dataclass(frozen=True)
class _Problem:
    """Logistic regressions, one for each class, over inputs ``(posts, dim)``.

    Attributes:
        said: Logits ``(posts, classes)`` to which those that are solved for are added; None where
            the probe has no start. The penalty counts biases, too, where there is one.
        known: float ``(classes,)``: 0 for a class that no post has, which stays at its start.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    said: torch.Tensor | None
    known: torch.Tensor

    def first(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights of 0, and biases of the frequencies of classes or, with a start, of 0."""
        weight = self.inputs.new_zeros(self.targets.shape[1], self.inputs.shape[1])
        frequencies = self.targets.mean(dim=0).clamp(1e-4, 1 - 1e-4)
        bias = torch.logit(frequencies)
        return weight, bias if self.said is None else torch.zeros_like(bias)

    def minimum(
        self, penalty: float, weight: torch.Tensor, bias: torch.Tensor, iterations: int
    ) -> None:
        """Bring weights and biases to the least cross entropy + penalty / 2 * |weights|^2."""

        def loss() -> torch.Tensor:
            size = weight.square().sum() + (0 if self.said is None else bias.square().sum())
            logits = self.logits(weight, bias)
            wrong: torch.Tensor = binary_cross_entropy_with_logits(
                logits, self.targets, weight=self.known, reduction="sum"
            )
            return wrong + penalty / 2 * size

        _minimise(loss, (weight, bias), iterations, len(self.inputs))

    def logits(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        logits = self.inputs @ weight.T + bias
        return logits if self.said is None else logits + self.said

    def only(self, some: torch.Tensor) -> _Problem:
        """Return that of some posts; a class that none of them has stays at its start there."""
        targets = self.targets[some]
        known = self.known if self.said is None else targets.any(dim=0).to(self.inputs)
        said = None if self.said is None else self.said[some]
        return _Problem(self.inputs[some], targets, said, known)

    def calibration(self, penalty: float, authors: Authors) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and shift ``(classes,)`` that suit logits of authors who were left out."""
        logits = torch.zeros_like(self.targets)
        for part in range(_PARTS):
            left_out = (authors.part == part).to(logits.device)
            rest = self.only(~left_out)
            weight, bias = rest.first()
            rest.minimum(penalty, weight, bias, _PART_ITERATIONS)
            logits[left_out] = self.only(left_out).logits(weight, bias).detach()
        weights = authors.weight.to(logits)[:, None] * self.targets.any(dim=0)
        scale, shift = logits.new_ones(1), logits.new_zeros(1)
        own_scale, own_shift = (logits.new_zeros(logits.shape[1]) for _ in range(2))

        def loss() -> torch.Tensor:
            wrong: torch.Tensor = binary_cross_entropy_with_logits(
                (scale + own_scale) * logits + shift + own_shift,
                self.targets,
                weight=weights,
                reduction="sum",
            )
            return wrong + _PULL * (own_scale.square().sum() + own_shift.square().sum())

        _minimise(loss, (scale, shift, own_scale, own_shift), _ITERATIONS, len(logits))
        return scale + own_scale, shift + own_shift


def _minimise(
    loss: Callable[[], torch.Tensor],
    values: Sequence[torch.Tensor],
    iterations: int,
    posts: int,
) -> None:
    """Move values to where a loss, summed over posts, is least."""
    for value in values:
        value.requires_grad_()
    solver: Any = torch.optim.LBFGS(
        list(values), max_iter=iterations, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        solver.zero_grad()
        mean = loss() / posts
        mean.backward()  # type: ignore[no-untyped-call]
        return mean

    with torch.enable_grad():
        solver.step(closure)
    for value in values:
        value.requires_grad_(False)


def logistic(
    inputs: torch.Tensor,
    targets: torch.Tensor,
    penalties: Iterable[float],
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
    authors: Authors | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Solve one logistic regression for each class and penalty, from inputs ``(posts, dim)``.

    Yields weights ``(classes, dim)``, biases ``(classes,)`` and the mean loss for each penalty: the
    minimum of the summed cross entropy + penalty / 2 * |weights|^2. With a start, weights and
    biases are its own plus what is solved for, and the penalty counts the change of both: a tag of
    few posts stays near its start, one of none there. With authors, both are then calibrated.
    """
    rotation, said, known = None, None, targets.new_ones(targets.shape[1])
    if start is not None:
        said, known = inputs @ start[0].T + start[1], targets.any(dim=0).to(inputs)
    if inputs.shape[1] > len(inputs):
        # With the penalty the weights lie in the span of the posts: as many directions are enough.
        values, vectors = torch.linalg.eigh((inputs @ inputs.T).double())
        some = values > values[-1] * 1e-7
        root = values[some].sqrt()
        rotation = inputs.T @ (vectors[:, some] / root).float()  # (dim, directions)
        inputs = (vectors[:, some] * root).float()
    problem = _Problem(inputs, targets, said, known)
    weight, bias = problem.first()
    for penalty in penalties:
        problem.minimum(penalty, weight, bias, _ITERATIONS)
        loss = float(binary_cross_entropy_with_logits(problem.logits(weight, bias), targets))
        slope, shift = weight if rotation is None else weight @ rotation.T, bias
        if start is not None:
            slope, shift = slope + start[0], bias + start[1]
        if authors is not None:
            scale, offset = problem.calibration(penalty, authors)
            slope, shift = scale[:, None] * slope, scale * shift + offset
        yield slope.clone(), shift.clone(), loss
