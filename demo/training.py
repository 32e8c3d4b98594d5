"""Stage: the fusion model, trained by the trainer of `train_net.py`, into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from config.load import validate
from config.settings import Settings
from config.train import TrainSettings
from demo.layout import Layout, Sizes

LABELS = Path("config/idx2name_cls24.json")


def train_settings(layout: Layout, settings: Settings, sizes: Sizes) -> TrainSettings:
    """Return the settings that `train_net.py` would read from a file."""
    values: dict[str, Any] = {
        "data": {
            "train": layout.posts("train"),
            "valid": layout.posts("valid"),
            "labels": LABELS,
            "image_as_frames": settings.fusion.image_as_frames,
            "ocr_mode": settings.features.ocr_mode,
        },
        "model": {"modality_dropout": 0.05},
        "optimizer": {"learning_rate": 1e-3, "ema_decay": 0.98},
        "trainer": {
            "epochs": sizes.fusion_epochs,
            "n_gpu": 0,
            "precision": "fp32",
            # One thread is little slower for so small a model, and much faster on a busy machine.
            "threads": 1,
            "fix_random_seed": True,
            "save_dir": layout.training,
        },
        "bundle": {"name": "demo", "out": settings.fusion.bundle},
    }
    return validate(TrainSettings, values, "demo")


def train_fusion(layout: Layout, settings: Settings, sizes: Sizes) -> None:
    from fusion.data.dataset import FeatureFiles
    from fusion.train.training import train

    train(train_settings(layout, settings, sizes), FeatureFiles(layout.features))
