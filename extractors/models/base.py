"""Base classes: an encoder is a network on a device, an extractor adds its preprocessing.

A new family of encoders is one file with a subclass of `Encoder`, which builds the network and
says how it is called; loading, precision, batches, checks and fingerprints are done here, once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import structlog

from common.errors import ConfigError, FeatureError, is_device_lost, is_out_of_memory
from common.fingerprint import digest
from common.post import FeatureArray, Stream
from common.precision import (
    Arithmetic,
    autocast,
    copy_in_half,
    require_device,
    resolve_precision,
    torch_dtype,
)
from config.features import (
    AsrSettings,
    AudioSettings,
    ExtractorName,
    TextSettings,
    VideoLstmSettings,
    VisualSettings,
)
from extractors.models.engines import (
    LEAST_COSINE,
    Graph,
    compile_pass,
    least_cosine,
    load_graph,
    openvino_is_installed,
)
from extractors.models.weights import Weights, parse_weights, weights_digest

if TYPE_CHECKING:
    import torch

Rows: TypeAlias = npt.NDArray[Any]
EncoderSettings: TypeAlias = (
    VisualSettings | VideoLstmSettings | AudioSettings | TextSettings | AsrSettings
)

_LARGEST_FLOAT16 = 65504.0

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

    def load(self) -> None:
        """Load the weights onto the device; ConfigError names the setting or file that helps."""
        self.fingerprint = digest(self._load())

    def streams(self) -> Mapping[Stream, tuple[int, str]]:
        """Return columns and fingerprint of each stream that it gives."""
        return {self.name: (self.dim, self.fingerprint)}

    @abstractmethod
    def close(self) -> None:
        """Free the model; a later `load` starts again."""

    @abstractmethod
    def preprocess(self, item: Any) -> Any:
        """Check and prepare one item on the CPU; FeatureError for what is no item of it."""

    @abstractmethod
    def forward(self, items: Sequence[Any]) -> list[Any]:
        """Run prepared items; a result does not depend on the other items, and is finite."""

    def embed_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return unit vectors ``(n, dim)`` of texts in the space of the features."""
        raise ConfigError(f"features.{self.name}: embeds no texts")

    @abstractmethod
    def _load(self) -> Mapping[str, Any]:
        """Load, set `dim`, and return everything that the features depend on."""


class Encoder(ABC):
    """A network on one device; extractors may share it.

    `setting` names the section of the settings in errors: ``features.image``.

    Attributes:
        kind: The family, part of the features' fingerprint.
        arch: Shape of the network, part of the fingerprint.
        dim: Length of a vector, known after `load`.
        digest: Of the weights, known after `load`.
        processing: Digest of the files that say how the encoder itself prepares its input, known
            after `load`; empty where it takes rows as they are.
    """

    kind: ClassVar[str]
    arch = ""
    dim = 0
    digest = ""
    processing = ""

    channels_last: ClassVar[bool] = True
    """Pictures are laid out for it; networks of clips have weights that it does not fit."""

    traced: ClassVar[bool] = False
    """OpenVINO can run `_call`."""

    def __init__(self, setting: str, settings: EncoderSettings, device: str) -> None:
        self.setting, self.device = setting, device
        self._named = "" if isinstance(settings, VideoLstmSettings) else settings.arch
        self._weights, self._precision = settings.weights or "pretrained", settings.precision
        self._engine = getattr(settings, "engine", "torch")
        self._arithmetic: Arithmetic = "fp32"  # of products
        self._mixed: Arithmetic = "fp32"  # of products where the rest is in float32
        self._network: Any = None
        self._pass: Callable[..., torch.Tensor] = self._features
        self._graph: Graph | None = None
        self._uploads: Any = None

    def load(self) -> None:
        """Load the weights onto the device, once; ConfigError when one of them cannot be had."""
        if self._network is not None:
            return
        import torch

        device = require_device(self.device)
        self._arithmetic = resolve_precision(
            self._precision, self.device, setting=f"{self.setting}.precision"
        )
        weights = parse_weights(self._weights, setting=f"{self.setting}.weights", arch=self._named)
        network = self._build(weights)
        network.eval().requires_grad_(False)
        self.digest = self._digest(weights, network)
        self._network = network
        self._graph = self._find_graph()
        if self._graph is not None:
            return
        layout = {"memory_format": torch.channels_last} if self.channels_last else {}
        self._network = network.to(device, **layout)
        self._lower_precision()
        if self._engine == "compile":
            self._pass = compile_pass(
                self._features, self._of_examples, self._examples(), named=self._full_name
            )

    def close(self) -> None:
        """Free the network, and give its memory back to the device."""
        self._network = self._graph = self._uploads = None
        self._pass = self._features
        if self.device != "cpu":
            import gc

            import torch

            gc.collect()
            torch.cuda.empty_cache()

    @property
    def model(self) -> torch.nn.Module:
        """Return the loaded network for export, without the work of `_call` around it."""
        network: torch.nn.Module = self._network
        return network

    @property
    def _full_name(self) -> str:
        return f"{self.setting}.arch: {self._named}"

    def run(self, *inputs: Rows) -> FeatureArray:
        """Return float16 ``(n, dim)``, finite or not, for ``(n, ...)`` as the encoder takes it."""
        return self.begin(*inputs)()

    def begin(self, *inputs: Rows) -> Callable[[], FeatureArray]:
        """Begin a pass, and return the function that waits for its result (see `run`).

        On a GPU all of it is only queued: its inputs can load while an earlier pass computes.
        """
        if self._graph is not None:
            with self._graph.lock:
                vectors = self._graph.request.infer([*inputs])[0]
                rows = vectors.clip(-_LARGEST_FLOAT16, _LARGEST_FLOAT16).astype(np.float16)
            return lambda: rows
        import torch

        tensors = [torch.from_numpy(array) for array in inputs]
        if self._uploads is None:
            self._uploads = Uploads(self.device)
        tensors = self._uploads(tensors)
        with torch.inference_mode():
            return download(self._pass(*tensors))

    def embed_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return unit vectors ``(n, dim)`` of texts in the space of the features.

        Raises:
            ConfigError: The encoder has no text side.
        """
        raise ConfigError(
            f"{self.setting}.arch: {self._named} embeds no texts; tags can be found by their texts "
            "with CLIP, SigLIP, CLAP or a sentence encoder"
        )

    def postprocess(self, features: torch.Tensor) -> torch.Tensor:
        """Return float32 features as they are; a family may change them, in full precision."""
        return features

    def _features(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Return float16 ``(n, dim)`` of inputs on the device."""
        with autocast(self.device, self._mixed):
            output = self._call(*tensors)
        return to_float16(self.postprocess(output.float()))

    def _as_network(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return float values in the type that the network takes: its own, unless it is mixed."""
        return tensor.to(torch_dtype("fp32" if self._mixed != "fp32" else self._arithmetic))

    def _lower_precision(self) -> None:
        """Take as much half precision as leaves the vectors near those of float32.

        The whole network is a fifth faster on a GPU than products alone, between which values are
        cast to and fro; networks with batch norms often need the latter, or float32.
        """
        half, exact = self._arithmetic, self._network
        if half == "fp32":
            return
        self._arithmetic = "fp32"
        try:
            expected = self._of_examples(self._features)
        except Exception:  # noqa: BLE001 - of a wrong setting: its first run says which
            expected = []
        for whole in (True, False) if expected else (False,):
            self._network = copy_in_half(exact, half, whole=whole)
            self._arithmetic, self._mixed = half, "fp32" if whole else half
            if not expected:
                return
            try:
                cosine = min(map(least_cosine, self._of_examples(self._features), expected))
            except RuntimeError as error:  # types that do not go together
                pass_on_device_errors(error)  # float32 would take twice the memory
                cosine = 0.0
            if cosine >= LEAST_COSINE:
                return
            _log.info(
                "extractors.half_differs",
                encoder=self._full_name,
                use=f"{half} in products" if whole else "fp32",
                cosine=round(cosine, 5),
            )
        self._network, self._arithmetic, self._mixed = exact, "fp32", "fp32"

    def _of_examples(self, run: Callable[..., torch.Tensor]) -> list[FeatureArray]:
        """Return the vectors of the examples, and of the first row of one of them."""
        import torch

        batches = [*self._examples()]
        batches += [[rows[:1] for rows in batch] for batch in batches[:1]]
        # Outside inference mode, as `begin` makes them: a compiled pass tells them apart.
        tensors = [[torch.from_numpy(rows).to(self.device) for rows in batch] for batch in batches]
        with torch.inference_mode():
            return [run(*batch).cpu().numpy() for batch in tensors]

    @abstractmethod
    def _build(self, weights: Weights) -> Any:
        """Return the network with its weights, on the CPU, in float32, and set `dim`."""

    @abstractmethod
    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the vectors of one batch of inputs on the device."""

    def _digest(self, weights: Weights, network: Any) -> str:
        return weights_digest(weights, network.state_dict())

    def _find_graph(self) -> Graph | None:
        """Return the network as OpenVINO runs it; None on a GPU, and where torch has to."""
        on_cpu = self.device == "cpu" and self._engine == "auto" and self.traced
        if not on_cpu or not openvino_is_installed():
            return None
        examples = self._examples()
        if not examples:
            return None
        return load_graph(
            lambda *inputs: self.postprocess(self._call(*inputs).float()),
            self._network,
            examples,
            arithmetic=self._arithmetic,
            named=self._full_name,
            depends_on=[type(self).__name__, self.kind, self.arch, self.digest, *self._built_in()],
        )

    def _examples(self) -> Sequence[Sequence[Rows]]:
        """Return two batches that differ in each dimension that may vary.

        Other engines and precisions are held against torch in float32 by them; without any they
        are not used.
        """
        return ()

    def _built_in(self) -> Sequence[object]:
        """Return the JSON values, besides the weights, that are part of a graph of `_call`."""
        return ()


class PictureEncoder(Encoder):
    """An encoder of pictures uint8 RGB ``(n, height, width, 3)``, normalised on the device.

    Attributes:
        size: Height and width of the input in pixels.
        mean: Of each channel of values in [0, 1]; known after `load`, as `std`.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def _normalise_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        import torch

        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        shape = (1, 3, 1, 1)
        self._shift = torch.tensor(self.mean).view(shape).mul(255).to(self.device)
        self._scale = torch.tensor(self.std).view(shape).mul(255).reciprocal().to(self.device)

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return ``(n, 3, height, width)`` as the network takes it."""
        # (n, h, w, c) as (n, c, h, w): a view, which torch takes as channels_last
        pictures = pixels.permute(0, 3, 1, 2).float().sub_(self._shift).mul_(self._scale)
        return self._as_network(pictures)

    def _examples(self) -> Sequence[Sequence[Rows]]:
        return [[noisy_and_plain(n, (*self.size, 3))] for n in (2, 3)]


def noisy_and_plain(count: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Return example pictures uint8 ``(count, *shape)``: noise, and one of a single grey.

    EfficientNet-Lite0 in bfloat16 keeps the vectors of noise, and loses those of plain pictures.
    """
    pictures = np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)
    pictures[1] = 128
    return pictures


class RowExtractor(Extractor):
    """Arrays of rows for an encoder: ``(n, *shape)`` -> float16 ``(n, dim)``, a row for each.

    Attributes:
        batch_size: Rows of a pass at most; features do not depend on it, but for rounding. A device
            that runs out of memory halves it for good: it would run out again.
    """

    def __init__(
        self,
        name: ExtractorName,
        encoder: Encoder,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        batch_size: int,
    ) -> None:
        self.name = name
        self._encoder, self.batch_size = encoder, batch_size
        self._shape, self._dtype = shape, np.dtype(dtype)

    def close(self) -> None:
        self._encoder.close()

    def embed_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return self._encoder.embed_texts(texts)

    def preprocess(self, item: Any) -> Rows:
        if not isinstance(item, np.ndarray):
            raise FeatureError(f"{self.name}: an item must be an array, not {type(item).__name__}")
        shape = self._shape
        if item.dtype != self._dtype or item.shape[1:] != shape or item.ndim != len(shape) + 1:
            sides = ", ".join(map(str, shape))
            raise FeatureError(
                f"{self.name}: an item must be {self._dtype.name} (n, {sides}), "
                f"not {item.dtype} {item.shape}"
            )
        return item

    def forward(self, items: Sequence[Rows]) -> list[Any]:
        """Run the rows of all items in batches that cross the borders between items."""
        borders = np.cumsum([0, *(len(item) for item in items)]).tolist()
        out = np.empty((borders[-1], self.dim), np.float16)
        start = 0

        def begun() -> Iterator[Callable[[], FeatureArray]]:
            for first in range(start, len(out), self.batch_size):
                stop = first + self.batch_size
                near = slice(bisect_right(borders, first) - 1, bisect_left(borders, stop))
                pieces = [
                    item[max(first - border, 0) : stop - border]
                    for item, border in zip(items[near], borders[near], strict=False)
                ]
                # concatenate copies: shared memory is read-only and torch wants writable arrays
                yield self._encoder.begin(np.concatenate(pieces))

        while start < len(out):
            try:
                for rows in one_ahead(begun()):
                    out[start : start + len(rows)] = rows
                    start += len(rows)
            except RuntimeError as error:
                import torch

                if not is_out_of_memory(error) or self.batch_size == 1:
                    raise
                error.__traceback__ = None  # its frames hold the tensors that did not fit
                torch.cuda.empty_cache()
                self.batch_size = max(1, self.batch_size // 2)
                _log.warning("extractors.batch_halved", batch_size=self.batch_size)
        check_finite(self.name, out)
        return [out[a:b] for a, b in pairwise(borders)]

    def _load(self) -> Mapping[str, Any]:
        self._encoder.load()
        self.dim = self._encoder.dim
        return {
            "kind": self._encoder.kind,
            "arch": self._encoder.arch,
            "weights": self._encoder.digest,
            "dim": self.dim,
            **({"processor": prepared} if (prepared := self._encoder.processing) else {}),
            **self._preprocessing(),
        }

    @abstractmethod
    def _preprocessing(self) -> Mapping[str, Any]:
        """Return what the features depend on besides the model, under fixed names."""


def clean(text: str) -> str:
    """Return text without lone surrogates, which tokenizers refuse."""
    return text.encode(errors="replace").decode()


def unit_rows(extractor: Extractor, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return unit vectors float32 ``(n, dim)`` of texts by an extractor with one row for each."""
    items = extractor.forward([extractor.preprocess(text) for text in texts])
    if not all(map(len, items)):
        raise FeatureError("text: an empty text has no vector")
    return unit(np.concatenate([np.empty((0, extractor.dim)), *items]).astype(np.float32))


def unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return rows ``(n, dim)`` of norm 1; those of zeros stay so."""
    norms: npt.NDArray[np.float32] = np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    return rows / norms


def pass_on_device_errors(error: Exception) -> None:
    """Raise what says nothing about settings: full memory, or a device that is lost."""
    if is_out_of_memory(error) or is_device_lost(error):
        raise error


def check_finite(name: str, features: FeatureArray) -> None:
    """Refuse features that are not finite; half precision overflows."""
    if not np.isfinite(features).all():
        raise FeatureError(
            f"{name}: the model gave values that are not finite; try features.{name}.precision=fp32"
        )


def to_float16(tensor: torch.Tensor) -> torch.Tensor:
    """Return float16; values beyond its range are clamped, NaN stays NaN."""
    import torch

    return tensor.float().clamp(-_LARGEST_FLOAT16, _LARGEST_FLOAT16).to(torch.float16)


class Uploads:
    """Copies to a device; on a GPU on a stream of their own, while an earlier pass computes."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._stream: Any = None

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return copies on the GPU, out of pinned memory; on the CPU the tensors themselves."""
        if self._device == "cpu":
            return list(tensors)
        import torch

        cuda: Any = torch.cuda
        self._stream = self._stream or cuda.Stream(self._device)
        computing = cuda.current_stream(self._device)
        with cuda.stream(self._stream):
            copies = [each.pin_memory().to(self._device, non_blocking=True) for each in tensors]
        computing.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(computing)  # else its memory could be used again too early
        return copies


def download(features: torch.Tensor) -> Callable[[], Rows]:
    """Begin to copy a result off their device, and return the function that waits for them."""
    import torch

    if features.device.type == "cpu":
        return features.numpy
    copy = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
    copy.copy_(features, non_blocking=True)
    cuda: Any = torch.cuda
    done = cuda.Event(blocking=True)  # a thread sleeps until then; else it would keep a core busy
    done.record(cuda.current_stream(features.device))

    def wait() -> Rows:
        done.synchronize()  # of this pass alone: the next one may be queued behind it
        return copy.numpy()

    return wait


def one_ahead(begun: Iterable[Callable[[], FeatureArray]]) -> Iterator[FeatureArray]:
    """Yield the results of passes, each when the pass after it has begun.

    Two at once keep a GPU busy; more would only hold memory.
    """
    before: Callable[[], FeatureArray] | None = None
    for result in begun:
        if before is not None:
            yield before()
        before = result
    if before is not None:
        yield before()
