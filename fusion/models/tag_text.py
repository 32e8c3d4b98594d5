"""Tags by their texts: a post's vectors against those of the tags' descriptions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from common.errors import ConfigError
from common.post import Stream
from config.fusion_models import ModelSettings
from fusion.models.base import Fused, FusionModel, InputSchema, Stage, masked_mean


class TagText(FusionModel):
    """Bias of a tag, plus the mean over a post's streams of ``scale * (post . tag)``.

    A tag's vector in the space of a stream's encoder is that of its descriptions, or starts there
    and learns; `fusion.bundle.tag_vectors` makes them and adds tags. A post's vector is the unit
    mean of the stream's tokens, less that of the mean post. The streams of
    ``model.tag_text.projected`` are mapped into another's space, and share its tags.

    Source: RAM++ (arXiv 2310.15200), where the descriptions' vectors are the classifier.
    """

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__(schema, settings)
        projected = settings.tag_text.projected
        self.spaces: dict[Stream, Stream] = {m: projected.get(m, m) for m in schema.dims}
        for stream, space in self.spaces.items():
            if self.spaces.get(space) != space:
                raise ConfigError(
                    f"model.tag_text.projected: {stream} cannot go into the space of {space}, "
                    "which is projected itself or no stream of the features"
                )
        self.maps, self.vectors = nn.ModuleDict(), nn.ParameterDict()
        for stream, space in self.spaces.items():
            dim = schema.dims[space]
            self.register_buffer(f"centre_{stream}", torch.zeros(schema.dims[stream]))
            if space != stream:
                self.maps[stream] = nn.Linear(schema.dims[stream], dim)
                continue
            self.vectors[stream] = nn.Parameter(torch.randn(schema.classes, dim) * 0.02)
            self.register_buffer(f"tag_centre_{stream}", torch.zeros(dim))
        self.from_texts: torch.Tensor
        self.register_buffer("from_texts", torch.tensor(False))  # so that texts can add tags
        self.mixing = nn.Parameter(torch.zeros(len(schema.dims), schema.classes))
        # So that a learning rate that suits other models moves logits of random vectors, too.
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.bias = nn.Parameter(torch.zeros(schema.classes))
        self._add_own_heads({m: schema.dims[space] for m, space in self.spaces.items()})

    def layers(self) -> tuple[Stage, ...]:
        """Return maps (where a stream has one), the weights of the mean, the tags."""
        modality = (Stage("modality", ("maps",)),) if len(self.maps) else ()
        head = Stage("head", ("vectors", "scale", "bias"))
        return (*modality, Stage("fusion", ("mixing",)), head)

    def classifiers(self) -> tuple[nn.Linear, ...]:
        """Return nothing: the tags' vectors take their place."""
        return ()

    def undecayed(self) -> frozenset[str]:
        """Return the weights of the mean, whose start at 0 says that all count alike."""
        return frozenset({"mixing"})

    def start_at(self, frequencies: torch.Tensor) -> None:
        super().start_at(frequencies)
        with torch.no_grad():
            self.bias.copy_(torch.logit(frequencies.clamp(1e-3, 1 - 1e-3)))

    def fuse(
        self, tokens: Mapping[Stream, torch.Tensor], masks: Mapping[Stream, torch.Tensor]
    ) -> Fused:
        alone = {m: self.post_vectors(m, tokens[m], masks[m]) for m in self.streams}
        said = [alone[m] @ self.vectors[self.spaces[m]].T for m in self.streams]
        present = torch.stack(
            [masks[m].any(dim=1) for m in self.streams], dim=1
        )  # (posts, streams)
        mean = mixed(torch.stack(said, dim=1), present, self.mixing)
        return Fused(self.scale * mean + self.bias, alone)

    def post_vectors(
        self, stream: Stream, tokens: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Map ``(posts, n, dim)`` and bool ``(posts, n)`` to unit vectors ``(posts, dim)``."""
        mean = masked_mean(functional.normalize(tokens, dim=2), mask)
        vectors = functional.normalize(mean, dim=1) - self.get_buffer(f"centre_{stream}")
        if stream in self.maps:
            vectors = self.maps[stream](functional.normalize(vectors, dim=1)).float()
        return functional.normalize(vectors, dim=1)


def mixed(said: torch.Tensor, present: torch.Tensor, mixing: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean ``(posts, classes)`` over the streams that are there; 0 for none.

    ``(posts, streams, classes)``, bool ``(posts, streams)``, and ``(streams, classes)``: weights
    before a softmax.
    """
    some = present | ~present.any(dim=1, keepdim=True)  # no softmax over nothing
    weights = mixing.masked_fill(~some[:, :, None], float("-inf")).softmax(dim=1)
    return (weights * present[:, :, None] * said).sum(dim=1)
