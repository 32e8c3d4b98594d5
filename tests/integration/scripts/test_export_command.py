"""``insighttag export``: the command, and every backbone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import fusion.bundle.export
from extractors.models.text import TextExtractor
from extractors.models.visual import VisualExtractor
from scripts.cli import run
from tests.support.scripts import infer_rig as rig
from tests.support.tiny_models import (
    TINY_CNN,
    tiny_bert,
    tiny_bundle,
    tiny_features,
    tiny_timm_weights,
)

LSTM = {"weights": "random:1", "projection": 16, "hidden": 8, "join": 16, "width": 12}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of small backbones: a ViT, a ResNet with an LSTM behind it, a BERT."""
    folder = tmp_path_factory.mktemp("export")
    bert = str(tiny_bert(folder / "bert"))
    features: dict[str, Any] = tiny_features().model_dump(mode="json")
    features["video"] |= {"arch": TINY_CNN, "lstm": LSTM}
    features["text"] |= {"arch": bert, "weights": bert}
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump({"features": features, "log": {"level": "error"}}))
    return path


@pytest.mark.parametrize(
    ("name", "form"),
    [
        # Slow ones once: image and text in ONNX, and sound, are below; LSTMs in ONNX are fusion's.
        ("video_lstm", "torch"),
        ("text", "state_dict"),
        ("video", "pickle"),
    ],
)
def test_backbones_are_written(
    name: str, form: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"model.{form}"
    words = ["--backbone", name, "--format", form, "--out", str(out), "--config", str(config)]
    assert run(["export", *words]) == 0
    printed = capsys.readouterr().out
    about = json.loads(out.with_name(f"{out.name}.json").read_text())
    assert f"largest difference {about['largest_difference']:.2e}" in printed
    assert about["largest_difference"] < 1e-4
    assert about["backbone"] == name
    if form == "state_dict":
        assert all(isinstance(v, torch.Tensor) for v in torch.load(out).values())
    if form == "pickle":
        assert isinstance(torch.load(out, weights_only=False), torch.nn.Module)


def session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_exported_backbones_give_the_extractors_features(config: Path, tmp_path: Path) -> None:
    """Within float16, on what the extractors' own preprocessing gives."""
    from config.load import load_settings

    features = load_settings(config).features
    for name in ("image", "text"):
        words = ["--backbone", name, "--out", str(tmp_path / name), "--config", str(config)]
        assert run(["export", *words]) == 0
    pictures = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    image = VisualExtractor("image", features.image)
    image.load()
    (expected,) = image.forward([image.preprocess(pictures)])
    pixels = pictures.transpose(0, 3, 1, 2).astype(np.float32)
    (rows,) = session(tmp_path / "image").run(None, {"pixels": pixels})
    np.testing.assert_allclose(rows, expected.astype(np.float32), atol=5e-3)
    text = TextExtractor(features.text)
    text.load()
    ids = text.preprocess("a cat 猫 12")
    (expected,) = text.forward([ids])
    inputs = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
    (rows,) = session(tmp_path / "text").run(None, inputs)
    np.testing.assert_allclose(rows[0], expected.astype(np.float32), atol=5e-3)


def test_an_export_says_that_pictures_are_seen_twice(config: Path, tmp_path: Path) -> None:
    """Its graph gives a row for each view, whose mean is the extractor's vector."""
    from config.load import load_settings

    out = tmp_path / "x"
    words = ["--backbone", "image", "--format", "state_dict", "--out", str(out)]
    padded = ["--config", str(config), "--set", "features.image.padded=true"]
    assert run(["export", *words, *padded]) == 0
    assert "mean of both" in json.loads(out.with_name("x.json").read_text())["input"]
    plain = load_settings(config).features.image
    views = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    rows = []
    for settings in (plain, plain.model_copy(update={"padded": True})):
        image = VisualExtractor("image", settings)
        image.load()
        (row,) = image.forward([image.preprocess(views)])
        rows.append(row)
    each, mean = rows
    np.testing.assert_allclose(each.mean(axis=0), mean[0].astype(np.float32), atol=5e-3)


def test_vggish_is_exported(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "vggish.pt2"
    words = ["--backbone", "audio", "--format", "torch", "--out", str(out), "--config", str(config)]
    assert run(["export", *words, "--set", "features.audio.arch=vggish"]) == 0
    assert torch.export.load(out).module()(torch.zeros(3, 96, 64)).shape == (3, 128)


def test_a_bundle_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every input that was compared is named; another bundle's extractor is refused."""
    rig.write_bundle(tmp_path / "bundle", "concat_mlp")
    out = tmp_path / "model.pth"
    words = ["--bundle", str(tmp_path / "bundle"), "--format", "state_dict", "--out", str(out)]
    assert run(["export", *words]) == 0
    printed = capsys.readouterr().out
    for case in ("one post, one token each", "no video", "nothing at all", "torch.save"):
        assert case in printed
    assert out.exists()


def test_mistakes_are_one_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--format", "state_dict", "--out", str(tmp_path / "x.pth"), "--config", str(config)]
    assert run(["export", "--bundle", str(tmp_path / "none"), *out]) == 2
    assert "--bundle" in capsys.readouterr().err
    tiny_bundle(tmp_path / "bundle", tiny_features())
    bundle = ["--bundle", str(tmp_path / "bundle")]
    assert run(["export", *bundle, "--backbone", "video", *out]) == 2
    assert "was trained with video features" in capsys.readouterr().err
    assert run(["export", *bundle, "--backbone", "image", *out]) == 0
    nothing = ["--set", "features.video.lstm.weights=null"]
    capsys.readouterr()
    assert run(["export", "--backbone", "video_lstm", *out, *nothing]) == 2
    assert "there is no video_lstm to export" in capsys.readouterr().err


def test_a_difference_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rig.write_bundle(tmp_path / "bundle", "concat_mlp")
    monkeypatch.setattr(fusion.bundle.export, "TOLERANCE", -1.0)
    out = tmp_path / "out.pth"
    words = ["--bundle", str(tmp_path / "bundle"), "--format", "state_dict", "--out", str(out)]
    assert run(["export", *words]) == 1
    assert "is not written: it differs from the model" in capsys.readouterr().err
    assert not out.exists()


def test_a_whole_backbone_is_loaded_only_when_allowed(tmp_path: Path) -> None:
    """``features.image.allow_pickle``: the same features as from its state dict."""
    import timm

    from common.errors import ConfigError
    from config.features import ImageSettings

    state = tiny_timm_weights(tmp_path, TINY_CNN, suffix=".pth")
    model = timm.create_model(TINY_CNN, num_classes=0)
    model.load_state_dict(torch.load(state))
    torch.save(model, tmp_path / "whole.pth")
    rows = np.full((1, 64, 64, 3), 90, np.uint8)
    features = []
    for file, allowed in ((state, False), (tmp_path / "whole.pth", True)):
        settings = ImageSettings(
            arch=TINY_CNN, weights=str(file), image_size=64, precision="fp32", allow_pickle=allowed
        )
        extractor = VisualExtractor("image", settings)
        extractor.load()
        features.append(extractor.forward([rows])[0])
    np.testing.assert_array_equal(features[0], features[1])
    refused = settings.model_copy(update={"allow_pickle": False})
    with pytest.raises(ConfigError, match=r"set features\.image\.allow_pickle: true"):
        VisualExtractor("image", refused).load()
