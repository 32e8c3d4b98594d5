"""Sound -> features: VGGish, any timm model with one input channel, or a line of the part table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from common.errors import ConfigError, FeatureError
from config.features import AudioSettings
from extractors.models.base import Encoder, RowExtractor, Rows
from extractors.models.visual import TimmBackbone
from extractors.models.weights import (
    VGGISH,
    Weights,
    load_strictly,
    read_state_dict,
    release_file,
    seeded,
)
from extractors.parts import LogMelPatches, audio_encoder, part_of

_SETTING = "features.audio"
_CLIP = 2.0  # of the release: whitened values beyond +-2 are rare
_PCA_VECTORS, _PCA_MEANS = "pca_eigen_vectors", "pca_means"


def timm_model(settings: AudioSettings, device: str) -> TimmBackbone:
    """Return any timm model, which reads log-mel patches as a picture of one channel."""
    return TimmBackbone(_SETTING, settings, device, size=LogMelPatches.shape, channels=1)


def build_encoder(settings: AudioSettings, device: str) -> Encoder:
    """Return the encoder of the settings' line in the part table, not loaded."""
    encoder: Encoder = part_of(audio_encoder(settings).model)(settings, device)
    return encoder


class AudioExtractor(RowExtractor):
    """Rows of sound, float32 ``(j, *shape)`` as the part table says -> float16 ``(j, dim)``."""

    def __init__(self, settings: AudioSettings, device: str = "cpu") -> None:
        self._settings, self._sound = settings, audio_encoder(settings).sound
        encoder = build_encoder(settings, device)
        super().__init__("audio", encoder, self._sound.shape, "float32", settings.batch_size)

    def preprocess(self, item: Any) -> Rows:
        rows = super().preprocess(item)
        if not np.isfinite(rows).all():
            raise FeatureError("audio: the sound holds values that are not finite")
        return rows

    def _preprocessing(self) -> Mapping[str, Any]:
        vggish = self._encoder.kind == "vggish"
        return {
            "arch": self._settings.arch,
            "preprocessing": self._sound.preprocessing,
            "stray_relu": vggish and self._settings.stray_relu,
            "postprocess": vggish and self._settings.postprocess,
        }


class Vggish(Encoder):
    """torchvggish's network; 128-d before the last activation unless ``stray_relu``.

    Source: harritaylor/torchvggish, ``torchvggish.py``; its released graph ends in a ReLU that the
    original does not have (its issue 24).
    """

    kind = "vggish"
    dim = 128

    def __init__(self, settings: AudioSettings, device: str) -> None:
        super().__init__(_SETTING, settings, device)
        self._settings = settings
        self._pca: tuple[torch.Tensor, torch.Tensor] | None = None

    def postprocess(self, features: torch.Tensor) -> torch.Tensor:
        """Apply PCA with whitening and 8-bit quantisation, as AudioSet's release does.

        Source: tensorflow/models, ``audioset/vggish/vggish_postprocess.py``.
        """
        if self._pca is None:
            return features
        vectors, means = self._pca
        turned = (features - means) @ vectors.T
        return ((turned.clamp(-_CLIP, _CLIP) + _CLIP) * (255.0 / (2 * _CLIP))).round()

    def _build(self, weights: Weights) -> Any:
        state = self._state(weights)
        self._take_pca(state)
        build = source_module()._vgg
        if weights.seed is not None:
            with seeded(weights.seed):
                network = build(postprocess=False)
        else:
            with torch.device("meta"):  # 72 million random numbers would only be overwritten
                network = build(postprocess=False)
            what = f"{_SETTING}.weights: {self._weights} does not fit VGGish"
            load_strictly(network, state, what, assign=True)
            network = network.float()
        if not self._settings.stray_relu:
            network.embeddings = torch.nn.Sequential(*list(network.embeddings)[:-1])
        return network

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        [patches] = inputs  # (n, 96, 64)
        patches = self._as_network(patches[:, None])  # (n, 1, 96, 64)
        features: torch.Tensor = self._network(patches)  # (n, 128)
        return features

    def _examples(self) -> Sequence[Sequence[Rows]]:
        chance = np.random.default_rng(0)
        shape = LogMelPatches.shape
        return [[chance.normal(-2, 2, (n, *shape)).astype(np.float32)] for n in (2, 3)]

    def _state(self, weights: Weights) -> dict[str, torch.Tensor]:
        """Return the network's state dict, with the PCA's if it is used; empty for random ones."""
        setting = f"{_SETTING}.weights"
        if weights.path is not None:
            return read_state_dict(
                weights.path, setting=setting, allow_pickle=self._settings.allow_pickle
            )
        if not weights.pretrained:
            return {}
        urls = VGGISH.urls if self._settings.postprocess else VGGISH.urls[:1]
        files = [release_file(u, setting=setting, repository=VGGISH.repository) for u in urls]
        states = [read_state_dict(file, setting=setting) for file in files]
        return {key: tensor for state in states for key, tensor in state.items()}

    def _take_pca(self, state: dict[str, torch.Tensor]) -> None:
        """Move the PCA's parameters out of a state dict."""
        vectors, means = state.pop(_PCA_VECTORS, None), state.pop(_PCA_MEANS, None)
        if not self._settings.postprocess:
            return
        dim = self.dim
        if vectors is None or vectors.shape != (dim, dim) or means is None or means.numel() != dim:
            raise ConfigError(
                f"{_SETTING}.postprocess: {self._weights} holds no {_PCA_VECTORS} ({dim}, {dim}) "
                f"and {_PCA_MEANS} ({dim}); add them to the file, or switch postprocess off"
            )
        means = means.float().reshape(1, dim)
        self._pca = vectors.float().to(self.device), means.to(self.device)


def source_module() -> ModuleType:
    """Return the module ``torchvggish.torchvggish`` without its package.

    The package imports resampy, and with it numba: two seconds and 100 MB for a resampler that
    nothing here uses.
    """
    package = find_spec("torchvggish")
    if package is None or not package.submodule_search_locations:
        raise ConfigError(f"{_SETTING}.arch: vggish needs the package torchvggish")
    file = Path(package.submodule_search_locations[0]) / "torchvggish.py"
    spec = spec_from_file_location("_torchvggish_network", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{_SETTING}.arch: {file} cannot be imported")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
