"""Patches -> VGGish features: against torchvggish itself; the network has no small form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvggish import torchvggish

from common.errors import ConfigError
from config.settings import AudioSettings
from extractors.models.audio import AudioExtractor, source_module
from tests.support.tiny_models import TINY_CNN, tiny_timm_weights, vggish_weights


def patches(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(-2, 2, (count, 96, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of 288 MB for the whole module, with a PCA inside."""
    return vggish_weights(tmp_path_factory.mktemp("vggish"), seed=5, pca=True)


def features(settings: AudioSettings, item: np.ndarray) -> np.ndarray:
    extractor = AudioExtractor(settings)
    extractor.load()
    found: np.ndarray
    (found,) = extractor.forward([extractor.preprocess(item)])
    extractor.close()
    return found


def test_vggish_is_torchvggish(weights: Path) -> None:
    """128-d before the last activation, with its stray ReLU, and after the PCA: all as torchvggish.

    The reference is torchvggish's own forward pass and post-processor on the same weights.
    """
    state = torch.load(weights, weights_only=True)
    vectors, means = state.pop("pca_eigen_vectors"), state.pop("pca_means")
    reference = torchvggish._vgg(postprocess=False)
    reference.load_state_dict(state)
    before: list[torch.Tensor] = []
    reference.embeddings[4].register_forward_hook(lambda _m, _i, out: before.append(out.clone()))
    item = patches(3)
    with torch.no_grad():
        after = reference(torch.from_numpy(item)[:, None])
    assert (before[0] < 0).any()

    base = AudioSettings(weights=str(weights), precision="fp32")
    found = features(base, item)
    assert found.shape == (3, 128)
    np.testing.assert_allclose(found, before[0].numpy(), atol=1e-4, rtol=2e-3)
    with_relu = features(base.model_copy(update={"stray_relu": True}), item)
    np.testing.assert_allclose(with_relu, after.numpy(), atol=1e-4, rtol=2e-3)

    postprocessor = torchvggish.Postprocessor.__new__(torchvggish.Postprocessor)
    postprocessor._pca_matrix, postprocessor._pca_means = vectors, means
    both = base.model_copy(update={"stray_relu": True, "postprocess": True})
    expected = postprocessor.postprocess(after)
    found = features(both, item)
    assert np.abs(found - expected.numpy()).max() <= 1  # one step of the quantiser
    assert len(np.unique(found)) > 3


def test_pretrained_vggish_is_found_in_torch_hub(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files put where the error says are used: the network's, and the PCA's numpy arrays."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    state = torch.load(weights, weights_only=True)
    pca = {key: state.pop(key).numpy() for key in ("pca_eigen_vectors", "pca_means")}
    torch.save(state, folder / Path(source_module().VGGISH_WEIGHTS).name)
    torch.save(pca, folder / Path(source_module().PCA_PARAMS).name)
    item = patches(1)
    for postprocess in (False, True):
        from_file = AudioSettings(weights=str(weights), postprocess=postprocess)
        np.testing.assert_array_equal(
            features(AudioSettings(postprocess=postprocess), item), features(from_file, item)
        )


def test_without_network_pretrained_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says which file of torchvggish's release to put where."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr("extractors.models.weights.reachable", lambda _url: False)
    with pytest.raises(ConfigError) as caught:
        AudioExtractor(AudioSettings()).load()
    line = str(caught.value)
    assert "\n" not in line
    for word in ("features.audio.weights", "vggish-10086976.pth", str(tmp_path / "checkpoints")):
        assert word in line


def test_a_file_without_pca_cannot_be_postprocessed(tmp_path: Path) -> None:
    """Post-processing needs the PCA in the weights file, and a file of another model is refused."""
    path = tiny_timm_weights(tmp_path, TINY_CNN, suffix=".pth")
    with pytest.raises(ConfigError, match=r"features.audio.postprocess: .*pca_eigen_vectors"):
        AudioExtractor(AudioSettings(weights=str(path), postprocess=True)).load()
    with pytest.raises(ConfigError, match=r"features.audio.weights: .*does not fit VGGish"):
        AudioExtractor(AudioSettings(weights=str(path))).load()


def test_the_switches_are_in_the_fingerprint(tmp_path: Path) -> None:
    prints = set()
    for update in ({}, {"stray_relu": True}, {"weights": "random:2"}):
        settings = AudioSettings(**{"weights": "random:1", **update})
        extractor = AudioExtractor(settings)
        extractor.load()
        prints.add(extractor.fingerprint)
        extractor.close()
    assert len(prints) == 3
