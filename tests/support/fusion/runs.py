"""Small trainings and what they leave behind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusion.data.dataset import FeatureFiles
from fusion.report.predictions import Predictions
from fusion.train.training import TrainReport, train
from tests.support.fusion import support

ROOT = Path(__file__).resolve().parents[3]
State = dict[str, torch.Tensor]


def run(folder: Path, resume: Path | None = None, **sections: Any) -> TrainReport:
    """One small training on `support.write_posts` files of a folder."""
    return train(support.train_settings(folder, **sections), FeatureFiles(), resume=resume)


def checkpoint(folder: Path, name: str = "run") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(
        folder / name / "latest" / "ckpt" / "last.pt", weights_only=True
    )
    return content


def weights(folder: Path, name: str = "run") -> State:
    state: State = checkpoint(folder, name)["model"]
    return state


def equal(a: State, b: State) -> bool:
    """Bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def apart(a: State, b: State) -> float:
    """The largest difference of two weights."""
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


def same(one: Any, other: Any) -> bool:
    """Bit by bit, all the way down."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def predictions(folder: Path) -> Predictions:
    return Predictions.load(folder / "run" / "latest" / "report" / "scores.npz")


def events(folder: Path, name: str = "run") -> list[dict[str, Any]]:
    lines = (folder / name / "latest" / "log" / "train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def config_file(folder: Path, **sections: Any) -> Path:
    """The settings of `run` as a file for `train_net.py`."""
    file = folder / "train.yaml"
    content = support.train_settings(folder, **sections).model_dump(mode="json")
    file.write_text(json.dumps(content))
    return file


def some_predictions(
    posts: int = 60, tags: int = 5, seed: int = 0, name: str = "tag"
) -> Predictions:
    """Scores that are right more often than not."""
    chance = np.random.default_rng(seed)
    targets = chance.random((posts, tags)) < 0.3
    scores = 0.35 * targets + 0.65 * chance.random((posts, tags))
    return Predictions(
        tuple(f"p{i}" for i in range(posts)),
        tuple(f"{name} {i}" for i in range(tags)),
        scores**2,
        scores,
        targets,
        np.full(tags, 0.5, np.float32),
    )
