"""Exported fusion models give what the model gives, in other runtimes."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import ConfigError
from common.post import Features, Modality
from fusion.bundle.bundle import Bundle, Ensemble, load_bundle
from fusion.bundle.export import ExportRefused, Format, ParityError, export, fusion_graph
from fusion.bundle.export_lstm import Kind, exportable
from fusion.infer.inferer import Inferer
from fusion.metrics.calibration import Temperature, calibrated
from fusion.models import MODELS
from tests.support.fusion import support
from tests.support.mistakes import one_line
from tests.support.scripts import infer_rig as rig

# Of few layers: exporters take seconds for each.
SHALLOW = support.SMALL.model_copy(
    update={
        "mbt": support.SMALL.mbt.model_copy(update={"layers": 2, "fusion_layers": 1}),
        "token_transformer": support.SMALL.token_transformer.model_copy(update={"layers": 1}),
    }
)


def bundle_of(folder: Path, name: str, *, members: int = 1, seed: int = 0) -> Bundle:
    """A small bundle with random weights for two streams: exporters take seconds for each more."""
    streams: tuple[Modality, ...] = ("video", "text")
    dims, fingerprints = (
        {s: of[s] for s in streams} for of in (support.DIMS, support.FINGERPRINTS)
    )
    changes = {"dims": dims, "fingerprints": fingerprints}
    torch.manual_seed(seed)
    models = [support.model(name, SHALLOW, **changes) for _ in range(members)]
    support.write_bundle(
        folder / "bundle",
        model=models[0] if members == 1 else Ensemble(models),
        manifest=support.manifest(**changes),
        settings=SHALLOW.model_copy(update={"name": name}),
    )
    return load_bundle(folder / "bundle")


def three_posts() -> list[Features]:
    """One with everything, others without some, or with a single token of it."""
    return [
        support.features("a", seed=1),
        support.features("b", seed=2, lengths={"video": 0, "text": 1}),
        support.features("c", seed=3, lengths={"video": 1, "text": 0}),
    ]


def batch_inputs(bundle: Bundle) -> dict[str, np.ndarray[Any, Any]]:
    batch = support.batch(three_posts(), of=bundle.schema)
    inputs: dict[str, np.ndarray[Any, Any]] = {}
    for stream in bundle.schema.dims:
        inputs[stream] = batch.tokens[stream].numpy()
        inputs[f"{stream}_mask"] = batch.masks[stream].numpy()
    return inputs


def inferer_scores(bundle: Bundle) -> np.ndarray[Any, Any]:
    inferer = Inferer(bundle)
    return np.stack([inferer.predict([post])[0].scores for post in three_posts()])


# ONNX takes several times as long as torch.export, which it begins with. LSTMs are written in
# another way for each.
ONNX = ("attention_lstm", "concat_mlp")
TORCH = [*(name for name in MODELS if name != "gmu"), "ensemble"]


@pytest.mark.parametrize("name", ONNX)
def test_onnx_gives_the_inferers_scores(name: str, tmp_path: Path) -> None:
    """With posts that the exporter has not seen."""
    import onnxruntime

    bundle = bundle_of(tmp_path, name)
    exported = export(fusion_graph(bundle), "onnx", tmp_path / "model.onnx")
    assert exported.largest < 1e-5
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    (scores,) = session.run(["scores"], batch_inputs(bundle))
    np.testing.assert_allclose(scores, inferer_scores(bundle), atol=1e-5)


@pytest.mark.parametrize("name", TORCH)
def test_torch_export_gives_the_inferers_scores(name: str, tmp_path: Path) -> None:
    """Loading a file takes long; `export` has compared it with the graph, and one is looked at."""
    many = name == "ensemble"
    bundle = bundle_of(tmp_path, "gmu" if many else name, members=2 if many else 1)
    graph = fusion_graph(bundle)
    exported = export(graph, "torch", tmp_path / "model.pt2")
    assert exported.how.startswith("torch.export")
    assert exported.largest < 1e-5
    module = torch.export.load(exported.path).module() if name == "late" else graph.module
    inputs = [torch.from_numpy(array) for array in batch_inputs(bundle).values()]
    with torch.no_grad():
        scores = module(*inputs).numpy()
    np.testing.assert_allclose(scores, inferer_scores(bundle), atol=1e-5)


@pytest.mark.parametrize("form", ["state_dict", "pickle"])
def test_legacy_files_come_back(form: Format, tmp_path: Path) -> None:
    """Out as ``.pth`` and in again with ``--best_model``: the same scores, ensembles too."""
    for members in (1, 2):
        folder = rig.make(tmp_path / str(members), posts=4)
        bundle = bundle_of(folder, "gmu", members=members, seed=3)
        exported = export(fusion_graph(bundle), form, folder / "model.pth")
        assert exported.largest == 0
        output = ["--output", str(folder / "t.jsonl")]
        assert rig.infer(folder, *output) == 0
        scores = [line["scores"] for line in rig.lines(folder / "t.jsonl")]
        options = ["--best_model", str(exported.path), "--set", "allow_pickle=true"]
        assert rig.infer(folder, *output, *options) == 0
        assert [line["scores"] for line in rig.lines(folder / "t.jsonl")] == scores


def test_the_file_beside_it_is_enough_to_tag(tmp_path: Path) -> None:
    """Labels, thresholds and calibration: with the scores they give the inferer's tags."""
    bundle = replace(
        bundle_of(tmp_path, "concat_mlp"),
        calibration=Temperature(temperature=0.5),
        thresholds=np.array([0.4, 0.5, 0.6, 0.5, 0.5, 0.5], np.float32),
    )
    graph = fusion_graph(bundle)
    exported = export(graph, "state_dict", tmp_path / "model.pth")
    about = json.loads(exported.sidecar.read_text(encoding="utf-8"))
    inputs = [torch.from_numpy(array)[:1] for array in batch_inputs(bundle).values()]
    raw = graph.module(*inputs).detach().numpy().astype(np.float64)
    logits = np.log(raw / (1 - raw)) / about["calibration"]["temperature"]
    reached = 1 / (1 + np.exp(-logits[0])) >= about["thresholds"]
    tags = Inferer(bundle).predict([support.features("a", seed=1)])[0].tags
    assert {about["labels"][str(i)] for i in np.flatnonzero(reached)} == {t.name for t in tags}
    assert calibrated(bundle.calibration, raw) == pytest.approx(1 / (1 + np.exp(-logits)), abs=1e-6)
    assert about["features"]["video"] == {"dim": 12, "tokens": 64}
    assert [port["name"] for port in about["inputs"]][:2] == ["video", "video_mask"]


class Drifting(nn.Module):
    """A constant that tracing fixes at what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = 0.0

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        self.offset += 0.001
        return torch.sigmoid(inputs[0].sum(dim=(1, 2))[:, None]) + self.offset


def test_a_file_that_differs_is_not_left_behind(tmp_path: Path) -> None:
    graph = replace(fusion_graph(bundle_of(tmp_path, "concat_mlp")), module=Drifting())
    with pytest.raises(ParityError, match=r"differs from the model by .*e-0\d"):
        export(graph, "torch", tmp_path / "out" / "model.pt2")
    assert list((tmp_path / "out").iterdir()) == []


class Branching(nn.Module):
    """Python that depends on values cannot be traced."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return inputs[0].sum(dim=2) if float(inputs[0].sum()) > 0 else inputs[0].sum(dim=1)


def test_a_model_that_cannot_be_exported_is_one_line(tmp_path: Path) -> None:
    """The exporters' pages of text are cut to their reason."""
    graph = replace(fusion_graph(bundle_of(tmp_path, "concat_mlp")), module=Branching())
    forms: tuple[Format, ...] = ("torch", "onnx")
    for form in forms:
        with one_line(ExportRefused, match=f"{form}: the model cannot be exported"):
            export(graph, form, tmp_path / "model.x")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fusion_graph(bundle_of(tmp_path, "concat_mlp"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[export\]'"):
        export(graph, "onnx", tmp_path / "model.onnx")


def test_exportable_lstms_are_lstms() -> None:
    """Both forms, one way and both ways, against torch's own."""
    tokens = torch.randn(3, 5, 4)
    for both in (False, True):
        lstm = nn.Sequential(nn.LSTM(4, 6, batch_first=True, bidirectional=both)).eval()
        with torch.no_grad():
            expected = lstm(tokens)[0]
            for kind in get_args(Kind):
                torch.testing.assert_close(exportable(lstm, kind)(tokens)[0], expected)
    with pytest.raises(ValueError, match="of one layer"):
        exportable(nn.Sequential(nn.LSTM(4, 6, num_layers=2, batch_first=True)), "torch")
