"""Weights put in place by `insighttag weights get`: fetched from a hub, copied, loaded offline."""

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from config.features import AudioSettings, FeatureSettings, ImageSettings
from config.presets import PRESETS
from extractors.models.base import RowExtractor
from extractors.models.catalog import KNOWN, needs
from extractors.models.placed import MANIFEST, check
from extractors.models.visual import VisualExtractor
from extractors.parts import AUDIO_ENCODERS, audio_encoder
from extractors.suite import ExtractorSuite
from tests.support import tiny_encoders
from tests.support.hub_server import GATED, hub_server
from tests.support.processes import python
from tests.support.tiny_models import TINY_VIT, tiny_timm_weights
from tests.unit.extractors.test_encoder_contract import FAMILIES, pictures

_GET = """
import sys
from scripts.cli import run
out, *names = sys.argv[1:]
print([run(["weights", "get", name, "--out", out]) for name in names])
"""
TRANSFORMERS = {
    f"me/{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}": family
    for name, family in FAMILIES.items()
    if not name.startswith("timm")
}


def get(root: Path, out: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, on a hub with the folders of `root`."""
    with hub_server(root) as url:
        return python(
            *("-c", _GET, str(out), *names),
            timeout_s=300,
            HF_ENDPOINT=url,
            HF_HOME=str(out.with_name("cache")),
            HF_HUB_DISABLE_XET="1",
            no_proxy="127.0.0.1",
        )


def no_network(*_: Any) -> None:
    raise AssertionError("a socket was opened")


def features(extractor: RowExtractor, items: Sequence[Any]) -> np.ndarray:
    extractor.load()
    rows = extractor.forward([extractor.preprocess(item) for item in items])
    extractor.close()
    return np.concatenate(rows)


def test_a_copied_folder_starts_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is copied to a machine without network or cache, and gives the same vectors."""
    hub, out = tmp_path / "hub", tmp_path / "out"
    expected = {}
    families = {}
    for name, family in TRANSFORMERS.items():
        (hub / name).mkdir(parents=True)
        family.make(hub / name)
        if not (hub / name / "config.json").is_file():
            continue  # it has no weights
        families[name] = family
        (hub / name / "onnx").mkdir()
        (hub / name / "onnx/model.onnx").write_bytes(b"of another library")
        expected[name] = features(family.build(hub / name, {"precision": "fp32"}), family.items())
    repository = hub / f"timm/{TINY_VIT}.r160_in1k"
    repository.mkdir(parents=True)
    file = tiny_timm_weights(tmp_path, TINY_VIT, num_classes=1000)
    shutil.copy(file, repository / "model.safetensors")
    image = ImageSettings(arch=TINY_VIT, image_size=160, precision="fp32")
    by_file = image.model_copy(update={"weights": str(file)})
    pixels = pictures(2, size=160)
    expected[TINY_VIT] = features(VisualExtractor("image", by_file), pixels)

    done = get(hub, out, *expected)
    assert done.stdout.splitlines()[-1] == str([0] * len(expected)), done.stderr
    assert not list(out.rglob("*.onnx"))
    machine = tmp_path / "machine"
    shutil.copytree(out, machine / "workshop/pretrained")
    for folder in (hub, out, tmp_path / "cache"):
        shutil.rmtree(folder)
    monkeypatch.chdir(machine)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    arrays = {
        name: features(family.build(Path(name), {"precision": "fp32"}), family.items())
        for name, family in families.items()
    }
    arrays[TINY_VIT] = features(VisualExtractor("image", image), pixels)
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    assert audio_encoder(AudioSettings(arch="me/clap-fused")) is AUDIO_ENCODERS["clap"]


@pytest.mark.parametrize("preset", ["modern", "omni"])
def test_a_preset_starts_offline_from_the_folder_that_get_made(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All modalities, with the preset's own settings; the repositories hold small stand-ins."""
    if preset == "omni" and "me/omni-text" not in TRANSFORMERS:
        pytest.skip("the installed transformers does not know EmbeddingGemma 2")
    makers: dict[str, Callable[[Path], Path]] = {
        "google/siglip2-so400m-patch16-256": lambda folder: tiny_encoders.siglip(folder, 256),
        "MIT/ast-finetuned-audioset-10-10-0.4593": tiny_encoders.ast,
        "Qwen/Qwen3-Embedding-0.6B": tiny_encoders.qwen3,
        "google/embeddinggemma-2": tiny_encoders.embedding_gemma2,
    }
    features = FeatureSettings.model_validate({"preset": preset, "ocr": {"enabled": False}})
    for need in needs(features):
        (tmp_path / "hub" / need.name).mkdir(parents=True)
        makers[need.name](tmp_path / "hub" / need.name)
    done = get(tmp_path / "hub", tmp_path / "out", preset)
    assert done.stdout.splitlines()[-1] == "[0]", done.stderr
    (tmp_path / "workshop").mkdir()
    shutil.move(tmp_path / "out", tmp_path / "workshop/pretrained")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    suite = ExtractorSuite(features, threads=1)
    suite.load()
    assert set(suite.dims) >= {"video", "image", "audio", "text"}
    suite.close()


def test_what_a_hub_refuses_is_one_line_and_leaves_no_folder(tmp_path: Path) -> None:
    """A licence that nobody accepted, a repository without weights, and one that is not there."""
    hub, out = tmp_path / "hub", tmp_path / "out"
    for name in ("me/gated", "me/empty"):
        (hub / name).mkdir(parents=True)
        (hub / name / "config.json").write_text("{}")
    (hub / "me/gated" / GATED).touch()
    done = get(hub, out, "me/gated", "me/empty", "no/such")
    assert done.stdout.splitlines()[-1] == "[2, 2, 2]"
    gated, empty, missing = [
        line for line in done.stderr.splitlines() if line.startswith("insighttag: ")
    ]
    assert gated.startswith(
        "insighttag: weights get me/gated: me/gated requires accepting its licence"
    )
    for word in ("/me/gated", "hf auth login", "HF_TOKEN"):
        assert word in gated
    assert "me/empty has no model.safetensors" in empty
    assert "no/such cannot be loaded" in missing
    assert "Traceback" not in done.stderr
    assert not out.exists() or not list(out.iterdir())


def test_a_repository_is_fetched_again_only_when_it_differs(tmp_path: Path) -> None:
    """Shards, pickled weights and code of its own come along; what is whole is left alone."""
    hub, out = tmp_path / "hub", tmp_path / "out"
    sharded, pickled = hub / "me/sharded", hub / "me/pickled"
    for folder in (sharded, pickled):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"auto_map": {"AutoModel": "own.Model"}}')
    (pickled / "own.py").write_text("raise SystemExit('run')\n")
    (pickled / "pytorch_model.bin").write_bytes(b"weights")
    parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for part in parts:
        (sharded / part).write_bytes(part.encode())
    index = {"weight_map": {"a": parts[0], "b": parts[1], "c": parts[0]}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))

    done = get(hub, out, "me/sharded", "me/pickled", "me/sharded")
    assert done.stdout.splitlines()[-1] == "[0, 0, 0]", done.stderr
    assert "me--sharded: is there already, and complete" in done.stdout
    assert {*parts, "config.json", "model.safetensors.index.json", MANIFEST} == {
        each.name for each in (out / "me--sharded").iterdir()
    }
    assert {"own.py", "pytorch_model.bin", "config.json", MANIFEST} == {
        each.name for each in (out / "me--pickled").iterdir()
    }
    (out / "me--sharded" / parts[0]).unlink()
    (out / "me--sharded" / parts[0]).write_bytes(b"cut")
    assert f"{parts[0]} has 3 bytes" in check(out / "me--sharded").faults[0]
    assert get(hub, out, "me/sharded").stdout.splitlines()[-1] == "[0]"
    assert check(out / "me--sharded").faults == ()


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_preset_needs_is_known(preset: str) -> None:
    """Each encoder of a preset has a width, and those of others a licence and a size."""
    for need in needs(FeatureSettings.model_validate({"preset": preset})):
        assert need.known.dim or need.origin == "wheel"
        assert need.licence == "your own" or (need.known.megabytes and need.known.licence)


def test_the_catalogue_agrees_with_timm() -> None:
    for arch, known in KNOWN.items():
        if not known.repository:
            continue
        config: Any = timm.get_pretrained_cfg(arch)
        assert known.repository == config.hf_hub_id
        with torch.device("meta"):  # some have a billion parameters
            assert timm.create_model(arch, num_classes=0).num_features == known.dim
        assert (known.licence or "Apache-2.0").lower() == config.license
