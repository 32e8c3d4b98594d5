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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from common.errors import ConfigError, TaggingError, one_line
from common.files import sync_file
from fusion.bundle.export_lstm import exportable, onnx_translations
from fusion.bundle.legacy import save_legacy

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
_NOISY = ("onnxscript", "onnx_ir", "torch.onnx")


@dataclass(frozen=True)
class Port:
    """One input of a graph.

    Attributes:
        free: Axis -> name of its length; the others are fixed.
        most: Name of a length -> its largest value.
    """

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
        output: Name of the output.
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


@dataclass(frozen=True)
class Exported:
    """The file that was written.

    Attributes:
        how: The exporter's name.
        differences: Case -> largest absolute difference to the model.
        sidecar: The JSON file next to it.
    """

    path: Path
    sidecar: Path
    how: str
    differences: Mapping[str, float]

    @property
    def largest(self) -> float:
        """Return the largest difference of all."""
        return max(self.differences.values())


def export(graph: Graph, form: Format, path: Path) -> Exported:
    """Write a graph, and compare the file with the module before it gets its name.

    ``<name>.json`` next to it holds inputs, output, labels, thresholds and the like.

    Raises:
        ConfigError: A package is missing, or the file cannot be written.
        ExportRefused: The exporter cannot write the module.
        ParityError: The file gives other numbers than the module.
    """
    writers: Mapping[Format, Callable[[Graph, Path], tuple[str, Runner]]] = {
        "onnx": _write_onnx,
        "torch": _write_torch,
        "state_dict": lambda graph, path: _write_legacy(graph, path, whole=False),
        "pickle": lambda graph, path: _write_legacy(graph, path, whole=True),
    }
    sidecar = path.with_name(f"{path.name}.json")
    try:
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
            about = Path(folder) / "about.json"
            text = json.dumps(_about(graph, form, exported), ensure_ascii=False, indent=1)
            about.write_text(text + "\n", encoding="utf-8")
            for file, target in ((about, sidecar), (part, path)):
                sync_file(file)
                file.replace(target)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from error
    return exported


class ExportRefused(TaggingError):
    """The exporter cannot write this model."""


class ParityError(TaggingError):
    """An exported file gives other numbers than the model."""


def _write_onnx(graph: Graph, path: Path) -> tuple[str, Runner]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  the exporter needs it
    except ImportError as error:
        raise ConfigError(
            f"onnx: {error.name} is not installed: pip install insighttag[export]"
        ) from error
    if sum(p.numel() * p.element_size() for p in graph.module.parameters()) > _LARGEST_ONNX:
        raise ConfigError("onnx: a file holds at most 2 GB: use --format torch")
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
        raise ConfigError("onnx: this version of torch has no exporter that gives a program")
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

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.module(*inputs)
        return output


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
        same = expected.shape == output.shape
        # A NaN is a difference too: no comparison with it is true.
        differences[name] = float(np.abs(expected - output).max()) if same else math.inf
    return {name: math.inf if math.isnan(d) else d for name, d in differences.items()}


def _about(graph: Graph, form: Format, exported: Exported) -> dict[str, Any]:
    ports = [
        {
            "name": port.name,
            "free": {str(axis): name for axis, name in port.free.items()},
            "most": dict(port.most),
        }
        for port in graph.ports
    ]
    return {
        "format": form,
        "made_by": exported.how,
        "inputs": ports,
        "output": graph.output,
        "largest_difference": exported.largest,
        **graph.about,
    }


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
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
