"""A post that lacks a modality is tagged at least as well as by any one of those that it has."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.post import Features, Modality, Stream
from config.fusion_models import ModelSettings
from extractors.feature_file import write_features
from fusion.bundle.bundle import load_bundle
from tests.support.fusion import runs, support

# The noise of each modality's view of the tags: one tells much, one some, one little.
NOISE: dict[Modality, float] = {"video": 1.2, "audio": 1.8, "text": 0.9}


def write_views(folder: Path, name: str, count: int, seed: int) -> None:
    """Posts whose modalities each show all of the tags, dimly, as those of openclipart do."""
    chance, entries = np.random.default_rng(seed), []
    views = {s: np.random.default_rng(9).normal(0, 1, (6, support.DIMS[s])) for s in NOISE}
    for i in range(count):
        tags = chance.choice(support.CLASSES, chance.integers(1, 3), replace=False)
        arrays: dict[Stream, np.ndarray] = {}
        for stream, noise in NOISE.items():
            rows = views[stream][tags].sum(axis=0) + chance.normal(0, noise, views[stream].shape[1])
            arrays[stream] = (rows + chance.normal(0, 0.3, (3, len(rows)))).astype(np.float16)
        post = Features(f"{name}{i}", arrays, {})
        path = write_features(folder / "features", post, support.FINGERPRINTS)
        labels = [support.LABELS.names[t] for t in tags]
        entries.append({"post_id": post.post_id, "labels": labels, "features": str(path)})
    (folder / f"{name}.json").write_text(json.dumps(entries), encoding="utf-8")


def test_losing_a_modality_is_never_worse_than_the_best_one_alone(tmp_path: Path) -> None:
    """The default model with its own modality dropout; the bundle names every subset's GAP."""
    write_views(tmp_path, "train", 400, 1)
    write_views(tmp_path, "valid", 300, 2)
    default = ModelSettings()
    report = runs.run(
        tmp_path,
        model={"name": default.name, "modality_dropout": default.modality_dropout},
        optimizer={"learning_rate": 0.006},
        trainer={"epochs": 8, "batch_size": 32, "valid_interval": 0},
        report={"enabled": True, "subset_posts": 200},
    )
    gaps = {
        frozenset(key.split("+")): gap for key, gap in load_bundle(report.bundle).subsets.items()
    }
    assert len(gaps) == 7
    for some, gap in gaps.items():
        if len(some) > 1:
            best = max(gaps[frozenset({one})] for one in some)
            assert gap >= best, (sorted(some), gap, best)
    assert gaps[frozenset({"text"})] == pytest.approx(max(gaps[frozenset({s})] for s in NOISE))
