"""A small bundle with posts for the tests of `infer_net.py`, and a GAP of its own."""

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import infer_net
from common.post import Features
from fusion.bundle.bundle import Ensemble
from fusion.data.dataset import FeatureFiles
from fusion.models import FusionModel
from tests.support.fusion import support


def write_bundle(folder: Path, name: str = "gmu", *, members: int = 1, seed: int = 0) -> str:
    """A bundle with random weights for the features of `support.write_posts`; its version."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models: list[FusionModel] = [support.model(name) for _ in range(members)]
    model = models[0] if members == 1 else Ensemble(models)
    return support.write_bundle(folder, name, model=model)


def write_config(folder: Path, **changes: Any) -> Path:
    """A config for feature files of the folder."""
    content = {
        "bundle": str(folder / "bundle"),
        "features": str(folder / "features"),
        "progress_dir": str(folder / "notes"),
        "threads": 1,
        "batch_size": 7,
        "progress": False,
        **changes,
    }
    path = folder / "infer.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def make(folder: Path, posts: int = 40, **changes: Any) -> Path:
    """Posts in ``posts.json``, a bundle and a config; the folder."""
    support.write_posts(folder, "posts", posts, 3)
    write_bundle(folder / "bundle")
    write_config(folder, **changes)
    return folder


def infer(folder: Path, *more: str, posts: str = "posts.json") -> int:
    """`infer_net.main` on the folder's config."""
    options = ["--infer_config", str(folder / "infer.yaml"), "--input", str(folder / posts)]
    return infer_net.main([*options, *more])


def mistake(
    capsys: pytest.CaptureFixture[str], folder: Path, *more: str, posts: str = "posts.json"
) -> str:
    """Return the one line with which an inference on a wrong input ends."""
    capsys.readouterr()
    assert infer(folder, *more, posts=posts) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    return said


def infer_slowly(folder: Path, *more: str) -> int:
    """`infer`, with time to be killed while it reads."""
    read = FeatureFiles.features

    def slow(self: FeatureFiles, *arguments: Any) -> Features:
        time.sleep(0.01)
        return read(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureFiles, "features", slow)
        return infer(folder, *more)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
