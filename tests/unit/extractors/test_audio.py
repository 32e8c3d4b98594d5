"""Patches of sound -> features of any timm model, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from common.errors import FeatureError
from config.features import AudioSettings
from extractors.models.audio import AudioExtractor
from tests.support.tiny_models import TINY_CNN, TINY_VIT, tiny_timm_weights


def patches(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(-2, 2, (count, 96, 64)).astype(np.float32)


@pytest.mark.parametrize("arch", [TINY_CNN, TINY_VIT])
def test_any_timm_model_takes_patches(tmp_path: Path, arch: str) -> None:
    """A timm model with one channel reads (j, 96, 64) patches as they are, batch after batch."""
    size: dict[str, Any] = {"img_size": (96, 64)} if arch == TINY_VIT else {}
    path = tiny_timm_weights(tmp_path, arch, in_chans=1, **size)
    extractor = AudioExtractor(
        AudioSettings(arch=arch, weights=str(path), batch_size=4, precision="fp32")
    )
    extractor.load()
    items = [patches(n, n) for n in (3, 1, 6)]
    arrays = extractor.forward(items)
    model = timm.create_model(arch, num_classes=0, in_chans=1, **size).eval()
    model.load_state_dict(load_file(path))
    for item, array in zip(items, arrays, strict=True):
        with torch.no_grad():
            expected = model(torch.from_numpy(item)[:, None]).numpy()
        np.testing.assert_allclose(array, expected, atol=2e-3, rtol=2e-3)


def test_weights_of_pictures_are_adapted_to_patches(tmp_path: Path) -> None:
    """A file with three input channels loads too: timm adapts its first layer."""
    path = tiny_timm_weights(tmp_path, TINY_CNN, in_chans=3)
    extractor = AudioExtractor(AudioSettings(arch=TINY_CNN, weights=str(path)))
    extractor.load()
    assert extractor.forward([patches(2)])[0].shape == (2, 96)


def test_patches_are_checked() -> None:
    extractor = AudioExtractor(AudioSettings())
    bad = patches(1)
    bad[0, 0, 0] = np.inf
    for item in (bad, patches(1)[:, :64], patches(1).astype(np.float64)):
        with pytest.raises(FeatureError, match="audio"):
            extractor.preprocess(item)
