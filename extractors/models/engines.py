"""Ways to run a network besides plain torch, each held against it when an encoder is loaded.

On the CPU OpenVINO runs the networks that it can, in a half to a third of torch's time. Each is
traced once and kept as a graph in the user's cache (``~/.cache/insighttag``, or below
``XDG_CACHE_HOME``), by a digest of all that it depends on. A graph is held against torch when it is
loaded, so that one that is wrong or out of date is never used.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import structlog

from common.errors import one_line
from common.files import new_folder
from common.fingerprint import digest
from common.precision import Arithmetic

if TYPE_CHECKING:
    import torch

LEAST_COSINE = 0.999
"""Of a graph's vectors and those of torch in float32: what every encoder keeps between bfloat16 and
float32. Less would show in tags; in float32 graphs reach 0.99999."""

_FORMAT = 1  # of the cached graphs: another one makes them anew
_GRAPH = "graph.xml"

_PASSES = 64
"""Compiled passes of one process: two or three of each encoder. Beyond the limit torch runs what it
could not compile, without a word; its own is 8."""

# A model of OpenVINO gives the thread that loads it a stack for signals, and frees it at its end
# while it may still be in use: the next signal that Python handles then kills the process.
_never_freed: list[Any] = []
# So a graph, once loaded, serves all later encoders of this process that depend on the same.
_graphs: dict[tuple[Path, Arithmetic, int], Graph] = {}

_log = structlog.get_logger()


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


@dataclass(frozen=True)
class Graph:
    """A compiled graph: a request takes batches of inputs and gives float32 vectors.

    Attributes:
        request: For one caller at a time; it keeps what it gives, and writes over it.
        lock: Held by the caller until the vectors are copied.
    """

    request: Any
    arithmetic: Arithmetic
    lock: threading.Lock = field(default_factory=threading.Lock)


def load_graph(
    call: Callable[..., torch.Tensor],
    network: torch.nn.Module,
    examples: Sequence[Sequence[npt.NDArray[Any]]],
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
    cached = _cache("graphs") / digest({"of": depends_on, "versions": versions}) / _GRAPH
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
            graph = Graph(compiled(model, choice, threads), choice)
            outputs = [graph.request.infer([*inputs])[0].copy() for inputs in examples]
            if min(map(least_cosine, outputs, expected)) >= LEAST_COSINE:
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


def compile_pass(
    run: Callable[..., torch.Tensor],
    of_examples: Callable[[Callable[..., torch.Tensor]], Sequence[npt.NDArray[Any]]],
    examples: Sequence[Sequence[npt.NDArray[Any]]],
    *,
    named: str,
) -> Callable[..., torch.Tensor]:
    """Return a pass compiled by torch.compile for any number of rows, or as it is.

    All that it needs is compiled here: dimensions in which the examples differ stay open, but one
    row is always compiled by itself.

    Args:
        run: Vectors of tensors on their device.
        of_examples: Its results for the examples, one row among them.
        examples: Two batches of inputs, as for `load_graph`.
        named: For the log.
    """
    import torch

    try:
        first, second = examples
        sides = [
            [side for side, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if a != b]
            for one, other in zip(first, second, strict=True)
        ]
        compiler: Any = importlib.import_module("torch._inductor.config")
        tracer: Any = importlib.import_module("torch._dynamo")
        compiler.compile_threads = 1  # more are processes, which a worker must not leave behind
        tracer.config.recompile_limit = _PASSES
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_cache("compiled")))
        fast = torch.compile(run)

        def marked(*tensors: torch.Tensor) -> torch.Tensor:
            for tensor, open_sides in zip(tensors, sides, strict=True):
                tracer.maybe_mark_dynamic(tensor, open_sides)
            return fast(*tensors)

        cosine = min(map(least_cosine, of_examples(marked), of_examples(run)))
    except Exception as error:  # noqa: BLE001 - of a compiler that is missing, or code it cannot do
        reason = one_line(error, 200)
        _log.warning("extractors.not_compiled", encoder=named, use="torch", reason=reason)
        return run
    if cosine < LEAST_COSINE:
        _log.warning("extractors.compiled_differs", encoder=named, use="torch")
        return run
    return fast


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


def _cache(of: str) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "insighttag" / of


def least_cosine(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Return the least cosine of two arrays' vectors; 0 where shapes or numbers are wrong."""
    if a.shape != b.shape or not np.isfinite(a).all():
        return 0.0
    rows = [each.reshape(-1, each.shape[-1]).astype(np.float64) for each in (a, b)]
    norms = np.linalg.norm(rows[0], axis=1) * np.linalg.norm(rows[1], axis=1)
    return float(((rows[0] * rows[1]).sum(axis=1) / norms.clip(1e-12)).min())
