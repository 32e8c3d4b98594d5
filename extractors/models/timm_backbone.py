"""A timm model as a feature extractor: pooled features of its last layer before the classifier."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import ConfigError
from common.post import FeatureArray
from common.precision import (
    Arithmetic,
    Precision,
    autocast,
    cast_weights,
    resolve_precision,
    to_float16,
)
from extractors.models.base import Rows, check_device, check_finite
from extractors.models.weights import (
    Weights,
    hub_file,
    parse_weights,
    read_state_dict,
    seeded,
    weights_digest,
)

if TYPE_CHECKING:
    import torch

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


class TimmBackbone:
    """A timm model that extractors may share; the first one loads it, the last one frees it.

    Args:
        arch: Name of a timm model.
        weights: ``pretrained``, a path, or ``random:SEED``.
        channels: 3 for pictures, normalised here with the model's own mean and deviation; 1 for
            log-mel patches, which are taken as they are.
        size: Height and width of the input in pixels.
        precision: Of the forward pass.
        device: ``cpu`` or ``cuda:N``.
        setting: Section of the settings, for errors: ``features.image``.
        allow_pickle: Whether ``weights`` may be a whole pickled model.
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
        self._allow_pickle = allow_pickle
        self.arch, self.size, self.device = arch, size, device
        self._weights, self._precision, self._setting = weights, precision, setting
        self._channels = channels
        self._users = 0
        self._arithmetic: Arithmetic = "fp32"
        self._model: Any = None
        self._shift: Any = None
        self._scale: Any = None
        self.dim = 0
        self.digest = ""
        self.mean: tuple[float, ...] = ()
        self.std: tuple[float, ...] = ()

    def load(self) -> None:
        """Load the weights, and run one empty picture through them.

        Raises:
            ConfigError: The architecture, its size, its weights or the device are not to be had.
        """
        if self._model is None:
            self._load()
        self._users += 1

    def close(self) -> None:
        """Free the model when its last user closes it."""
        self._users = max(0, self._users - 1)
        if self._users == 0:
            self._model = None
            free_device(self.device)

    @property
    def model(self) -> torch.nn.Module:
        """The loaded model, for export; its input is normalised before it."""
        if self._model is None:
            raise RuntimeError("load() comes first")
        model: torch.nn.Module = self._model
        return model

    def run(self, rows: Rows, name: str) -> FeatureArray:
        """Features of pictures or patches.

        Args:
            rows: uint8 ``(n, height, width, 3)``, or float32 ``(n, height, width)``.
            name: Whose rows they are, for errors.

        Returns:
            float16 ``(n, dim)``.

        Raises:
            FeatureError: The model gave values that are not finite.
        """
        return check_finite(name, self._run(rows))

    def _run(self, rows: Rows) -> FeatureArray:
        import torch

        pixels = torch.from_numpy(rows).to(self.device)
        with torch.inference_mode(), autocast(self.device, self._arithmetic):
            # (n, h, w, c) as (n, c, h, w): a view, which torch takes as channels_last
            inputs = pixels[:, None] if self._channels == 1 else pixels.permute(0, 3, 1, 2)
            states = self._model.forward_features(self._normalise(inputs.float()))
            pooled = self._model.forward_head(states, pre_logits=True)  # (n, dim)
        features: FeatureArray = to_float16(pooled).numpy()
        return features

    def _normalise(self, inputs: torch.Tensor) -> torch.Tensor:
        if self._channels == 1:
            return inputs
        return inputs.sub_(self._shift).mul_(self._scale)

    def _load(self) -> None:
        import torch

        check_device(self.device)
        self._arithmetic = resolve_precision(
            self._precision, self.device, setting=f"{self._setting}.precision"
        )
        weights = parse_weights(self._weights, setting=f"{self._setting}.weights")
        model = self._create(weights)
        model.eval().requires_grad_(False)
        self.digest = weights_digest(
            weights, [weights.path] if weights.path else [], model.state_dict()
        )
        own = model.pretrained_cfg
        if self._channels == 3:
            self.mean = tuple(float(x) for x in own["mean"])
            self.std = tuple(float(x) for x in own["std"])
            shape = (1, 3, 1, 1)
            self._shift = torch.tensor(self.mean).view(shape).mul(255).to(self.device)
            self._scale = torch.tensor(self.std).view(shape).mul(255).reciprocal().to(self.device)
        cast_weights(model, self._arithmetic)
        self._model = model.to(self.device, memory_format=torch.channels_last)
        self.dim = self._measure_dim()

    def _create(self, weights: Weights) -> Any:
        """The model with its weights, on the CPU, in float32."""
        import timm

        setting = f"{self._setting}.weights"
        config = timm.get_pretrained_cfg(self.arch) if _is_model(self.arch) else None
        if config is None:
            close = difflib.get_close_matches(self.arch, timm.list_models(), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{self._setting}.arch: timm has no model {self.arch!r}{hint}")
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
                f"{setting}: {self._weights} does not fit {self.arch}: {_what_differs(error)}"
            ) from error
        model.pretrained_cfg.pop("state_dict", None)  # it would keep the weights twice in memory
        return model

    def _measure_dim(self) -> int:
        rows: Rows = (
            np.zeros((1, *self.size), np.float32)
            if self._channels == 1
            else np.zeros((1, *self.size, 3), np.uint8)
        )
        try:
            features = self._run(rows)
        except (RuntimeError, AssertionError, ValueError, AttributeError, TypeError) as error:
            own = self._model.pretrained_cfg["input_size"]
            self._model = None
            raise self._wrong_size(own, error) from error
        if features.ndim != 2:
            self._model = None
            raise ConfigError(f"{self._setting}.arch: {self.arch} gives no pooled features")
        return int(features.shape[1])

    def _wrong_size(self, own: tuple[int, ...], error: BaseException) -> ConfigError:
        key = "image_size" if self._channels == 3 else "arch"
        return ConfigError(
            f"{self._setting}.{key}: {self.arch} does not take {self.size[0]}x{self.size[1]} "
            f"(its own size is {own[1]}x{own[2]}): {_what_differs(error)}"
        )


def free_device(device: str) -> None:
    """Give memory of dropped models back to the device."""
    if device == "cpu":
        return
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _is_model(arch: str) -> bool:
    import timm

    return bool(timm.is_model(arch.split(".", 1)[0]))


def _from_hub(config: Any, arch: str, setting: str) -> dict[str, Any]:
    """Arguments that let timm load its own pretrained weights, out of the cache or the hub."""
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
    """Arguments that let timm fit a state dict to the model, and refuse one that lacks anything."""
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


def _what_differs(error: BaseException) -> str:
    """The error of torch lists every key over many lines: its first finding is enough."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = lines[1] if len(lines) > 1 and lines[0].startswith("Error(s)") else "".join(lines[:1])
    return found if len(found) < 200 else f"{found[:200]}…"
