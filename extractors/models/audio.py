"""Sound -> features: VGGish, any timm model with one input channel, or a line of the part table."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from common.errors import ConfigError, FeatureError, one_line
from common.post import FeatureArray
from common.precision import (
    Arithmetic,
    autocast,
    cast_weights,
    resolve_precision,
    to_float16,
)
from config.settings import AudioSettings, ExtractorName
from extractors.fingerprint import digest
from extractors.models.base import Rows, check_device, check_finite, check_rows, run_rows
from extractors.models.timm_backbone import TimmBackbone, free_device
from extractors.models.weights import (
    Weights,
    parse_weights,
    read_state_dict,
    release_file,
    seeded,
    weights_digest,
)
from extractors.parts import LogMelPatches, audio_encoder

if TYPE_CHECKING:
    import torch

_SETTING = "features.audio"
_DIM = 128
_CLIP = 2.0
_PCA_VECTORS, _PCA_MEANS = "pca_eigen_vectors", "pca_means"


class SoundModel(Protocol):
    """An encoder of sound, as `extractors.parts.AUDIO_ENCODERS` names it.

    Attributes:
        kind: Part of the features' fingerprint; the encoder's family.
        dim: Columns of the features, known after `load`.
        digest: Of the weights, known after `load`.
    """

    kind: str
    dim: int
    digest: str

    def load(self) -> None:
        """Load the weights onto the device.

        Raises:
            ConfigError: They cannot be loaded.
        """

    def run(self, rows: Rows, name: str) -> FeatureArray:
        """Turn rows, float32 ``(n, *shape)`` of the table, into float16 ``(n, dim)``.

        Raises:
            FeatureError: The model gave values that are not finite.
        """

    def close(self) -> None:
        """Free the model."""


def timm_model(settings: AudioSettings, device: str) -> TimmBackbone:
    """Return any timm model, which reads log-mel patches as a picture of one channel."""
    return TimmBackbone(
        settings.arch,
        settings.weights,
        channels=1,
        size=LogMelPatches.shape,
        precision=settings.precision,
        device=device,
        setting=_SETTING,
        allow_pickle=settings.allow_pickle,
    )


def sound_model(settings: AudioSettings, device: str) -> SoundModel:
    """Return the encoder that the settings name; nothing is loaded yet."""
    module, _, name = audio_encoder(settings).model.partition(":")
    model: SoundModel = getattr(import_module(module), name)(settings, device)
    return model


class AudioExtractor:
    """Rows of sound, float32 ``(j, *shape)`` as the part table says -> float16 ``(j, dim)``."""

    name: ExtractorName = "audio"

    def __init__(self, settings: AudioSettings, device: str = "cpu") -> None:
        self.dim = 0
        self.fingerprint = ""
        self._settings = settings
        self._sound = audio_encoder(settings).sound
        self._model = sound_model(settings, device)
        self._loaded = False

    def load(self) -> None:
        """Load the model.

        Raises:
            ConfigError: The architecture, its weights or the device are not to be had.
        """
        if self._loaded:
            return
        self._model.load()
        self._loaded = True
        self.dim = self._model.dim
        vggish = self._model.kind == "vggish"
        self.fingerprint = digest(
            {
                "kind": self._model.kind,
                "arch": self._settings.arch,
                "weights": self._model.digest,
                "dim": self.dim,
                "preprocessing": self._sound.preprocessing,
                "stray_relu": vggish and self._settings.stray_relu,
                "postprocess": vggish and self._settings.postprocess,
            }
        )

    def preprocess(self, item: Rows) -> Rows:
        """Check one item.

        Raises:
            FeatureError: It is not float32 ``(j, *shape)``, or holds values that are not finite.
        """
        rows = check_rows("audio", item, self._sound.shape, "float32")
        if not np.isfinite(rows).all():
            raise FeatureError("audio: the sound holds values that are not finite")
        return rows

    def forward(self, items: Sequence[Rows]) -> list[FeatureArray]:
        """Return the features of every row of every item.

        Raises:
            FeatureError: The model gave values that are not finite.
        """
        return run_rows(
            items,
            dim=self.dim,
            batch_size=self._settings.batch_size,
            run=lambda rows: self._model.run(rows, "audio"),
        )

    def close(self) -> None:
        """Free the model."""
        if self._loaded:
            self._model.close()
        self._loaded = False


class Vggish:
    """torchvggish's network; 128-d before the last activation unless ``stray_relu``.

    Source: harritaylor/torchvggish, ``torchvggish.py``; its released graph ends in a ReLU that the
    original does not have (its issue 24).
    """

    kind = "vggish"

    def __init__(self, settings: AudioSettings, device: str) -> None:
        self.dim = _DIM
        self.digest = ""
        self._settings, self._device = settings, device
        self._arithmetic: Arithmetic = "fp32"
        self._network: Any = None
        self._vectors: torch.Tensor | None = None
        self._means: torch.Tensor | None = None

    def load(self) -> None:
        """Load the weights.

        Raises:
            ConfigError: The weights or the device are not to be had.
        """
        import torch

        check_device(self._device)
        self._arithmetic = resolve_precision(
            self._settings.precision, self._device, setting=f"{_SETTING}.precision"
        )
        weights = parse_weights(self._settings.weights, setting=f"{_SETTING}.weights")
        state = self._state(weights)
        self._take_pca(state)
        network = _network(weights, state, self._settings.weights)
        self.digest = weights_digest(
            weights, [weights.path] if weights.path else [], network.state_dict()
        )
        network.eval().requires_grad_(False)
        if not self._settings.stray_relu:
            network.embeddings = torch.nn.Sequential(*list(network.embeddings)[:-1])
        cast_weights(network, self._arithmetic)
        self._network = network.to(self._device, memory_format=torch.channels_last)

    @property
    def model(self) -> torch.nn.Module:
        """The loaded network, for export."""
        if self._network is None:
            raise RuntimeError("load() comes first")
        network: torch.nn.Module = self._network
        return network

    def close(self) -> None:
        """Free the network."""
        self._network = self._vectors = self._means = None
        free_device(self._device)

    def run(self, rows: Rows, name: str) -> FeatureArray:
        """Features ``(n, 128)`` float16 of patches ``(n, 96, 64)`` float32.

        Raises:
            FeatureError: The network gave values that are not finite.
        """
        import torch

        patches = torch.from_numpy(rows).to(self._device)[:, None]  # (n, 1, 96, 64)
        with torch.inference_mode():
            with autocast(self._device, self._arithmetic):
                features = self._network(patches)  # (n, 128)
            found: FeatureArray = to_float16(self.postprocess(features.float())).numpy()
        return check_finite(name, found)

    def postprocess(self, features: torch.Tensor) -> torch.Tensor:
        """PCA with whitening and 8-bit quantisation, as AudioSet's release does.

        Source: tensorflow/models, ``audioset/vggish/vggish_postprocess.py``.
        """
        if self._vectors is None or self._means is None:
            return features
        turned = (features - self._means) @ self._vectors.T
        return ((turned.clamp(-_CLIP, _CLIP) + _CLIP) * (255.0 / (2 * _CLIP))).round()

    def _state(self, weights: Weights) -> dict[str, torch.Tensor]:
        """The network's state dict, with the PCA's where it is wanted; empty for random ones."""
        setting = f"{_SETTING}.weights"
        if weights.path is not None:
            return read_state_dict(
                weights.path, setting=setting, allow_pickle=self._settings.allow_pickle
            )
        if not weights.pretrained:
            return {}
        module = source_module()
        state = read_state_dict(
            release_file(module.VGGISH_WEIGHTS, setting=setting), setting=setting
        )
        if self._settings.postprocess:
            extra = release_file(module.PCA_PARAMS, setting=setting)
            state |= read_state_dict(extra, setting=setting)
        return state

    def _take_pca(self, state: dict[str, torch.Tensor]) -> None:
        """Move the PCA's parameters out of a state dict."""
        vectors, means = state.pop(_PCA_VECTORS, None), state.pop(_PCA_MEANS, None)
        if not self._settings.postprocess:
            return
        if vectors is None or means is None:
            raise ConfigError(
                f"{_SETTING}.postprocess: {self._settings.weights} holds no {_PCA_VECTORS} and "
                f"{_PCA_MEANS}; add them to the file, or switch postprocess off"
            )
        if tuple(vectors.shape) != (_DIM, _DIM) or means.numel() != _DIM:
            raise ConfigError(
                f"{_SETTING}.weights: the PCA must be {_DIM}x{_DIM} with {_DIM} means"
            )
        self._vectors = vectors.float().to(self._device)
        self._means = means.float().reshape(1, _DIM).to(self._device)


def _network(weights: Weights, state: dict[str, torch.Tensor], where: str) -> Any:
    import torch

    build = source_module()._vgg
    if weights.seed is not None:
        with seeded(weights.seed):
            return build(postprocess=False)
    with torch.device("meta"):  # 72 million random numbers would only be overwritten
        network = build(postprocess=False)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = lines[1] if len(lines) > 1 else one_line(error, 300)
        raise ConfigError(
            f"{_SETTING}.weights: {where} does not fit VGGish: {reason[:200]}"
        ) from error
    return network.float()


def source_module() -> ModuleType:
    """The module ``torchvggish.torchvggish`` without its package.

    The package imports resampy, and with it numba: two seconds and 100 MB for a resampler that
    nothing here uses.

    Raises:
        ConfigError: The package is not installed, or its file is not where it was.
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
