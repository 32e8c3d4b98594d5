"""Feature files, data files and settings for the tests of training and inference."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.post import Features, Modality, Status, Stream
from config.fusion_models import ModelSettings
from config.labels import LabelMap
from config.load import validate
from config.presets import merge
from config.train import TrainSettings
from extractors.feature_file import write_features
from fusion.bundle.bundle import Bundle, save_bundle
from fusion.data.data_file import Record, entries, record_of
from fusion.models import FusionModel, build_model
from fusion.models.base import Batch, Collate, FeatureManifest, InputSchema, Sample

DIMS: dict[Modality, int] = {"video": 12, "image": 12, "audio": 6, "text": 10, "ocr": 10}
MODALITIES: tuple[Modality, ...] = tuple(DIMS)
"""Without those that are off by default."""
FINGERPRINTS: dict[Stream, str] = {m: f"{m}-1" for m in MODALITIES}
CLASSES = 6
LABELS = LabelMap(tuple(f"tag{i}" for i in range(CLASSES)))
SMALL = ModelSettings.model_validate(
    {
        "name": "token_transformer",
        "token_transformer": {"width": 32, "layers": 2, "heads": 4, "dropout": 0.0},
        "concat_mlp": {"modality_width": 16, "width": 32, "dropout": 0.1},
        "concat_se": {
            "modality_width": 16,
            "width": 32,
            "dropout": 0.1,
            "nextvlad": {"clusters": 4, "groups": 2},
        },
        "gmu": {"width": 32, "dropout": 0.1},
        "nextvlad_se": {"width": 32, "dropout": 0.1, "nextvlad": {"clusters": 4, "groups": 2}},
        "attention_lstm": {"projection": 16, "hidden": 8, "join": 32, "width": 32, "dropout": 0.1},
        "mbt": {
            "width": 32,
            "layers": 3,
            "fusion_layers": 2,
            "heads": 4,
            "dropout": 0.0,
            "stochastic_depth": 0.1,
        },
        # Four queries for six classes: the last group has spare places.
        "ml_decoder": {"width": 32, "heads": 4, "feed_forward": 48, "queries": 4, "dropout": 0.0},
        "late": {"dropout": 0.0},
        "knn": {"neighbours": [4], "temperatures": [0.3]},
        "modality_dropout": 0.1,
    }
)


def features(
    post_id: str = "p",
    *,
    seed: int = 0,
    lengths: Mapping[Any, int] | None = None,
    tags: tuple[int, ...] = (),
) -> Features:
    """Random features; tag i shifts the features of modality i modulo 5."""
    counts = {"video": 5, "image": 2, "audio": 4, "text": 7, "ocr": 3} | dict(lengths or {})
    arrays: dict[Stream, Any] = {}
    for index, modality in enumerate(MODALITIES):
        if not counts[modality]:
            continue
        chance = np.random.default_rng((seed, index))  # so that hiding one leaves the others
        array = chance.normal(0, 1, (counts[modality], DIMS[modality]))
        for tag in tags:
            if tag % len(MODALITIES) == index:
                array[:, tag // len(MODALITIES)] += 4
        arrays[modality] = array.astype(np.float16)
    statuses: dict[Modality, Status] = {m: "ok" if m in arrays else "missing" for m in MODALITIES}
    return Features(post_id, arrays, statuses)


def manifest(**changes: Any) -> FeatureManifest:
    return FeatureManifest(**{"dims": DIMS, "fingerprints": FINGERPRINTS, **changes})


def schema(**changes: Any) -> InputSchema:
    return InputSchema.of(manifest(**changes), SMALL.tokens, CLASSES)


def batch(
    posts: Sequence[Features],
    targets: npt.NDArray[np.float32] | None = None,
    of: InputSchema | None = None,
) -> Batch:
    """Posts as a model takes them."""
    of = of or schema()
    truth = [None] * len(posts) if targets is None else list(targets)
    pairs = zip(posts, truth, strict=True)
    return Collate(of)([Sample(p.post_id, of.arrays(p), target) for p, target in pairs])


def truth(posts: int) -> npt.NDArray[np.float32]:
    """Random targets ``(posts, classes)``."""
    targets = np.random.default_rng(7).random((posts, CLASSES)) < 0.4
    return targets.astype(np.float32)


def model(name: str, settings: ModelSettings = SMALL, **changes: Any) -> FusionModel:
    """A small model with fresh weights, in evaluation mode; k-NN with some training posts."""
    settings = settings.model_copy(update={"name": name})
    made = build_model(schema(**changes), settings).eval()
    if name == "knn":
        know(made)
    return made


def know(model: FusionModel) -> None:
    """Let k-NN have training posts, some without a modality; its weights stay."""
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    lengths = [{}, {"audio": 0}, {"text": 0, "ocr": 0}]
    posts = [features(str(i), seed=50 + i, lengths=lengths[i % 3]) for i in range(12)]
    assert len(list(model.solutions([batch(posts, truth(12), model.schema)]) or ())) == 1
    model.load_state_dict(weights, strict=False)


def write_bundle(folder: Path, name: str = "token_transformer", **changes: Any) -> str:
    """Save a small model with fresh weights; the bundle's version."""
    values: dict[str, Any] = {
        "name": "small",
        "settings": SMALL.model_copy(update={"name": name}),
        "manifest": manifest(),
        "labels": LABELS,
        "thresholds": np.full(CLASSES, 0.5, np.float32),
        **changes,
    }
    if "model" not in values:
        values["model"] = model(name)
    return save_bundle(folder, Bundle(**values))


def write_posts(folder: Path, name: str, count: int, seed: int, *, classes: int = CLASSES) -> Path:
    """Feature files of learnable posts, and the data file that names them."""
    chance = np.random.default_rng(seed)
    entries = []
    for i in range(count):
        tags = tuple(int(t) for t in chance.choice(classes, chance.integers(1, 3), replace=False))
        hidden = {m: 0 for m in ("image", "ocr") if i % 7 == 3 and m != MODALITIES[tags[0] % 5]}
        post = features(f"{name}{i}", seed=seed * 10_000 + i, tags=tags, lengths=hidden)
        path = write_features(folder / "features", post, FINGERPRINTS)
        labels = [LABELS.names[t] for t in tags]
        features_at = str(path.relative_to(folder))
        entries.append({"post_id": post.post_id, "labels": labels, "features": features_at})
    file = folder / f"{name}.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    return file


def spoil_features(
    folder: Path, post_id: str, *, seed: int = 0, value: float = np.nan, **fingerprints: str
) -> None:
    """Write a post's features anew, with a text that is not finite or with other fingerprints."""
    post = features(post_id, seed=seed)
    if not fingerprints:
        post.arrays["text"][0, 0] = value
    write_features(folder / "features", post, {**FINGERPRINTS, **fingerprints})  # type: ignore[dict-item]


def plain_gap(rows: Iterable[tuple[Sequence[float], Sequence[float]]], top_k: int = 20) -> float:
    """GAP of scores and truth as it is defined, in plain Python; for scores without ties."""
    pooled: list[tuple[float, float]] = []
    positives = 0.0
    for scores, truth in rows:
        positives += sum(truth)
        pooled += sorted(zip(scores, truth, strict=True), reverse=True)[:top_k]
    total = hits = 0.0
    for rank, (_, hit) in enumerate(sorted(pooled, reverse=True), 1):
        hits += hit
        total += hit * hits / rank
    return total / positives if positives else 0.0


def records(path: Path) -> tuple[Record, ...]:
    return tuple(record_of(entry.value, entry.where, path) for entry in entries(path))


def train_settings(folder: Path, **sections: Any) -> TrainSettings:
    """Settings of a small training on `write_posts` files ``train`` and ``valid``."""
    (folder / "labels.json").write_text(json.dumps(LABELS.as_json()), encoding="utf-8")
    base = {
        "data": {
            "train": str(folder / "train.json"),
            "valid": str(folder / "valid.json"),
            "labels": str(folder / "labels.json"),
        },
        "model": SMALL.model_dump(mode="json"),
        "optimizer": {"learning_rate": 3e-3},
        "trainer": {
            "epochs": 3,
            "batch_size": 16,
            "n_gpu": 0,
            "threads": 1,
            "fix_random_seed": True,
            "save_dir": str(folder / "run"),
            "progress": False,
        },
        "bundle": {"name": "small", "out": str(folder / "bundle")},
        "report": {"enabled": False},
    }
    return validate(TrainSettings, merge(base, sections), "test")
