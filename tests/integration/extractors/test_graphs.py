"""Encoders as OpenVINO runs them: the vectors of torch, from a cache that is never trusted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch

from common.precision import cpu_has_bf16
from config.features import Engine, ImageSettings, TextSettings
from extractors.models import engines
from extractors.models.base import RowExtractor
from extractors.models.engines import load_graph, openvino_is_installed
from extractors.models.text import TextExtractor
from extractors.models.visual import VisualExtractor
from tests.support.processes import python
from tests.support.tiny_models import TINY_CNN, tiny_bert

pytestmark = pytest.mark.skipif(not openvino_is_installed(), reason="openvino is not installed")

CHANCE = np.random.default_rng(3)
PICTURES = [CHANCE.integers(0, 256, (n, 64, 64, 3), np.uint8) for n in (1, 4, 7)]
TEXTS = ["one red cat", "a", "two blue dogs run at the seaside " * 9]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "insighttag" / "graphs"


def pictures(engine: Engine = "auto") -> VisualExtractor:
    settings = ImageSettings(
        arch=TINY_CNN, weights="random:1", image_size=64, precision="fp32", engine=engine
    )
    extractor = VisualExtractor("image", settings)
    extractor.load()
    return extractor


def vectors(extractor: RowExtractor, items: list[object]) -> np.ndarray:
    rows = extractor.forward([extractor.preprocess(item) for item in items])
    return np.concatenate(rows).astype(np.float32)


def assert_same(rows: np.ndarray, expected: np.ndarray) -> None:
    cosines = (
        (rows * expected).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(expected, axis=1)
    )
    assert rows.shape == expected.shape
    assert cosines.min() > 0.9999


@pytest.fixture
def next_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forget the graphs of this process, as the next one does."""
    return lambda: monkeypatch.setattr(engines, "_graphs", {})


def graphs(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/graph.xml"))


def test_pictures_have_torchs_vectors_and_fingerprint(cache: Path) -> None:
    """Features of one engine serve with the other, in batches of every size."""
    by_graph, by_torch = pictures(), pictures("torch")
    assert len(graphs(cache)) == 1
    assert_same(vectors(by_graph, [*PICTURES]), vectors(by_torch, [*PICTURES]))
    assert by_graph.fingerprint == by_torch.fingerprint


@pytest.mark.parametrize("pooling", ["tokens", "last"])
def test_texts_have_torchs_vectors(pooling: str, cache: Path, tmp_path: Path) -> None:
    """Texts of other lengths than those that the graph was traced with, in every pooling."""
    arch = str(tiny_bert(tmp_path / "bert"))
    both = []
    for engine in ("auto", "torch"):
        settings = TextSettings(arch=arch, pooling=pooling, precision="fp32", engine=engine)
        extractor = TextExtractor(settings)
        extractor.load()
        both.append(vectors(extractor, [*TEXTS]))
    assert len(graphs(cache)) == 1
    assert_same(*both)


def test_a_graph_is_loaded_once() -> None:
    """Extractors of one process share it: OpenVINO's models can never be freed."""
    first, second = pictures(), pictures()
    assert first._encoder._graph is second._encoder._graph is not None
    first.close()
    assert_same(vectors(second, [*PICTURES]), vectors(pictures("torch"), [*PICTURES]))


def test_a_graph_is_traced_once(cache: Path, next_process: Callable[[], None]) -> None:
    """The next process takes it from the cache."""
    pictures()
    [file] = graphs(cache)
    was = file.stat().st_mtime_ns
    next_process()
    pictures()
    assert [each.stat().st_mtime_ns for each in graphs(cache)] == [was]


@pytest.mark.parametrize("damage", ["cut", "another's"])
def test_a_wrong_graph_is_made_again(
    damage: str, cache: Path, next_process: Callable[[], None]
) -> None:
    """Each is held against torch: neither half a file nor other weights give other vectors."""
    pictures()
    [file] = graphs(cache)
    weights = file.with_suffix(".bin")
    content = weights.read_bytes()
    numbers = np.frombuffer(content[: len(content) // 4 * 4], np.float32)
    other = (numbers * -0.5).astype(np.float32).tobytes()
    weights.write_bytes(content[:100] if damage == "cut" else other)
    next_process()
    assert_same(vectors(pictures(), [*PICTURES]), vectors(pictures("torch"), [*PICTURES]))
    assert weights.read_bytes() == content


def test_without_a_home_it_runs_all_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A cache that cannot be written costs time at the start, and nothing else."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert_same(vectors(pictures(), [*PICTURES]), vectors(pictures("torch"), [*PICTURES]))


def test_a_network_that_cannot_be_traced_runs_in_torch() -> None:
    """Where a graph differs from the network, the log says so, and torch serves."""

    class Moody(torch.nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows * (1.0 if len(rows) == 2 else -1.0)  # tracing keeps the first branch

    rows = [[np.ones((n, 3), np.float32)] for n in (2, 3)]
    network = Moody()
    with structlog.testing.capture_logs() as logs:
        graph = load_graph(
            network, network, rows, arithmetic="fp32", named="moody", depends_on="moody"
        )
    assert graph is None
    assert [(line["event"], line["use"]) for line in logs] == [
        ("extractors.graph_differs", "torch")
    ]


@pytest.mark.skipif(not cpu_has_bf16(), reason="OpenVINO computes in float32 here")
def test_bfloat16_is_left_where_it_differs() -> None:
    """A network that rounds away what tells its vectors apart runs in float32."""

    class Fine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.apart = torch.nn.Linear(8, 8, bias=False)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            far = torch.full_like(rows, 1000.0)
            apart: torch.Tensor = self.apart(rows + far) - self.apart(far)
            return apart

    network = Fine().requires_grad_(False)
    rows = [[CHANCE.normal(size=(n, 8)).astype(np.float32)] for n in (2, 3)]
    graph = load_graph(network, network, rows, arithmetic="bf16", named="fine", depends_on="fine")
    assert graph is not None
    assert graph.arithmetic == "fp32"


def test_processes_do_not_share_one_core() -> None:
    """By default OpenVINO binds the threads of each process to the same cores, the first ones."""
    loaded: Any = pictures()._encoder._graph
    assert loaded.request.get_compiled_model().get_property("ENABLE_CPU_PINNING") is False


def test_nothing_is_reported_to_anybody() -> None:
    """OpenVINO reports each use by a package of its own: it is never imported, by OCR neither."""
    code = """
import sys
from config.features import ImageSettings, OcrSettings
from extractors.models.ocr import OcrExtractor
from extractors.models.visual import VisualExtractor
OcrExtractor(OcrSettings(engine="openvino")).load()
image = ImageSettings(arch="test_resnet", weights="random:1", image_size=64, precision="fp32")
VisualExtractor("image", image).load()
utils = sys.modules["openvino.tools.ovc.telemetry_utils"]
print(sys.modules["openvino_telemetry"], utils.tm.__name__)
"""
    done = python("-c", code, check=True)
    assert done.stdout.splitlines()[-1] == "None openvino.tools.ovc.telemetry_stub"
