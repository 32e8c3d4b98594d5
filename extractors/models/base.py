"""Base classes: an encoder is a network on a device, an extractor adds its preprocessing.

A new family of encoders is one file with a subclass of `Encoder`, which builds the network and
says how it is called, and one line: in `extractors.parts.AUDIO_ENCODERS` for sound, in
`extractors.models.visual.make_backbone` for pictures. Loading, precision, batches, checks and
fingerprints are done here, once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import structlog

from common.errors import ConfigError, FeatureError
from common.post import FeatureArray, Stream
from common.precision import (
    Arithmetic,
    Precision,
    autocast,
    cast_weights,
    resolve_precision,
    to_float16,
)
from config.settings import ExtractorName
from extractors.fingerprint import digest
from extractors.models.weights import Weights, parse_weights, weights_digest

if TYPE_CHECKING:
    import torch

Rows = npt.NDArray[Any]

_log = structlog.get_logger()


class Extractor(ABC):
    """One modality: a batch of items in, the same number of results out, in order.

    Attributes:
        name: Of the modality.
        dim: Columns of the feature arrays, known after `load`; 0 for OCR, which gives text.
        fingerprint: Digest of architecture, weights and preprocessing, known after `load`.
    """

    name: ExtractorName
    dim = 0
    fingerprint = ""
    _loaded = False

    def load(self) -> None:
        """Load the weights onto the device; a second call does nothing.

        Raises:
            ConfigError: One line: what is missing or wrong, and the setting or file that helps.
        """
        if not self._loaded:
            self.fingerprint = digest(self._load())
            self._loaded = True

    def close(self) -> None:
        """Free the model; a later `load` starts again."""
        if self._loaded:
            self._close()
        self._loaded = False

    def further(self) -> Mapping[Stream, tuple[int, str]]:
        """Return columns and fingerprint of streams that it gives next to its own."""
        return {}

    @abstractmethod
    def preprocess(self, item: Any) -> Any:
        """Check and prepare one item on the CPU.

        Raises:
            FeatureError: The item is not what this extractor takes.
        """

    @abstractmethod
    def forward(self, items: Sequence[Any]) -> list[Any]:
        """Run prepared items; a result does not depend on the other items.

        Raises:
            FeatureError: The model gave values that are not finite.
        """

    @abstractmethod
    def _load(self) -> Mapping[str, Any]:
        """Load, set `dim`, and return everything that the features depend on."""

    @abstractmethod
    def _close(self) -> None: ...


class Encoder(ABC):
    """A network on one device; several users may share it: the last one to close it frees it.

    Args:
        setting: Section of the settings, for errors: ``features.image``.
        weights: ``pretrained``, a path, or ``random:SEED``.
        precision: Of the forward pass.
        device: ``cpu`` or ``cuda:N``.

    Attributes:
        kind: The family, part of the features' fingerprint.
        dim: Length of a vector, known after `load`.
        digest: Of the weights, known after `load`.
    """

    kind: ClassVar[str]

    def __init__(self, setting: str, *, weights: str, precision: Precision, device: str) -> None:
        self.setting, self.device = setting, device
        self.dim, self.digest = 0, ""
        self._weights, self._precision = weights, precision
        self._arithmetic: Arithmetic = "fp32"
        self._network: Any = None
        self._users = 0

    def load(self) -> None:
        """Load the weights onto the device, for one more user.

        Raises:
            ConfigError: The architecture, its weights or the device cannot be had.
        """
        if self._network is None:
            self._load()
        self._users += 1

    def close(self) -> None:
        """Free the network when its last user closes it."""
        self._users = max(0, self._users - 1)
        if self._users == 0:
            self._network = None
            free_device(self.device)

    @property
    def model(self) -> torch.nn.Module:
        """Return the loaded network for export, without the work of `_call` around it."""
        if self._network is None:
            raise RuntimeError("load() comes first")
        network: torch.nn.Module = self._network
        return network

    def run(self, rows: Rows, name: str) -> FeatureArray:
        """Return float16 ``(n, dim)`` for ``(n, ...)`` rows.

        Args:
            rows: In the shape and dtype that the encoder takes.
            name: Of the modality, for errors.

        Raises:
            FeatureError: The network gave values that are not finite.
        """
        import torch

        return check_finite(name, self.infer(torch.from_numpy(rows)))

    def infer(self, *inputs: torch.Tensor) -> FeatureArray:
        """Return the network's output for CPU tensors, in float16, finite or not."""
        import torch

        tensors = [tensor.to(self.device) for tensor in inputs]
        with torch.inference_mode():
            with autocast(self.device, self._arithmetic):
                output = self._call(*tensors)
            features: FeatureArray = to_float16(self.postprocess(output.float())).numpy()
        return features

    def postprocess(self, features: torch.Tensor) -> torch.Tensor:
        """Return float32 features as they are; a family may change them, in full precision."""
        return features

    @abstractmethod
    def _build(self, weights: Weights) -> Any:
        """Return the network with its weights, on the CPU, in float32."""

    @abstractmethod
    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the vectors of one batch of inputs on the device."""

    @abstractmethod
    def _find_dim(self) -> int:
        """Return the length of a vector of the loaded network."""

    def _parse_weights(self) -> Weights:
        return parse_weights(self._weights, setting=f"{self.setting}.weights")

    def _digest(self, weights: Weights, network: Any) -> str:
        files = [weights.path] if weights.path is not None else []
        return weights_digest(weights, files, network.state_dict())

    def _load(self) -> None:
        import torch

        check_device(self.device)
        self._arithmetic = resolve_precision(
            self._precision, self.device, setting=f"{self.setting}.precision"
        )
        weights = self._parse_weights()
        network = self._build(weights)
        network.eval().requires_grad_(False)
        self.digest = self._digest(weights, network)
        cast_weights(network, self._arithmetic)
        self._network = network.to(self.device, memory_format=torch.channels_last)
        try:
            self.dim = self._find_dim()
        except BaseException:
            self._network = None
            raise


def free_device(device: str) -> None:
    """Give memory of dropped models back to the device."""
    if device == "cpu":
        return
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()


def check_device(device: str) -> None:
    """Raise where a CUDA device is missing.

    Raises:
        ConfigError: This process does not see the device.
    """
    if device == "cpu":
        return
    import torch

    kind, _, index = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 0
    if int(index or 0) >= count:
        raise ConfigError(f"device {device}: this process sees {count} CUDA devices")


def check_rows(name: str, item: Any, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Rows:
    """Return an item that is an array ``(n, *shape)`` of a dtype.

    Raises:
        FeatureError: It is not.
    """
    expected = np.dtype(dtype)
    if not isinstance(item, np.ndarray):
        raise FeatureError(f"{name}: an item must be an array, not {type(item).__name__}")
    if item.dtype != expected or item.shape[1:] != shape or item.ndim != len(shape) + 1:
        sides = ", ".join(map(str, shape))
        raise FeatureError(
            f"{name}: an item must be {expected.name} (n, {sides}), not {item.dtype} {item.shape}"
        )
    return item


def check_finite(name: str, features: FeatureArray) -> FeatureArray:
    """Return features that are finite.

    Raises:
        FeatureError: They are not; half precision overflows.
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
        run: ``(rows, ...)`` -> float16 ``(rows, dim)``.

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
