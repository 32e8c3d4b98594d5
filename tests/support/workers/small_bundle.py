"""A fusion bundle with random weights for the features that a suite of small extractors gives."""

from pathlib import Path
from typing import Any

import numpy as np

from config.labels import LabelMap
from extractors.suite import ExtractorSuite


def write_bundle(
    folder: Path,
    suite: ExtractorSuite,
    *,
    seed: int = 0,
    members: int = 1,
    threshold: Any = 0.1,
    model: Any = None,
    name: str = "small",
    **changes: Any,
) -> str:
    """Save a bundle for a loaded suite; its version.

    Args:
        folder: Where to.
        suite: Whose fingerprints and dims it is made for.
        seed: Of the weights.
        members: Number of models; several are an ensemble.
        threshold: Scores above it become tags; one for all tags, or one each.
        model: Name of the fusion model; None is the default's.
        name: Of the bundle.
        changes: Fields of the manifest to set otherwise.
    """
    import torch

    from config.fusion_models import ModelSettings
    from fusion.bundle.bundle import Bundle, joined, save_bundle
    from fusion.models import build_model
    from fusion.models.base import FeatureManifest, InputSchema

    labels = LabelMap(("cat", "dog", "sea"))
    values = {
        "dims": suite.dims,
        "fingerprints": suite.fingerprints,
        "image_as_frames": False,
        "ocr_mode": suite.features.ocr_mode,
    }
    manifest = FeatureManifest(**{**values, **changes})
    settings = ModelSettings(name=model) if model else ModelSettings()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        schema = InputSchema.of(manifest, settings.tokens, len(labels))
        models = [build_model(schema, settings) for _ in range(members)]
    bundle = Bundle(
        name=name,
        labels=labels,
        manifest=manifest,
        settings=settings,
        model=joined(models, "logits"),
        thresholds=np.full(len(labels), threshold, np.float32),
    )
    return save_bundle(folder, bundle)
