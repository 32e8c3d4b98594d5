"""The base of every fusion model, and the parts that they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias, cast

import torch
from torch import nn

from common.post import Modality, Stream, modality_of
from config.fusion_models import ModelSettings
from fusion.data.schema import Batch, InputSchema

Group: TypeAlias = Literal["modality", "fusion", "head"]


class Stage(NamedTuple):
    """One layer of a model, for learning rates: of which of ``optimizer.group_rates``.

    ``names`` are those of its parameters, or of the modules that hold them.
    """

    group: Group
    names: tuple[str, ...]


class Fused(NamedTuple):
    """The result of `FusionModel.fuse`.

    Attributes:
        logits: ``(posts, classes)``.
        alone: A vector ``(posts, width)`` of each stream, made of it alone; anything for posts
            without the stream.
    """

    logits: torch.Tensor
    alone: Mapping[Stream, torch.Tensor]


class Outputs(NamedTuple):
    """The outputs of a model in training.

    Attributes:
        own: Logits float32 ``(posts, classes)`` of each stream's own head; empty without heads.
        there: bool ``(posts,)``, True where the post has the stream and it was not hidden.
    """

    logits: torch.Tensor
    own: Mapping[Stream, torch.Tensor]
    there: Mapping[Stream, torch.Tensor]


class FusionModel(nn.Module):
    """A batch of posts in, logits ``(posts, classes)`` out.

    Padding, and what stands in the padding, changes nothing; a missing stream is replaced by a
    learned vector. With ``model.auxiliary`` each stream also has a head of its own, which is
    there for training only.

    Attributes:
        classify: The last layer, ``(...) -> (classes)``.
    """

    classify: nn.Linear

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__()
        self.schema = schema
        self.streams: tuple[Stream, ...] = tuple(schema.dims)
        self.drop = ModalityDropout(settings.modality_dropout)
        self.has_own_heads = settings.auxiliary > 0

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return logits float32 ``(posts, classes)``."""
        return self._fused(batch)[0].logits.float()

    def outputs(self, batch: Batch) -> Outputs:
        """Return logits of the model and of each stream's own head."""
        fused, masks = self._fused(batch)
        heads = self._own_heads()
        return Outputs(
            fused.logits.float(),
            {m: head(fused.alone[m]).float() for m, head in heads.items()},
            {m: masks[m].any(dim=1) for m in heads},
        )

    @abstractmethod
    def fuse(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> Fused:
        """Return logits from tokens ``(posts, n, dim)``, zero where masks ``(posts, n)`` are False.

        n is at least 1, and the True ones of a mask stand before the False ones.
        """

    @abstractmethod
    def layers(self) -> tuple[Stage, ...]:
        """Return the model's stages from its input up, without own heads; each parameter in one."""

    def stages(self) -> tuple[Stage, ...]:
        """Return all stages from the input up; every parameter of the model is in exactly one."""
        stages = self.layers()
        if not self.has_own_heads:
            return stages
        return (*stages[:-1], stages[-1]._replace(names=(*stages[-1].names, "own")))

    def undecayed(self) -> frozenset[str]:
        """Return names of parameters that are learned vectors, though they have two dimensions."""
        return frozenset()

    def start_at(self, frequencies: torch.Tensor) -> None:
        """Let the untrained model predict each class's frequency ``(classes,)``: saves epochs."""
        for head in (self.classify, *self._own_heads().values()):
            nn.init.normal_(head.weight, std=0.02)
            with torch.no_grad():
                head.bias.copy_(torch.logit(frequencies.clamp(1e-3, 1 - 1e-3)))

    def _add_own_heads(self, widths: Mapping[Stream, int]) -> None:
        """Called last in ``__init__`` with the widths of `Fused.alone`."""
        if self.has_own_heads:
            classes = self.schema.classes
            self.own = nn.ModuleDict({m: nn.Linear(w, classes) for m, w in widths.items()})

    def _own_heads(self) -> dict[Stream, nn.Linear]:
        if not self.has_own_heads:
            return {}
        return {stream: cast("nn.Linear", self.own[stream]) for stream in self.streams}

    def _fused(self, batch: Batch) -> tuple[Fused, Mapping[Stream, torch.Tensor]]:
        masks = {m: _some(mask) for m, mask in self.drop(batch.masks).items()}
        # Zero where masked: a NaN in the padding would pass through 0 · NaN.
        tokens = {
            m: _some(batch.tokens[m]).masked_fill(~masks[m][:, :, None], 0.0) for m in self.streams
        }
        return self.fuse(tokens, masks), masks


def _some(rows: torch.Tensor) -> torch.Tensor:
    """Make n of ``(posts, n, ...)`` at least 1: a stream of no post gets a row of padding.

    Its layers then take part in every step, which DDP demands.
    """
    return rows if rows.shape[1] else rows.new_zeros(rows.shape[0], 1, *rows.shape[2:])


class ModalityDropout(nn.Module):
    """In training, hides whole modalities of a post at random, but never the last one it has.

    The streams of a modality are hidden together.
    """

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance

    def forward(self, masks: Mapping[Stream, torch.Tensor]) -> dict[Stream, torch.Tensor]:
        """Return masks ``(posts, n)`` with the hidden modalities all False."""
        if not self.training or self.chance == 0:
            return dict(masks)
        there: dict[Modality, torch.Tensor] = {}
        for stream, mask in masks.items():
            modality, some = modality_of(stream), mask.any(dim=1)
            there[modality] = there[modality] | some if modality in there else some
        names = list(there)
        present = torch.stack(list(there.values()), dim=1)  # (posts, modalities)
        draw = torch.rand(present.shape, device=present.device)
        # The present one with the highest draw always stays.
        stays = draw.masked_fill(~present, -1.0).argmax(dim=1, keepdim=True)
        kept = (draw >= self.chance).scatter(1, stays, True)
        kept_of = {m: kept[:, i : i + 1] for i, m in enumerate(names)}  # (posts, 1) each
        return {s: mask & kept_of[modality_of(s)] for s, mask in masks.items()}


def learned_vectors(schema: InputSchema, width: int) -> nn.ParameterDict:
    """Return a small random vector ``(width,)`` for each stream."""
    return nn.ParameterDict({m: nn.Parameter(torch.randn(width) * 0.02) for m in schema.dims})


def or_missing(vector: torch.Tensor, mask: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    """Return vectors ``(posts, width)``, and ``missing`` for posts whose ``mask`` is all False."""
    return torch.where(mask.any(dim=1, keepdim=True), vector, missing)


def masked_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of tokens ``(posts, n, dim)`` where the mask ``(posts, n)`` is True; zeros for none.

    Tokens must be finite, also where masked.
    """
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)  # (posts, 1)
    return tokens.masked_fill(~mask[:, :, None], 0.0).sum(dim=1) / count
