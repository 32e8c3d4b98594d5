"""Export of models: ONNX, ``torch.export``, or a legacy ``.pth``, each checked against the model.

A `Graph` is a module with named inputs whose batch and token counts are free, and inputs on which
the written file must give the same as the module.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from common.errors import ConfigError, TaggingError, one_line, told
from common.files import publish, sync_file, write_whole
from common.post import Stream
from fusion.bundle.bundle import Bundle
from fusion.bundle.export_lstm import exportable, onnx_translations
from fusion.bundle.legacy import save_legacy
from fusion.models.base import Batch

Format: TypeAlias = Literal["onnx", "torch", "state_dict", "pickle"]
Inputs: TypeAlias = Sequence[torch.Tensor]
Runner: TypeAlias = Callable[[Inputs], npt.NDArray[np.float32]]

# Largest difference of a score or feature to the model's: runtimes add float32 in another order.
# Much less would refuse good files; much more could let a wrong operator through.
TOLERANCE = 1e-4
# Of ONNX's operators; `export_lstm` writes its LSTM for the same one.
_OPSET = 18
# Just under the 2 GiB that protobuf allows for a file; a larger one would need files next to it.
_LARGEST_ONNX = 2_000_000_000


@dataclass(frozen=True)
class Port:
    """One input of a graph: its free axes and the names of their lengths, and the most of each."""

    name: str
    free: Mapping[int, str]
    most: Mapping[str, int]


@dataclass(frozen=True)
class Graph:
    """The model that is exported.

    Attributes:
        module: In evaluation mode, float32, on the CPU; tensors in the order of ``ports`` in, one
            tensor out.
        legacy: The model itself, for ``.pth``.
        example: Inputs that the module is traced with; every free length is at least 2.
        cases: Name -> inputs that are compared.
        about: Entries of the JSON file next to it.
    """

    module: nn.Module
    legacy: nn.Module
    ports: tuple[Port, ...]
    output: str
    example: Inputs
    cases: Mapping[str, Inputs]
    about: Mapping[str, Any]


class ExportRefused(TaggingError):
    """The exporter cannot write this model."""


class ParityError(TaggingError):
    """An exported file gives other numbers than the model."""


@dataclass(frozen=True)
class Exported:
    """The file that was written, and for each case its largest difference to the model."""

    path: Path
    sidecar: Path
    how: str
    differences: Mapping[str, float]

    @property
    def largest(self) -> float:
        return max(self.differences.values())


def export(graph: Graph, form: Format, path: Path) -> Exported:
    """Write a graph, and compare the file with the module before it gets its name.

    ``<name>.json`` next to it holds inputs, output, labels, thresholds and the like. A module that
    cannot be written is `ExportRefused`, a file that gives other numbers `ParityError`.
    """
    writers: Mapping[Format, Callable[[Graph, Path], tuple[str, Runner]]] = {
        "onnx": _write_onnx,
        "torch": _write_torch,
        "state_dict": lambda graph, path: _write_legacy(graph, path, whole=False),
        "pickle": lambda graph, path: _write_legacy(graph, path, whole=True),
    }
    sidecar = path.with_name(f"{path.name}.json")
    with told(f"{path}: cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            part = Path(folder) / f"part{path.suffix}"
            how, runner = writers[form](graph, part)
            exported = Exported(path, sidecar, how, _differences(graph, runner))
            if not exported.largest <= TOLERANCE:
                worst = max(exported.differences, key=lambda case: exported.differences[case])
                raise ParityError(
                    f"{path}: is not written: it differs from the model by {exported.largest:.2e} "
                    f"({worst}), allowed are {TOLERANCE:.0e}"
                )
            about = {
                "format": form,
                "made_by": how,
                "inputs": [asdict(port) for port in graph.ports],
                "output": graph.output,
                "largest_difference": exported.largest,
                **graph.about,
            }
            write_whole(sidecar, json.dumps(about, ensure_ascii=False, indent=1))
            sync_file(part)
            publish(part, path)
    return exported


def _write_onnx(graph: Graph, path: Path) -> tuple[str, Runner]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  the exporter needs it
    except ImportError as error:
        raise ConfigError(
            f"onnx: {error.name} is not installed: pip install '.[export]'"
        ) from error
    if sum(p.numel() * p.element_size() for p in graph.module.parameters()) > _LARGEST_ONNX:
        raise ConfigError("onnx: a file has at most 2 GB: use --format torch")
    with _quiet(), _refused("onnx"):
        program = torch.onnx.export(
            _Positional(exportable(graph.module, "onnx")),
            tuple(graph.example),
            input_names=[port.name for port in graph.ports],
            output_names=[graph.output],
            dynamic_shapes=_shapes(graph),
            dynamo=True,
            opset_version=_OPSET,
            custom_translation_table=dict(onnx_translations()),
            verbose=False,
        )
    if program is None:
        raise ConfigError("onnx: this version of torch has no suitable exporter")
    program.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [port.name for port in graph.ports]

    def run(inputs: Inputs) -> npt.NDArray[np.float32]:
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return np.asarray(session.run([graph.output], feed)[0])

    return f"torch.onnx {torch.__version__.partition('+')[0]}, opset {_OPSET}", run


def _write_torch(graph: Graph, path: Path) -> tuple[str, Runner]:
    with _quiet(), _refused("torch"):
        program = torch.export.export(
            _Positional(exportable(graph.module, "torch")),
            tuple(graph.example),
            dynamic_shapes=_shapes(graph),
            strict=False,
        )
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()

    def run(inputs: Inputs) -> npt.NDArray[np.float32]:
        with _quiet(), torch.no_grad():
            return np.asarray(loaded(*inputs).numpy())

    return f"torch.export {torch.__version__.partition('+')[0]}", run


def _write_legacy(graph: Graph, path: Path, *, whole: bool) -> tuple[str, Runner]:
    save_legacy(graph.legacy, path, whole=whole)
    before = {key: value.clone() for key, value in graph.legacy.state_dict().items()}
    if whole:
        # Our own file, written a moment ago.
        state = torch.load(path, weights_only=False).state_dict()
    else:
        state = torch.load(path, weights_only=True)

    def run(inputs: Inputs) -> npt.NDArray[np.float32]:
        graph.legacy.load_state_dict(state)
        try:
            return _reference(graph, inputs)
        finally:
            graph.legacy.load_state_dict(before)

    return "torch.save", run


class _Positional(nn.Module):
    """A module that takes ``*inputs``, so that free lengths are given by position."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.module(*inputs)


def _shapes(graph: Graph) -> tuple[tuple[dict[int, Any], ...]]:
    """Return the free lengths of each input of `_Positional`."""
    most = {name: value for port in graph.ports for name, value in port.most.items()}
    names = {name for port in graph.ports for name in port.free.values()}
    made = {name: torch.export.Dim(name, min=1, max=most.get(name)) for name in sorted(names)}
    return (tuple({axis: made[name] for axis, name in p.free.items()} for p in graph.ports),)


def _reference(graph: Graph, inputs: Inputs) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        return np.asarray(graph.module(*inputs).numpy())


def _differences(graph: Graph, runner: Runner) -> dict[str, float]:
    differences: dict[str, float] = {}
    for name, inputs in graph.cases.items():
        expected, output = _reference(graph, inputs), runner(inputs)
        largest = math.inf
        if expected.shape == output.shape:
            largest = float(np.abs(expected - output).max())
        differences[name] = math.inf if math.isnan(largest) else largest
    return differences


@contextmanager
def _refused(form: Format) -> Iterator[None]:
    with torch.no_grad():
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # exporters raise many types
            cause = error.__cause__ or error
            text = one_line(cause, 300)
            raise ExportRefused(f"{form}: the model cannot be exported: {text}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' warnings about themselves; errors are still raised."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


class FusionScores(nn.Module):
    """A bundle's model, or ensemble, with tensors for inputs; its scores before calibration.

    Takes tokens float32 ``(posts, n, dim)`` and mask bool ``(posts, n)`` of each stream in turn,
    gives float32 ``(posts, classes)`` in [0, 1].
    """

    def __init__(self, model: nn.Module, streams: Sequence[Stream]) -> None:
        super().__init__()
        self.model, self.streams = model, tuple(streams)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        tokens = dict(zip(self.streams, inputs[::2], strict=True))
        masks = dict(zip(self.streams, inputs[1::2], strict=True))
        scores: torch.Tensor = torch.sigmoid(self.model(Batch((), tokens, masks)))
        return scores


def fusion_graph(bundle: Bundle) -> Graph:
    """Return a bundle's graph: a stream's tokens under its name, its mask as ``<stream>_mask``.

    A stream that a post does not have is a mask of False over one token of anything.
    """
    dims, most = bundle.schema.dims, bundle.schema.tokens
    ports: list[Port] = []
    for stream in dims:
        length = f"{stream}_tokens"
        for name in (stream, f"{stream}_mask"):
            ports.append(Port(name, {0: "posts", 1: length}, {length: most[stream]}))
    calibration = bundle.calibration
    return Graph(
        module=FusionScores(bundle.model, tuple(dims)).eval(),
        legacy=bundle.model,
        ports=tuple(ports),
        output="scores",
        example=_tokens(bundle, 2, {s: 2 + i for i, s in enumerate(dims)}, seed=0),
        cases=_fusion_cases(bundle),
        about={
            "bundle": bundle.name,
            "version": bundle.version,
            "labels": bundle.labels.as_json(),
            "thresholds": [float(t) for t in bundle.thresholds],
            "calibration": calibration.model_dump(mode="json") if calibration else None,
            "scores": "sigmoid of the logits; calibrate them, then compare with the thresholds",
            "features": {s: {"dim": d, "tokens": most[s]} for s, d in bundle.schema.dims.items()},
            "fingerprints": dict(bundle.manifest.fingerprints),
            "image_as_frames": bundle.manifest.image_as_frames,
            "ocr_mode": bundle.manifest.ocr_mode,
        },
    )


def _fusion_cases(bundle: Bundle) -> dict[str, Inputs]:
    dims, most = bundle.schema.dims, bundle.schema.tokens
    one = dict.fromkeys(dims, 1)
    some = {s: min(most[s], 3 + 2 * i) for i, s in enumerate(dims)}
    cases: dict[str, Inputs] = {
        "one post, one token each": _tokens(bundle, 1, one, seed=1),
        "one post": _tokens(bundle, 1, some, seed=2),
        "many posts, padded": _tokens(bundle, 7, some, seed=3),
        "as many tokens as allowed": _tokens(bundle, 2, dict(most), seed=4),
        "nothing at all": _tokens(bundle, 2, one, seed=5, without=tuple(dims)),
    }
    for stream in dims:
        cases[f"no {stream}"] = _tokens(bundle, 3, some, seed=6, without=(stream,))
    return cases


def _tokens(
    bundle: Bundle,
    posts: int,
    counts: Mapping[Stream, int],
    *,
    seed: int,
    without: Sequence[Stream] = (),
) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    inputs: list[torch.Tensor] = []
    for stream, dim in bundle.schema.dims.items():
        count = counts[stream]
        lengths = torch.randint(1, count + 1, (posts, 1), generator=chance)
        lengths[0] = count
        if stream in without:
            lengths.zero_()
        mask = torch.arange(count)[None, :] < lengths  # (posts, n)
        tokens = torch.randn(posts, count, dim, generator=chance)
        inputs += [tokens * mask[:, :, None], mask]
    return inputs
