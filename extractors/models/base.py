"""Base classes: an encoder is a network on a device, an extractor adds its preprocessing.

A new family of encoders is one file with a subclass of `Encoder`, which builds the network and
says how it is called; loading, precision, batches, checks and fingerprints are done here, once.

On the CPU OpenVINO runs the networks that it can, in a half to a third of torch's time. Each is
traced once and kept as a graph in the user's cache (``~/.cache/insighttag``, or below
``XDG_CACHE_HOME``), by a digest of all that it depends on. A graph is held against torch when it is
loaded, so that one that is wrong or out of date is never used.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import warnings
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import structlog

from common.errors import ConfigError, FeatureError, one_line
from common.files import new_folder
from common.fingerprint import digest
from common.post import FeatureArray, Stream
from common.precision import Arithmetic, require_device, resolve_precision
from config.features import (
    AsrSettings,
    AudioSettings,
    ExtractorName,
    TextSettings,
    VideoLstmSettings,
    VisualSettings,
)
from extractors.models.weights import Weights, parse_weights, weights_digest

if TYPE_CHECKING:
    import torch

Rows: TypeAlias = npt.NDArray[Any]
EncoderSettings: TypeAlias = (
    VisualSettings | VideoLstmSettings | AudioSettings | TextSettings | AsrSettings
)

_LARGEST_FLOAT16 = 65504.0

LEAST_COSINE = 0.999
"""Of a graph's vectors and those of torch in float32: what every encoder keeps between bfloat16 and
float32. Less would show in tags; in float32 graphs reach 0.99999."""

_FORMAT = 1  # of the cached graphs: another one makes them anew
_GRAPH = "graph.xml"

# A model of OpenVINO gives the thread that loads it a stack for signals, and frees it at its end
# while it may still be in use: the next signal that Python handles then kills the process.
_never_freed: list[Any] = []
# So a graph, once loaded, serves all later encoders of this process that depend on the same.
_graphs: dict[tuple[Path, Arithmetic, int], Graph] = {}

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

    def __init__(self, setting: str, settings: EncoderSettings, device: str) -> None:
        self.setting, self.device = setting, device
        self._named = "" if isinstance(settings, VideoLstmSettings) else settings.arch
        self._weights, self._precision = settings.weights or "pretrained", settings.precision
        self._engine = getattr(settings, "engine", "torch")
        self._arithmetic: Arithmetic = "fp32"
        self._network: Any = None
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
        cast_weights(network, self._arithmetic)
        layout = {"memory_format": torch.channels_last} if self.channels_last else {}
        self._network = network.to(device, **layout)

    def close(self) -> None:
        """Free the network, and give its memory back to the device."""
        self._network = self._graph = self._uploads = None
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

    def run(self, *inputs: Rows) -> FeatureArray:
        """Return float16 ``(n, dim)``, finite or not, for ``(n, ...)`` as the encoder takes it."""
        return self.begin(*inputs)()

    def begin(self, *inputs: Rows) -> Callable[[], FeatureArray]:
        """Begin a pass, and return the function that waits for its result (see `run`).

        On a GPU all of it is only queued: its inputs can load while an earlier pass computes.
        """
        if self._graph is not None:
            outputs = self._graph(*inputs)
            rows = outputs.clip(-_LARGEST_FLOAT16, _LARGEST_FLOAT16).astype(np.float16)
            return lambda: rows
        import torch

        tensors = [torch.from_numpy(array) for array in inputs]
        if self.device != "cpu":
            tensors = self._uploaded(tensors)
        with torch.inference_mode():
            with autocast(self.device, self._arithmetic):
                output = self._call(*tensors)
            features = to_float16(self.postprocess(output.float()))
            return _download(features)

    def _uploaded(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return copies on the GPU, made on a stream of their own out of pinned memory."""
        import torch

        cuda: Any = torch.cuda
        if self._uploads is None:
            self._uploads = cuda.Stream(self.device)
        computing = cuda.current_stream(self.device)
        with cuda.stream(self._uploads):
            copies = [each.pin_memory().to(self.device, non_blocking=True) for each in tensors]
        computing.wait_stream(self._uploads)
        for copy in copies:
            copy.record_stream(computing)  # else its memory could be used again too early
        return copies

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
        if self.device != "cpu" or self._engine == "torch" or not openvino_is_installed():
            return None
        examples = self._examples()
        if not examples:
            return None
        return load_graph(
            lambda *inputs: self.postprocess(self._call(*inputs).float()),
            self._network,
            examples,
            arithmetic=self._arithmetic,
            named=f"{self.setting}.arch: {self._named}",
            depends_on=[type(self).__name__, self.kind, self.arch, self.digest, *self._built_in()],
        )

    def _examples(self) -> Sequence[Sequence[Rows]]:
        """Return two batches that differ in each dimension that may vary; none: torch runs it."""
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
        """Return float32 ``(n, 3, height, width)``."""
        # (n, h, w, c) as (n, c, h, w): a view, which torch takes as channels_last
        return pixels.permute(0, 3, 1, 2).float().sub_(self._shift).mul_(self._scale)


class RowExtractor(Extractor):
    """Arrays of rows for an encoder: ``(n, *shape)`` -> float16 ``(n, dim)``, a row for each.

    Attributes:
        batch_size: Rows of a pass at most; features do not depend on it, but for rounding.
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
        """Run the rows of all items in batches that cross the borders between items.

        A device that runs out of memory halves the batches of this call.
        """
        borders = np.cumsum([0, *(len(item) for item in items)]).tolist()
        out = np.empty((borders[-1], self.dim), np.float16)
        start, batch_size = 0, self.batch_size

        def begun() -> Iterator[Callable[[], FeatureArray]]:
            for first in range(start, len(out), batch_size):
                stop = first + batch_size
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

                if not isinstance(error, torch.cuda.OutOfMemoryError) or batch_size == 1:
                    raise
                torch.cuda.empty_cache()
                batch_size = max(1, batch_size // 2)
                _log.warning("extractors.batch_halved", batch_size=batch_size)
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


def check_finite(name: str, features: FeatureArray) -> None:
    """Refuse features that are not finite; half precision overflows."""
    if not np.isfinite(features).all():
        raise FeatureError(
            f"{name}: the model gave values that are not finite; try features.{name}.precision=fp32"
        )


def _torch_dtype(arithmetic: Arithmetic) -> torch.dtype:
    """Return the torch dtype of an arithmetic."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[arithmetic]


def cast_weights(model: torch.nn.Module, arithmetic: Arithmetic) -> None:
    """Store linear and convolution weights in the arithmetic's dtype, in place.

    Autocast would cast them again in every forward pass; casting once gives the same numbers, half
    the memory and a third more speed on single pictures. Norms, embeddings and subclasses, which
    may compute on their weights, stay float32.
    """
    if arithmetic == "fp32":
        return
    from torch import nn

    exact = {nn.Linear, nn.Conv2d}
    for module in model.modules():
        if type(module) in exact:
            module.to(_torch_dtype(arithmetic))


def autocast(device: str, arithmetic: Arithmetic) -> AbstractContextManager[Any]:
    """Use mixed precision for one forward pass; do nothing for fp32."""
    if arithmetic == "fp32":
        return nullcontext()
    import torch

    return torch.autocast(device.partition(":")[0], dtype=_torch_dtype(arithmetic))


def to_float16(tensor: torch.Tensor) -> torch.Tensor:
    """Return float16; values beyond its range are clamped, NaN stays NaN."""
    import torch

    return tensor.float().clamp(-_LARGEST_FLOAT16, _LARGEST_FLOAT16).to(torch.float16)


def _download(features: torch.Tensor) -> Callable[[], FeatureArray]:
    """Begin to copy features off their device, and return the function that waits for them."""
    import torch

    if features.device.type == "cpu":
        return features.numpy
    copy = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
    copy.copy_(features, non_blocking=True)
    cuda: Any = torch.cuda
    done = cuda.Event()
    done.record(cuda.current_stream(features.device))

    def wait() -> FeatureArray:
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


def openvino_is_installed() -> bool:
    """Return True when the package is there."""
    return importlib.util.find_spec("openvino") is not None


def quiet_openvino() -> Any:
    """Return the package, without the one by which it reports its use to its maker.

    To be called before anything else imports it.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def keep_alive(model: Any) -> None:
    """Keep a model, or what holds one, until the process ends."""
    _never_freed.append(model)


def compiled(model: Any, arithmetic: Arithmetic, threads: int) -> Any:
    """Return a request of a model of OpenVINO, for one caller at a time."""
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        # By default each process binds its threads to the first cores: two processes then share
        # one core, at half the speed.
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "bf16" if arithmetic == "bf16" else "f32",
    }
    request = quiet_openvino().Core().compile_model(model, "CPU", options).create_infer_request()
    keep_alive(request)
    return request


class Graph:
    """A compiled graph: batches of inputs in, float32 vectors out."""

    def __init__(self, model: Any, arithmetic: Arithmetic, threads: int) -> None:
        self.arithmetic = arithmetic
        self._request = compiled(model, arithmetic, threads)
        self._lock = threading.Lock()

    def __call__(self, *inputs: Rows) -> npt.NDArray[np.float32]:
        """Return float32 vectors, a copy of what the graph gives."""
        with self._lock:
            output: npt.NDArray[np.float32] = self._request.infer(list(inputs))[0].copy()
        return output


def load_graph(
    call: Callable[..., torch.Tensor],
    network: torch.nn.Module,
    examples: Sequence[Sequence[Rows]],
    *,
    arithmetic: Arithmetic,
    named: str,
    depends_on: object,
) -> Graph | None:
    """Return the graph of a network, or None where torch has to run it.

    Args:
        call: Vectors of tensors by the network, in float32.
        network: Its parameters are in float32.
        examples: Two batches of inputs, of other sizes in every dimension that may vary.
        arithmetic: In bfloat16 only if its vectors are near enough to torch's.
        named: For the log.
        depends_on: All that the graph depends on, the weights' digest included.
    """
    import torch

    openvino = quiet_openvino()
    versions = [torch.__version__, openvino.__version__, _FORMAT]
    cached = _cache() / digest({"of": depends_on, "versions": versions}) / _GRAPH
    threads = torch.get_num_threads()
    key = (cached, arithmetic, threads)
    if key in _graphs:
        return _graphs[key]
    tensors = [[torch.from_numpy(each) for each in inputs] for inputs in examples]
    try:
        with torch.inference_mode():
            expected = [call(*each).float().numpy() for each in tensors]
    except Exception:  # noqa: BLE001 - of a wrong setting: its first run says which
        return None

    def fitting(model: Any) -> Graph | None:
        for choice in dict.fromkeys((arithmetic, "fp32")):
            graph = Graph(model, choice, threads)
            outputs = [graph(*inputs) for inputs in examples]
            if min(map(_cosine, outputs, expected)) >= LEAST_COSINE:
                return _graphs.setdefault(key, graph)
        return None

    if cached.is_file():
        with suppress(Exception):  # cut, or another network's: it is made again
            if (graph := fitting(openvino.Core().read_model(cached))) is not None:
                return graph
    try:
        model = _traced(call, network, tensors)
        graph = fitting(model)
    except Exception as error:  # noqa: BLE001 - tracing runs code of any model: torch can run it
        _log.warning("extractors.no_graph", encoder=named, use="torch", reason=one_line(error, 200))
        return None
    if graph is None:
        _log.warning("extractors.graph_differs", encoder=named, use="torch")
        return None
    # Without a home, or with a full disk, it is traced at every start.
    with suppress(OSError, RuntimeError):
        _keep(model, cached)
    return graph


def _traced(
    call: Callable[..., torch.Tensor], network: torch.nn.Module, tensors: Sequence[Sequence[Any]]
) -> Any:
    """Return a model of OpenVINO; dimensions in which the examples differ stay open."""
    import torch

    openvino = quiet_openvino()

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network  # tracing takes parameters of modules only

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return call(*inputs).float()

    first, second = tensors
    trace: Any = torch.jit.trace
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every branch that depends on a size
        traced = trace(Whole().eval(), tuple(first), check_trace=False)
        model = openvino.convert_model(traced, example_input=tuple(first))
    for port, one, other in zip(model.inputs, first, second, strict=True):
        sides = [a if a == b else -1 for a, b in zip(one.shape, other.shape, strict=True)]
        port.get_node().set_partial_shape(openvino.PartialShape(sides))
    model.validate_nodes_and_infer_types()
    return model


def _keep(model: Any, cached: Path) -> None:
    with new_folder(cached.parent) as part:
        quiet_openvino().save_model(model, part / _GRAPH, compress_to_fp16=False)


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "insighttag" / "graphs"


def _cosine(a: Rows, b: Rows) -> float:
    """Return the least cosine of two arrays' vectors; 0 where shapes or numbers are wrong."""
    if a.shape != b.shape or not np.isfinite(a).all():
        return 0.0
    rows = [each.reshape(-1, each.shape[-1]).astype(np.float64) for each in (a, b)]
    norms = np.linalg.norm(rows[0], axis=1) * np.linalg.norm(rows[1], axis=1)
    return float(((rows[0] * rows[1]).sum(axis=1) / norms.clip(1e-12)).min())
