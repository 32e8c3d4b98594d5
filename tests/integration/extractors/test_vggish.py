"""Patches -> VGGish features: against torchvggish itself; the network has no small form."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvggish import torchvggish

from common.errors import ConfigError
from common.files import file_digest
from config.features import AudioSettings
from extractors.models import audio, catalog
from extractors.models.audio import AudioExtractor, source_module
from extractors.models.catalog import needs_of
from extractors.models.placed import fetch
from extractors.models.weights import VGGISH, Release
from extractors.parts import PLACED
from tests.support.tiny_models import TINY_CNN, tiny_timm_weights, vggish_weights
from tests.unit.extractors.test_encoder_contract import keep_the_contract, patch_family


def patches(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(-2, 2, (count, 96, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of 288 MB for the whole module, with a PCA inside."""
    return vggish_weights(tmp_path_factory.mktemp("vggish"), seed=5, pca=True)


def features(settings: AudioSettings, item: np.ndarray) -> np.ndarray:
    extractor = AudioExtractor(settings)
    extractor.load()
    rows: np.ndarray
    (rows,) = extractor.forward([extractor.preprocess(item)])
    extractor.close()
    return rows


def test_vggish_keeps_the_contract_of_every_family(weights: Path) -> None:
    keep_the_contract(patch_family("vggish"), weights)


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
    rows = features(base, item)
    assert rows.shape == (3, 128)
    np.testing.assert_allclose(rows, before[0].numpy(), atol=1e-4, rtol=2e-3)
    with_relu = features(base.model_copy(update={"stray_relu": True}), item)
    np.testing.assert_allclose(with_relu, after.numpy(), atol=1e-4, rtol=2e-3)

    postprocessor = torchvggish.Postprocessor.__new__(torchvggish.Postprocessor)
    postprocessor._pca_matrix, postprocessor._pca_means = vectors, means
    both = base.model_copy(update={"stray_relu": True, "postprocess": True})
    expected = postprocessor.postprocess(after)
    rows = features(both, item)
    assert np.abs(rows - expected.numpy()).max() <= 1  # one step of the quantiser
    assert len(np.unique(rows)) > 3


def test_pretrained_vggish_is_found_in_torch_hub_and_in_place(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network's file and the PCA's numpy arrays; put in place, no cache is needed."""
    module = source_module()
    assert VGGISH.urls == (module.VGGISH_WEIGHTS, module.PCA_PARAMS)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    state = torch.load(weights, weights_only=True)
    pca = {key: state.pop(key).numpy() for key in ("pca_eigen_vectors", "pca_means")}
    urls = []
    for content in (state, pca):
        torch.save(content, folder / "file.pth")
        named = folder / f"vggish-{file_digest(folder / 'file.pth')[:8]}.pth"
        (folder / "file.pth").rename(named)
        urls.append(f"https://nowhere.invalid/{named.name}")
    released = Release("me/vggish", tuple(urls))
    for each in (audio, catalog):
        monkeypatch.setattr(each, "VGGISH", released)
    item = patches(1)
    expected = [
        features(AudioSettings(weights=str(weights), postprocess=p), item) for p in (False, True)
    ]

    monkeypatch.chdir(tmp_path)
    for place in ("cache", "in place"):
        if place == "in place":
            [need] = needs_of("vggish")
            assert fetch(need, PLACED)
            shutil.rmtree(folder)
        for array, postprocess in zip(expected, (False, True), strict=True):
            rows = features(AudioSettings(postprocess=postprocess), item)
            np.testing.assert_array_equal(rows, array, err_msg=place)


def test_a_released_file_with_another_checksum_is_not_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    for url in VGGISH.urls:
        (tmp_path / "checkpoints" / Path(url).name).write_bytes(b"half a file")
    [need] = needs_of("vggish")
    with pytest.raises(ConfigError, match=r"sha256 of .*must begin with 10086976: remove"):
        fetch(need, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_network_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line names the file of torchvggish's release, and the command that brings it."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr("extractors.models.weights.reachable", lambda _url: False)
    with pytest.raises(ConfigError) as caught:
        AudioExtractor(AudioSettings()).load()
    line = str(caught.value)
    assert "\n" not in line
    for word in ("features.audio.weights", VGGISH.urls[0], "insighttag weights get harritaylor/"):
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
        extractor = AudioExtractor(AudioSettings(**{"weights": "random:1", **update}))
        extractor.load()
        prints.add(extractor.fingerprint)
        extractor.close()
    assert len(prints) == 3
