"""The input of a fusion model, the base of every one, and the parts that they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from common.errors import ConfigError, FeatureError
from common.post import STREAMS, TEXT_STREAMS, FeatureArray, Features, Modality, Stream, modality_of
from config.fusion_models import ModelSettings, TokenLimits

ORDERED: frozenset[Stream] = frozenset({"video", "audio", *TEXT_STREAMS})
"""Streams whose tokens follow one another in time; images and whole videos have no order."""
Group: TypeAlias = Literal["modality", "fusion", "head"]


@dataclass(frozen=True)
class FeatureManifest:
    """The features that a model was trained on: length and fingerprint of each stream.

    Attributes:
        image_as_frames: Images join the video's frames.
        ocr_mode: How OCR text was embedded.
    """

    dims: Mapping[Stream, int]
    fingerprints: Mapping[Stream, str]
    image_as_frames: bool = False
    ocr_mode: Literal["append", "separate"] = "separate"

    def input_dims(self) -> dict[Stream, int]:
        """Return the dims of the model's input, in the order of `STREAMS`."""
        dims = {s: self.dims[s] for s in STREAMS if s in self.dims}
        if not self.image_as_frames or "image" not in dims:
            return dims
        image = dims.pop("image")
        video = dims.setdefault("video", image)
        if video != image:
            raise ConfigError(
                f"image_as_frames: features of images have length {image}, of frames {video}; "
                "use one extractor for both or set image_as_frames to false"
            )
        return {s: dims[s] for s in STREAMS if s in dims}


@dataclass(frozen=True)
class InputSchema:
    """Length of one token and most tokens of each stream, and the number of tags."""

    dims: Mapping[Stream, int]
    tokens: Mapping[Stream, int]
    classes: int
    image_as_frames: bool = False

    @classmethod
    def of(cls, manifest: FeatureManifest, limits: TokenLimits, classes: int) -> InputSchema:
        dims = manifest.input_dims()
        if not dims:
            raise ConfigError("no post has features of any of the modalities asked for")
        tokens: dict[Stream, int] = {s: int(getattr(limits, s)) for s in dims}
        return cls(dims, tokens, classes, manifest.image_as_frames)

    def arrays(
        self, features: Features, without: frozenset[Modality] = frozenset()
    ) -> dict[Stream, FeatureArray]:
        """Return a post's features as the model takes them: images joined, tokens thinned.

        float16 ``(n, dim)`` with 1 ≤ n ≤ tokens, for the streams that are there and that the model
        knows; all streams of the modalities ``without`` are left out.
        """
        arrays: dict[Stream, list[FeatureArray]] = {}
        for stream in STREAMS:
            array = features.arrays.get(stream)
            if array is None or modality_of(stream) in without or not len(array):
                continue
            target = "video" if self.image_as_frames and stream == "image" else stream
            if target not in self.dims:
                continue
            if array.ndim != 2 or array.shape[1] != self.dims[target]:
                raise FeatureError(
                    f"post {features.post_id}: {stream} features are {array.shape}, "
                    f"the model takes (n, {self.dims[target]})"
                )
            arrays.setdefault(target, []).append(array)
        return {
            s: _thin(parts[0] if len(parts) == 1 else np.concatenate(parts), self.tokens[s], s)
            for s, parts in arrays.items()
        }


def _thin(array: FeatureArray, most: int, stream: Stream) -> FeatureArray:
    """Take at most ``most`` tokens ``(n, dim)``: a text's beginning, evenly spaced otherwise."""
    if len(array) <= most:
        return array
    if stream in TEXT_STREAMS:
        return array[:most]
    # Centres of equal segments, as TSN samples.
    centres = ((np.arange(most) + 0.5) * (len(array) / most)).astype(np.intp)
    return array[centres]


@dataclass(frozen=True)
class Sample:
    """One post as the model takes it.

    Attributes:
        arrays: Features float16 ``(n, dim)`` for each stream that is there; media ``(n, ...)``.
        target: float32 ``(classes,)`` of 0 and 1; None where the truth is not known.
        author: Empty where the data file names none.
    """

    post_id: str
    arrays: Mapping[Stream, npt.NDArray[Any]]
    target: npt.NDArray[np.float32] | None = None
    author: str = ""


class Batch(NamedTuple):
    """Posts padded to the longest of each stream; a tuple, which Fabric and loaders walk into.

    Attributes:
        tokens: float32 ``(posts, n, dim)``, zeros behind the end; n may be 0.
        masks: bool ``(posts, n)``, True where there is a token.
        targets: float32 ``(posts, classes)``, or None.
        authors: Of each post; empty for one without.
    """

    post_ids: tuple[str, ...]
    tokens: Mapping[Stream, torch.Tensor]
    masks: Mapping[Stream, torch.Tensor]
    targets: torch.Tensor | None = None
    authors: tuple[str, ...] = ()

    @property
    def truth(self) -> torch.Tensor:
        """Return the targets; ValueError without."""
        if self.targets is None:
            raise ValueError("a training batch needs targets")
        return self.targets

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            self.post_ids,
            {m: t.to(device, non_blocking=True) for m, t in self.tokens.items()},
            {m: t.to(device, non_blocking=True) for m, t in self.masks.items()},
            None if self.targets is None else self.targets.to(device, non_blocking=True),
            self.authors,
        )


class Collate:
    """A maker of batches for one schema; pickles, so that loader processes can use it."""

    def __init__(self, schema: InputSchema) -> None:
        self._dims = dict(schema.dims)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        tokens: dict[Stream, torch.Tensor] = {}
        masks: dict[Stream, torch.Tensor] = {}
        for stream, dim in self._dims.items():
            arrays = [sample.arrays.get(stream) for sample in samples]
            tokens[stream], masks[stream] = padded(arrays, (dim,), np.float32)
        return batch_of(samples, tokens, masks)


def padded(
    arrays: Sequence[npt.NDArray[Any] | None], shape: tuple[int, ...], dtype: npt.DTypeLike
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return arrays ``(n, *shape)`` padded with zeros to the longest, and their mask.

    ``(posts, n, *shape)`` and bool ``(posts, n)``; None is an array of length 0.
    """
    lengths = [0 if array is None else len(array) for array in arrays]
    rows = np.zeros((len(arrays), max(lengths), *shape), dtype)
    for row, array in zip(rows, arrays, strict=True):
        if array is not None:
            row[: len(array)] = array
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]  # (posts, n)
    return torch.from_numpy(rows), torch.from_numpy(mask)


def batch_of(
    samples: Sequence[Sample],
    tokens: Mapping[Stream, torch.Tensor],
    masks: Mapping[Stream, torch.Tensor],
) -> Batch:
    """Return a batch with the samples' IDs and, where all have some, their targets."""
    targets = [sample.target for sample in samples if sample.target is not None]
    return Batch(
        tuple(sample.post_id for sample in samples),
        tokens,
        masks,
        torch.from_numpy(np.stack(targets)) if len(targets) == len(samples) else None,
        tuple(sample.author for sample in samples),
    )


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
        present: bool ``(posts,)``, True where the post has the stream and it was not hidden.
    """

    logits: torch.Tensor
    own: Mapping[Stream, torch.Tensor]
    present: Mapping[Stream, torch.Tensor]


class GroupLinear(nn.Module):
    """A linear layer for each of ``groups`` vectors; together they give the classes, in order.

    Attributes:
        weight: ``(groups, width, classes of a group)``.
        bias: ``(classes,)``.
    """

    def __init__(self, width: int, classes: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, width, -(-classes // groups)))
        nn.init.xavier_normal_(self.weight)
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Map ``(posts, groups, width)`` to logits ``(posts, classes)``."""
        # (groups, posts, width) · (groups, width, n) -> (posts, groups · n), the last some spare
        each = torch.bmm(vectors.transpose(0, 1), self.weight).transpose(0, 1).flatten(1)
        return each[:, : len(self.bias)] + self.bias


class FusionModel(nn.Module):
    """A batch of posts in, logits ``(posts, classes)`` out.

    Padding, and what stands in the padding, changes nothing; a missing stream is left out or
    replaced by a learned vector. With ``model.auxiliary`` each stream also has a head of its own,
    which is there for training only.

    Attributes:
        classify: The last layer, ``(...) -> (classes)``; a model with others names
            them in `classifiers`.
        own_weight: Weight of the own heads' losses; 0 makes no such heads.
        takes_none: `fuse` also takes n = 0, outside training: a stream of no post costs nothing.
    """

    classify: nn.Linear | GroupLinear
    takes_none: ClassVar[bool] = False

    def __init__(self, schema: InputSchema, settings: ModelSettings) -> None:
        super().__init__()
        self.schema = schema
        self.streams: tuple[Stream, ...] = tuple(schema.dims)
        self.drop = ModalityDropout(settings.modality_dropout)
        self.own_weight = settings.auxiliary
        self.has_own_heads = self.own_weight > 0

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

        n is at least 1 (see `takes_none`); the True ones of a mask stand before the False ones.
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

    def classifiers(self) -> tuple[nn.Linear | GroupLinear, ...]:
        """Return the layers that give logits, without own heads."""
        return (self.classify,)

    def solutions(self, batches: Iterable[Batch]) -> Iterator[float] | None:
        """Set the weights of one solution after another from all training posts; yield their loss.

        None for models that are trained by steps.
        """
        return None

    def make_room(self, state: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        """Give buffers that hold training posts the lengths that they have in a state dict."""

    def undecayed(self) -> frozenset[str]:
        """Return names of parameters that are learned vectors, though they have two dimensions."""
        return frozenset()

    def start_at(self, frequencies: torch.Tensor) -> None:
        """Let the untrained model predict each class's frequency ``(classes,)``: saves epochs."""
        for head in (*self.classifiers(), *self._own_heads().values()):
            start_head(head, frequencies, 0.02)

    def _add_own_heads(self, widths: Mapping[Stream, int]) -> None:
        """Add own heads, last in ``__init__``, with the widths of `Fused.alone`."""
        if self.has_own_heads:
            classes = self.schema.classes
            self.own = nn.ModuleDict({m: nn.Linear(w, classes) for m, w in widths.items()})

    def _own_heads(self) -> dict[Stream, nn.Linear]:
        if not self.has_own_heads:
            return {}
        return {stream: cast("nn.Linear", self.own[stream]) for stream in self.streams}

    def _fused(self, batch: Batch) -> tuple[Fused, Mapping[Stream, torch.Tensor]]:
        masks, tokens = self.drop(batch.masks), batch.tokens
        if self.training or not self.takes_none:
            masks = {m: _some(mask) for m, mask in masks.items()}
            tokens = {m: _some(rows) for m, rows in tokens.items()}
        # Zero where masked: a NaN in the padding would pass through 0 · NaN.
        tokens = {m: tokens[m].masked_fill(~masks[m][:, :, None], 0.0) for m in self.streams}
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
        by_modality: dict[Modality, torch.Tensor] = {}
        for stream, mask in masks.items():
            modality, some = modality_of(stream), mask.any(dim=1)
            by_modality[modality] = by_modality.get(modality, some) | some
        names = list(by_modality)
        present = torch.stack(list(by_modality.values()), dim=1)  # (posts, modalities)
        draw = torch.rand(present.shape, device=present.device)
        # The present one with the highest draw always stays.
        stays = draw.masked_fill(~present, -1.0).argmax(dim=1, keepdim=True)
        keeps = (draw >= self.chance).scatter(1, stays, True)
        keep_of = {m: keeps[:, i : i + 1] for i, m in enumerate(names)}  # (posts, 1) each
        return {s: mask & keep_of[modality_of(s)] for s, mask in masks.items()}


def start_head(head: nn.Linear | GroupLinear, frequencies: torch.Tensor, std: float) -> None:
    """Let an untrained layer that gives logits predict each class's frequency ``(classes,)``."""
    nn.init.normal_(head.weight, std=std)
    with torch.no_grad():
        # Clamped: the logit of a class that no post or every post has is infinite.
        head.bias.copy_(torch.logit(frequencies.clamp(1e-3, 1 - 1e-3)))


def learned_vectors(schema: InputSchema, width: int) -> nn.ParameterDict:
    """Return a small random vector ``(width,)`` for each stream."""
    return nn.ParameterDict({m: nn.Parameter(torch.randn(width) * 0.02) for m in schema.dims})


def or_missing(vector: torch.Tensor, mask: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    """Return vectors ``(posts, width)``, and ``missing`` for posts whose ``mask`` is all False."""
    return torch.where(mask.any(dim=1, keepdim=True), vector, missing)


def masked_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average tokens ``(posts, n, dim)`` where the mask ``(posts, n)`` is True; zeros for none.

    Tokens must be finite, also where masked.
    """
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)  # (posts, 1)
    return tokens.masked_fill(~mask[:, :, None], 0.0).sum(dim=1) / count
