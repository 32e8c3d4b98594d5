"""k nearest neighbours: the tags of the training posts that resemble a post, as log odds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from common.post import Stream
from config.fusion_models import ModelSettings
from fusion.models.base import Batch, Fused, FusionModel, InputSchema, Stage, masked_mean
from fusion.models.probe import Centre

# Posts whose neighbours choose k, temperature and weights, spread over the training posts: a few
# weights for each tag need no more, and all pairs of 100,000 posts would take minutes.
_ASKED = 2048
# Rows of similarities at once: 256 by a million posts are 1 GB.
_BLOCK = 256
# Pull of a tag's weights to the weights that all tags share, and of its bias to its frequency, in
# posts. At 1 tags of ten posts follow chance; at 100 hardly any tag has weights of its own.
_PULL = 10.0


class KNN(FusionModel):
    """Bias of a tag, plus the weighted sum over a post's streams of what its neighbours say.

    Each stream finds the training posts with the nearest vectors by cosine (the mean of the tokens,
    less the mean post). They vote with weights ``softmax(cosine / temperature)``; the tag's
    frequency votes as one more. What counts is by how much the log odds of that share exceed
    those of the frequency, so a missing stream adds nothing. k, temperature and weights are those
    with the least cross entropy on training posts that are not their own neighbours.

    The training posts' vectors are buffers in float16, and so are their tags: a bundle is as large
    as its training set. Neither loss nor optimizer of the training count.
    """

    truth: torch.Tensor
    prior: torch.Tensor
    neighbours: torch.Tensor
    temperature: torch.Tensor

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__(schema, settings)
        self._options = settings.knn
        self.centres = nn.ModuleDict({m: Centre(d) for m, d in schema.dims.items()})
        for m, dim in schema.dims.items():
            self.register_buffer(f"vectors_{m}", torch.zeros(0, dim, dtype=torch.float16))
            self.register_buffer(f"posts_{m}", torch.zeros(0, dtype=torch.int64))  # rows of truth
        self.register_buffer("truth", torch.zeros(0, schema.classes, dtype=torch.bool))
        self.register_buffer("prior", torch.zeros(schema.classes))  # log odds of the frequencies
        self.register_buffer("neighbours", torch.tensor(max(self._options.neighbours)))
        self.register_buffer("temperature", torch.tensor(self._options.temperatures[0]))
        self.mixing = nn.Parameter(torch.ones(len(schema.dims), schema.classes) / len(schema.dims))
        self.bias = nn.Parameter(torch.zeros(schema.classes))
        self._add_own_heads(schema.dims)

    def layers(self) -> tuple[Stage, ...]:
        return (Stage("fusion", ("mixing",)), Stage("head", ("bias",)))

    def classifiers(self) -> tuple[nn.Linear, ...]:
        """Return nothing: the neighbours' tags take their place."""
        return ()

    def undecayed(self) -> frozenset[str]:
        return frozenset({"mixing"})

    def start_at(self, frequencies: torch.Tensor) -> None:
        super().start_at(frequencies)
        with torch.no_grad():
            self.bias.copy_(torch.logit(frequencies.clamp(1e-3, 1 - 1e-3)))

    def make_room(self, state: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        for name, buffer in self.named_buffers():
            saved = state.get(prefix + name)
            if name.startswith(("vectors_", "posts_", "truth")) and saved is not None:
                setattr(self, name, buffer.new_empty(len(saved), *buffer.shape[1:]))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.make_room(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def fuse(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> Fused:
        alone = {m: self._vectors(m, masked_mean(tokens[m], masks[m])) for m in self.streams}
        present = torch.stack([masks[m].any(dim=1) for m in self.streams], dim=1)
        odds = torch.stack([self._odds(*self._nearest(m, alone[m])) for m in self.streams], dim=1)
        return Fused(self.bias + (self.mixing * present[:, :, None] * odds).sum(dim=1), alone)

    def _vectors(self, stream: Stream, means: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.centres[stream](means), dim=1)

    def _nearest(
        self, stream: Stream, vectors: torch.Tensor, themselves: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and rows of the nearest training posts ``(posts, k)``, best first.

        Posts in the rows ``themselves`` ``(posts,)`` are no neighbours of their own.
        """
        known, rows = self.get_buffer(f"vectors_{stream}"), self.get_buffer(f"posts_{stream}")
        cosines = vectors.float() @ known.float().T
        if themselves is not None:
            cosines = cosines.masked_fill(themselves[:, None] == rows, float("-inf"))
        best, index = cosines.topk(min(max(self._options.neighbours), len(rows)), dim=1)
        return best, rows[index]

    def _odds(self, cosines: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return by how much neighbours ``(posts, k)`` raise log odds ``(posts, classes)``."""
        if not cosines.shape[1]:
            return cosines.new_zeros(len(cosines), len(self.prior))
        rank = torch.arange(cosines.shape[1], device=cosines.device)
        used = (rank < self.neighbours) & cosines.isfinite()  # (posts, k)
        # Finite where nothing is used: a softmax over -inf alone is NaN.
        weights = (cosines / self.temperature).masked_fill(~used, -1e4).softmax(dim=1) * used
        votes = (weights[:, None] @ self.truth[rows].to(weights.dtype)).squeeze(1)
        count = used.sum(dim=1, keepdim=True)
        share = (count * votes + self.prior.sigmoid()) / (count + 1)
        return torch.logit(share) - self.prior

    def solutions(self, batches: Iterable[Batch]) -> Iterator[float]:
        """Take in the training posts, and what their neighbours tell best; yield the loss."""
        means: dict[Stream, list[torch.Tensor]] = {m: [] for m in self.streams}
        present: list[torch.Tensor] = []
        truth = []
        for batch in batches:
            for m in self.streams:
                means[m].append(masked_mean(batch.tokens[m], batch.masks[m]))
            present.append(torch.stack([batch.masks[m].any(dim=1) for m in self.streams], dim=1))
            truth.append(batch.truth)
        has, targets = torch.cat(present), torch.cat(truth)
        self.truth = targets > 0
        shares = (self.truth.sum(dim=0) + 0.5) / (len(targets) + 1)
        self.prior = torch.logit(shares)
        for i, m in enumerate(self.streams):
            rows = has[:, i].nonzero()[:, 0]
            vectors = torch.cat(means.pop(m))[rows]
            cast("Centre", self.centres[m]).fit(vectors)
            setattr(self, f"vectors_{m}", self._vectors(m, vectors).half())
            setattr(self, f"posts_{m}", rows)
        step = -(-len(targets) // _ASKED)
        yield self._choose(has[::step], targets[::step], step)

    def _choose(self, has: torch.Tensor, targets: torch.Tensor, step: int) -> float:
        """Set k, temperature, weights and bias by every ``step``-th post; return its loss."""
        asked = torch.arange(len(targets), device=targets.device) * step
        nearest = [self._others(m, asked[has[:, i]]) for i, m in enumerate(self.streams)]
        best = float("inf")
        for count in self._options.neighbours:
            for temperature in self._options.temperatures:
                self.neighbours.fill_(count)
                self.temperature.fill_(temperature)
                odds = targets.new_zeros(*has.shape, targets.shape[1])  # (posts, streams, classes)
                for i, neighbours in enumerate(nearest):
                    split = (torch.split(each, _BLOCK) for each in neighbours)
                    said = [self._odds(*part) for part in zip(*split, strict=True)]
                    odds[has[:, i], i] = torch.cat(said)
                mixing, bias, loss = self._weights(odds, targets)
                if loss < best:
                    best, chosen = loss, (count, temperature, mixing, bias)
        parts = (self.neighbours, self.temperature, self.mixing, self.bias)
        for part, value in zip(parts, chosen, strict=True):
            part.data.copy_(torch.as_tensor(value))
        return best

    def _others(self, stream: Stream, asked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `_nearest` finds for training posts in sorted rows ``asked``."""
        known, rows = self.get_buffer(f"vectors_{stream}"), self.get_buffer(f"posts_{stream}")
        at = torch.searchsorted(rows, asked)
        neighbours = [self._nearest(stream, known[a], rows[a]) for a in torch.split(at, _BLOCK)]
        return torch.cat([f[0] for f in neighbours]), torch.cat([f[1] for f in neighbours])

    def _weights(
        self, odds: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return the streams' weights, the biases and the loss that is least with them."""
        shared = torch.full_like(odds[0, :, :1], 1 / len(self.streams)).requires_grad_()
        own, change = (torch.zeros_like(each).requires_grad_() for each in (odds[0], self.prior))
        solver: Any = torch.optim.LBFGS(
            [shared, own, change], max_iter=50, line_search_fn="strong_wolfe"
        )

        def fitted() -> torch.Tensor:
            logits = self.prior + change + ((shared + own) * odds).sum(dim=1)
            return functional.binary_cross_entropy_with_logits(logits, targets)

        def closure() -> torch.Tensor:
            solver.zero_grad()
            size = own.square().sum() + change.square().sum()
            loss: Any = fitted() + _PULL / 2 * size / targets.numel()
            loss.backward()
            return cast("torch.Tensor", loss)

        with torch.enable_grad():
            solver.step(closure)
        with torch.no_grad():
            return shared + own, self.prior + change, float(fitted())
