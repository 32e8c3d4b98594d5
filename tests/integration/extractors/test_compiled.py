"""Encoders with `engine: compile`: the vectors of torch, and nothing to compile once loaded."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch

from config.features import AudioSettings, Engine, ImageSettings, TextSettings
from extractors.models.audio import AudioExtractor
from extractors.models.base import RowExtractor
from extractors.models.engines import compile_pass
from extractors.models.text import TextExtractor
from extractors.models.visual import VisualExtractor
from tests.support import tiny_encoders
from tests.support.tiny_models import TINY_VIT, tiny_bert

CHANCE = np.random.default_rng(3)
PICTURES = [CHANCE.integers(0, 256, (n, 64, 64, 3), np.uint8) for n in (1, 4, 7, 2)]
WORDS = "two blue dogs run at the seaside "


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Compile everything anew, and leave nothing behind."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace passes as for the compiler, and run the traces in torch: g++ takes half a minute."""
    whole: Any = torch.compile
    monkeypatch.setattr(torch, "compile", partial(whole, backend="eager"))


def pictures(engine: Engine) -> RowExtractor:
    settings = ImageSettings(
        arch=TINY_VIT, weights="random:1", image_size=64, precision="fp32", engine=engine
    )
    return VisualExtractor("image", settings)


def loaded(extractor: RowExtractor) -> tuple[RowExtractor, list[Any]]:
    """Load an extractor; gives the lines of the log that tell of its engine too."""
    with structlog.testing.capture_logs() as logs:
        extractor.load()
    return extractor, [line for line in logs if "compiled" in line["event"]]


def each_alone(extractor: RowExtractor, items: list[Any]) -> np.ndarray:
    rows = [extractor.forward([extractor.preprocess(item)])[0] for item in items]
    return np.concatenate(rows).astype(np.float32)


def assert_same(one: np.ndarray, other: np.ndarray) -> None:
    cosines = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert one.shape == other.shape
    assert cosines.min() > 0.9999


def assert_compiled_as_torch(compiled: RowExtractor, plain: RowExtractor, items: list[Any]) -> None:
    compiled, lines = loaded(compiled)
    assert lines == []
    plain, _ = loaded(plain)
    assert compiled.fingerprint == plain.fingerprint
    with torch.compiler.set_stance("fail_on_recompile"):
        vectors = each_alone(compiled, items)
    assert_same(vectors, each_alone(plain, items))


@pytest.mark.usefixtures("traced_alone")
def test_pictures_in_batches_of_any_size() -> None:
    assert_compiled_as_torch(pictures("compile"), pictures("torch"), [*PICTURES])


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_a_compiled_pass_takes_any_number_of_rows() -> None:
    """With the real compiler, which takes minutes for a whole encoder."""
    rows = [CHANCE.normal(size=(n, 8)).astype(np.float32) for n in (2, 3, 7, 1)]

    def run(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.sigmoid() * 2 - tensor

    def of_examples(call: Callable[[torch.Tensor], torch.Tensor]) -> list[np.ndarray]:
        return [call(torch.from_numpy(each)).numpy() for each in (*rows[:2], rows[3])]

    fast = compile_pass(run, of_examples, [rows[:1], rows[1:2]], named="a pass")
    assert fast is not run
    with torch.compiler.set_stance("fail_on_recompile"):
        for each in map(torch.from_numpy, rows):
            np.testing.assert_allclose(fast(each), run(each), atol=1e-6)


@pytest.mark.usefixtures("traced_alone")
def test_texts_of_any_length(tmp_path: Path) -> None:
    arch = str(tiny_bert(tmp_path / "bert"))
    both = [
        TextExtractor(TextSettings(arch=arch, pooling="mean", precision="fp32", engine=engine))
        for engine in ("compile", "torch")
    ]
    assert_compiled_as_torch(both[0], both[1], ["a", WORDS, WORDS * 3, WORDS * 6])


@pytest.mark.usefixtures("traced_alone")
def test_sounds_with_their_spectrograms(tmp_path: Path) -> None:
    arch = str(tiny_encoders.ast(tmp_path))
    both = [
        AudioExtractor(AudioSettings(arch=arch, precision="fp32", engine=engine))
        for engine in ("compile", "torch")
    ]
    windows = CHANCE.normal(0, 0.1, (4, 163_840)).astype(np.float32)
    windows[2, 9000:] = 0
    assert_compiled_as_torch(both[0], both[1], [windows[:1], windows[1:]])


def test_without_a_compiler_torch_runs_it() -> None:
    """A host without g++ starts all the same, and the log says so once."""
    from torch._inductor import config

    # What monkeypatch changes in this configuration does not exist after its undoing.
    with config.patch({"cpp.cxx": ("/no/such/compiler",)}):
        extractor, lines = loaded(pictures("compile"))
    assert [(line["event"], line["use"]) for line in lines] == [
        ("extractors.not_compiled", "torch")
    ]
    plain, _ = loaded(pictures("torch"))
    assert_same(each_alone(extractor, [*PICTURES]), each_alone(plain, [*PICTURES]))
