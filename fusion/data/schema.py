"""The input of a fusion model: its streams, their dims and tokens, and padded batches of posts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from common.errors import ConfigError, FeatureError
from common.post import STREAMS, FeatureArray, Features, Modality, Stream, modality_of
from config.fusion_models import TokenLimits

ORDERED: frozenset[Stream] = frozenset({"video", "audio", "text", "ocr"})
"""Streams whose tokens follow one another in time; images and whole videos have no order."""


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
        """Return the schema of a model for these features."""
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
        found: dict[Stream, list[FeatureArray]] = {}
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
            found.setdefault(target, []).append(array)
        return {
            s: _thin(parts[0] if len(parts) == 1 else np.concatenate(parts), self.tokens[s], s)
            for s, parts in found.items()
        }


def _thin(array: FeatureArray, most: int, stream: Stream) -> FeatureArray:
    """At most ``most`` tokens ``(n, dim)``: the beginning of a text, evenly spaced otherwise."""
    if len(array) <= most:
        return array
    if stream in ("text", "ocr"):
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
    """

    post_id: str
    arrays: Mapping[Stream, npt.NDArray[Any]]
    target: npt.NDArray[np.float32] | None = None


class Batch(NamedTuple):
    """Posts padded to the longest of each stream; a tuple, which Fabric and loaders walk into.

    Attributes:
        tokens: float32 ``(posts, n, dim)``, zeros behind the end; n may be 0.
        masks: bool ``(posts, n)``, True where there is a token.
        targets: float32 ``(posts, classes)``, or None.
    """

    post_ids: tuple[str, ...]
    tokens: Mapping[Stream, torch.Tensor]
    masks: Mapping[Stream, torch.Tensor]
    targets: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on a device."""
        return Batch(
            self.post_ids,
            {m: t.to(device, non_blocking=True) for m, t in self.tokens.items()},
            {m: t.to(device, non_blocking=True) for m, t in self.masks.items()},
            None if self.targets is None else self.targets.to(device, non_blocking=True),
        )


class Collate:
    """A maker of batches for one schema; pickles, so that loader processes can use it."""

    def __init__(self, schema: InputSchema) -> None:
        self._dims = dict(schema.dims)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Pad the posts' tokens and stack their targets."""
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
    mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
    return torch.from_numpy(rows), mask


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
    )
