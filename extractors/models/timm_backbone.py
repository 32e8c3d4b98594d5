"""A timm model as a feature extractor: pooled features of its last layer before the classifier."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError
from common.precision import Precision
from extractors.models.base import Encoder
from extractors.models.weights import (
    Weights,
    first_finding,
    hub_file,
    read_state_dict,
    seeded,
)

if TYPE_CHECKING:
    import torch

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


class TimmBackbone(Encoder):
    """Pooled features of a timm model.

    Args:
        arch: Name of a timm model.
        weights: As of `Encoder`.
        channels: 3 for pictures, normalised here with the model's own mean and deviation; 1 for
            log-mel patches, which are taken as they are.
        size: Height and width of the input in pixels.
        precision: As of `Encoder`.
        device: As of `Encoder`.
        setting: As of `Encoder`.
        allow_pickle: Accept a whole pickled model as ``weights``.
    """

    kind = "timm"

    def __init__(
        self,
        arch: str,
        weights: str,
        *,
        channels: int,
        size: tuple[int, int],
        precision: Precision,
        device: str,
        setting: str,
        allow_pickle: bool = False,
    ) -> None:
        super().__init__(setting, weights=weights, precision=precision, device=device)
        self.arch, self.size = arch, size
        self.mean: tuple[float, ...] = ()
        self.std: tuple[float, ...] = ()
        self._channels, self._allow_pickle = channels, allow_pickle
        self._shift: Any = None
        self._scale: Any = None

    def _build(self, weights: Weights) -> Any:
        import torch

        model = self._create(weights)
        own = model.pretrained_cfg
        if self._channels == 3:
            self.mean = tuple(float(x) for x in own["mean"])
            self.std = tuple(float(x) for x in own["std"])
            shape = (1, 3, 1, 1)
            self._shift = torch.tensor(self.mean).view(shape).mul(255).to(self.device)
            self._scale = torch.tensor(self.std).view(shape).mul(255).reciprocal().to(self.device)
        return model

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Encode uint8 ``(n, height, width, 3)``, or float32 ``(n, height, width)``."""
        [pixels] = inputs
        if self._channels == 1:
            images = pixels[:, None].float()
        else:  # (n, h, w, c) as (n, c, h, w): a view, which torch takes as channels_last
            images = pixels.permute(0, 3, 1, 2).float().sub_(self._shift).mul_(self._scale)
        states = self._network.forward_features(images)
        pooled: torch.Tensor = self._network.forward_head(states, pre_logits=True)  # (n, dim)
        return pooled

    def _find_dim(self) -> int:
        """Run one empty picture."""
        import torch

        empty = (
            torch.zeros((1, *self.size))
            if self._channels == 1
            else torch.zeros((1, *self.size, 3), dtype=torch.uint8)
        )
        try:
            features = self.infer(empty)
        except (RuntimeError, AssertionError, ValueError, AttributeError, TypeError) as error:
            raise self._wrong_size(self._network.pretrained_cfg["input_size"], error) from error
        if features.ndim != 2:
            raise ConfigError(f"{self.setting}.arch: {self.arch} gives no pooled features")
        return int(features.shape[1])

    def _create(self, weights: Weights) -> Any:
        """Return the model with its weights, on the CPU, in float32."""
        import timm

        setting = f"{self.setting}.weights"
        config = timm.get_pretrained_cfg(self.arch) if _is_model(self.arch) else None
        if config is None:
            close = difflib.get_close_matches(self.arch, timm.list_models(), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{self.setting}.arch: timm has no model {self.arch!r}{hint}")
        arguments: dict[str, Any] = {"num_classes": 0, "in_chans": self._channels}
        if config.fixed_input_size:
            arguments["img_size"] = self.size
        if weights.path is not None:
            arguments |= _from_file(
                weights.path, config, self._channels, setting, allow_pickle=self._allow_pickle
            )
        elif weights.pretrained:
            arguments |= _from_hub(config, self.arch, setting)
        try:
            with seeded(weights.seed):
                model: Any = timm.create_model(self.arch, **arguments)
        except (TypeError, RuntimeError, ValueError, AssertionError, KeyError) as error:
            if weights.seed is not None or "img_size" in str(error):
                raise self._wrong_size(config.input_size, error) from error
            raise ConfigError(
                f"{setting}: {self._weights} does not fit {self.arch}: {first_finding(error)}"
            ) from error
        model.pretrained_cfg.pop("state_dict", None)  # it would keep the weights twice in memory
        return model

    def _wrong_size(self, own: tuple[int, ...], error: BaseException) -> ConfigError:
        key = "image_size" if self._channels == 3 else "arch"
        return ConfigError(
            f"{self.setting}.{key}: {self.arch} does not take {self.size[0]}x{self.size[1]} "
            f"(its own size is {own[1]}x{own[2]}): {first_finding(error)}"
        )


def _is_model(arch: str) -> bool:
    import timm

    return bool(timm.is_model(arch.split(".", 1)[0]))


def _from_hub(config: Any, arch: str, setting: str) -> dict[str, Any]:
    """Return arguments that let timm load its own pretrained weights, from the cache or the hub."""
    if not config.hf_hub_id:
        raise ConfigError(
            f"{setting}: timm has no pretrained weights for {arch}; set {setting} to a path"
        )
    repo = str(config.hf_hub_id)
    if repo.endswith("/"):
        repo = f"{repo}{config.architecture}.{config.tag}"
    names = (config.hf_hub_filename,) if config.hf_hub_filename else _HUB_FILES
    file = hub_file(repo, names, setting=setting)
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file), "custom_load": False}}


def _from_file(
    path: Path, config: Any, channels: int, setting: str, *, allow_pickle: bool
) -> dict[str, Any]:
    """Return arguments that let timm fit a state dict to the model, or refuse one with gaps."""
    if not path.is_file():
        raise ConfigError(f"{setting}: {path} is no file")
    state = read_state_dict(path, setting=setting, allow_pickle=allow_pickle)
    classifiers = config.classifier or ()
    for name in (classifiers,) if isinstance(classifiers, str) else classifiers:
        state.pop(f"{name}.weight", None)
        state.pop(f"{name}.bias", None)
    # Without a classifier in its configuration timm loads strictly.
    overlay: dict[str, Any] = {"state_dict": state, "classifier": None, "custom_load": False}
    stems = config.first_conv or ()
    for name in (stems,) if isinstance(stems, str) else stems:
        stem = state.get(f"{name}.weight")
        if stem is not None and stem.ndim == 4 and stem.shape[1] == channels:
            overlay["first_conv"] = None  # it fits as it is
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}
