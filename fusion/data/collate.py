"""Features of several posts -> one padded batch with masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from common.post import FeatureArray, Stream
from fusion.data.schema import InputSchema


@dataclass(frozen=True)
class Sample:
    """One post as the model takes it.

    Attributes:
        arrays: float16 ``(n, dim)`` for each stream that is there.
        target: float32 ``(classes,)`` of 0 and 1; None where the truth is not known.
    """

    post_id: str
    arrays: Mapping[Stream, FeatureArray]
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
            lengths = [0 if array is None else len(array) for array in arrays]
            padded = np.zeros((len(samples), max(lengths), dim), np.float32)
            for row, array in zip(padded, arrays, strict=True):
                if array is not None:
                    row[: len(array)] = array
            tokens[stream] = torch.from_numpy(padded)
            masks[stream] = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
        targets = [sample.target for sample in samples if sample.target is not None]
        return Batch(
            tuple(sample.post_id for sample in samples),
            tokens,
            masks,
            torch.from_numpy(np.stack(targets)) if len(targets) == len(samples) else None,
        )
