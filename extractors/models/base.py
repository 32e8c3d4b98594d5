"""What every extractor is, and how a batch of items becomes chunks of rows for a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import structlog

from common.errors import ConfigError, FeatureError
from common.post import FeatureArray
from config.settings import ExtractorName

Rows = npt.NDArray[Any]

_log = structlog.get_logger()


class Extractor(Protocol):
    """One model: a batch of items in, the same number of results out, in order.

    Attributes:
        name: Which extractor it is.
        dim: Columns of the feature arrays, known after `load`; 0 for OCR, which gives text.
        fingerprint: Digest of architecture, weights and preprocessing, known after `load`.
    """

    name: ExtractorName
    dim: int
    fingerprint: str

    def load(self) -> None:
        """Load the weights onto the device.

        Raises:
            ConfigError: One line: what is missing or wrong, and which setting or file mends it.
        """

    def preprocess(self, item: Any) -> Any:
        """Check and prepare one item on the CPU.

        Raises:
            FeatureError: The item is not what this extractor takes.
        """

    def forward(self, items: Sequence[Any]) -> list[Any]:
        """Run prepared items; a result does not depend on the other items.

        Raises:
            FeatureError: The model gave values that are no features.
        """

    def close(self) -> None:
        """Free the model; a later `load` starts anew."""


def check_device(device: str) -> None:
    """See that a CUDA device is there.

    Raises:
        ConfigError: It is not.
    """
    if device == "cpu":
        return
    import torch

    kind, _, index = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 0
    if int(index or 0) >= count:
        raise ConfigError(f"device {device}: this process sees {count} CUDA devices")


def check_rows(name: str, item: Any, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Rows:
    """See that an item is an array ``(n, *shape)`` of a dtype.

    Raises:
        FeatureError: It is not.
    """
    wanted = np.dtype(dtype)
    if not isinstance(item, np.ndarray):
        raise FeatureError(f"{name}: an item must be an array, not {type(item).__name__}")
    if item.dtype != wanted or item.shape[1:] != shape or item.ndim != len(shape) + 1:
        sides = ", ".join(map(str, shape))
        raise FeatureError(
            f"{name}: an item must be {wanted.name} (n, {sides}), not {item.dtype} {item.shape}"
        )
    return item


def check_finite(name: str, features: FeatureArray) -> FeatureArray:
    """See that a model gave finite values.

    Raises:
        FeatureError: It did not, as half precision does when it overflows.
    """
    if not np.isfinite(features).all():
        raise FeatureError(
            f"{name}: the model gave values that are not finite; try features.{name}.precision=fp32"
        )
    return features


def run_rows(
    items: Sequence[Rows], *, dim: int, batch_size: int, run: Callable[[Rows], FeatureArray]
) -> list[FeatureArray]:
    """Run the rows of all items in chunks that cross the borders between items.

    Args:
        items: Arrays ``(n_i, ...)`` of one dtype; n_i may be 0.
        dim: Columns of the result.
        batch_size: Rows of one chunk; halved for this call when the device runs out of memory.
        run: ``(rows, ...)`` ─► float16 ``(rows, dim)``.

    Returns:
        float16 ``(n_i, dim)`` for each item, in order.
    """
    borders = np.cumsum([0, *(len(item) for item in items)])
    total = int(borders[-1])
    out = np.empty((total, dim), np.float16)
    start = 0
    while start < total:
        stop = min(start + batch_size, total)
        pieces = [
            item[max(start - first, 0) : stop - first]
            for item, first in zip(items, borders.tolist(), strict=False)
            if first < stop and first + len(item) > start
        ]
        try:
            # concatenate copies: shared memory is read-only and torch wants writable arrays
            out[start:stop] = run(np.concatenate(pieces))
        except RuntimeError as error:
            if not _out_of_memory(error) or batch_size == 1:
                raise
            batch_size = max(1, batch_size // 2)
            _log.warning("extractors.batch_halved", batch_size=batch_size)
            continue
        start = stop
    return [out[a:b] for a, b in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)]


def _out_of_memory(error: RuntimeError) -> bool:
    import torch

    if not isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    torch.cuda.empty_cache()
    return True
