"""Pictures and frames -> features of a timm model, and a vector for a whole video.

Scheme 1 is a ViT; scheme 2 of videos is a TSN, a row for each segment, and an attention LSTM over
these rows.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from common.errors import ConfigError
from common.fingerprint import digest
from common.post import FeatureArray, Stream
from config.features import (
    AudioSettings,
    ImageSettings,
    LstmSizes,
    VideoLstmSettings,
    VideoSettings,
    VisualSettings,
)
from extractors.models.base import (
    Encoder,
    PictureEncoder,
    RowExtractor,
    Rows,
    check_finite,
    pass_on_device_errors,
)
from extractors.models.weights import (
    Weights,
    first_finding,
    hub_file,
    load_strictly,
    read_state_dict,
    seeded,
)
from extractors.parts import PICTURES_ON_CPU, FrameChoice, part_of, visual_encoder

_PREPROCESSING = {
    "image": "whole picture squashed to a square, halved and averaged, RGB",
    "video": "whole picture squashed to a square, area interpolation, RGB",
}


class TimmBackbone(PictureEncoder):
    """Pooled features of a timm model: its last layer before the classifier.

    Args:
        size: Height and width of the input in pixels.
        channels: 3 for pictures, normalised here with the model's own mean and deviation; 1 for
            log-mel patches, which are taken as they are.
    """

    kind = "timm"
    traced = True

    def __init__(
        self,
        setting: str,
        settings: VisualSettings | AudioSettings,
        device: str,
        *,
        size: tuple[int, int],
        channels: Literal[1, 3] = 3,
    ) -> None:
        super().__init__(setting, settings, device)
        self.arch, self.size = settings.arch, size
        self._channels, self._allow_pickle = channels, settings.allow_pickle

    def load(self) -> None:
        super().load()
        if self.dim:
            return
        empty = (
            np.zeros((1, *self.size), np.float32)
            if self._channels == 1
            else np.zeros((1, *self.size, 3), np.uint8)
        )
        try:
            features = self.run(empty)
        except (RuntimeError, AssertionError, ValueError, AttributeError, TypeError) as error:
            pass_on_device_errors(error)
            raise self._wrong_size(self._network.pretrained_cfg["input_size"], error) from error
        if features.ndim != 2:
            raise ConfigError(f"{self.setting}.arch: {self.arch} has no pooled features")
        self.dim = int(features.shape[1])

    def _build(self, weights: Weights) -> Any:
        import timm

        setting = f"{self.setting}.weights"
        known = timm.is_model(self.arch.split(".", 1)[0])
        config: Any = timm.get_pretrained_cfg(self.arch) if known else None
        if config is None:
            close = difflib.get_close_matches(self.arch, timm.list_models(), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{self.setting}.arch: timm has no model {self.arch!r}{hint}")
        arguments: dict[str, Any] = {"num_classes": 0, "in_chans": self._channels}
        if config.fixed_input_size:
            arguments["img_size"] = self.size
        if weights.seed is None:
            overlay = (
                _from_hub(config, self.arch, setting)
                if weights.path is None
                else self._from_file(weights, config, setting)
            )
            overlay["custom_load"] = False
            arguments |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
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
        if self._channels == 3:
            own = model.pretrained_cfg
            self._normalise_by(own["mean"], own["std"])
        return model

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Encode uint8 ``(n, height, width, 3)``, or float32 ``(n, height, width)``."""
        [pixels] = inputs
        patches = self._channels == 1
        images = self._as_network(pixels[:, None]) if patches else self._normalised(pixels)
        states = self._network.forward_features(images)
        pooled: torch.Tensor = self._network.forward_head(states, pre_logits=True)  # (n, dim)
        return pooled

    def _examples(self) -> Sequence[Sequence[Rows]]:
        if self._channels == 3:
            return super()._examples()
        chance = np.random.default_rng(0)
        return [[chance.normal(size=(n, *self.size)).astype(np.float32)] for n in (2, 3)]

    def _built_in(self) -> Sequence[object]:
        return (self.size, self._channels, self.mean, self.std)

    def _from_file(self, weights: Weights, config: Any, setting: str) -> dict[str, Any]:
        """Let timm fit a state dict to the model, or refuse one with gaps."""
        path, package = weights.path, weights.package
        if path is None or not path.is_file():
            raise ConfigError(f"{setting}: {path} is no file")
        state = read_state_dict(path, setting=setting, allow_pickle=self._allow_pickle)
        own: dict[str, Any] = {}
        if package is not None:  # its digest is known: the same parameters under other names
            state = dict(zip(_parameters(self.arch), state.values(), strict=True))
            own = {"mean": (package.mean,) * 3, "std": (package.std,) * 3} if package.mean else {}
        for name in _names(config.classifier):
            state.pop(f"{name}.weight", None)
            state.pop(f"{name}.bias", None)
        # Without a classifier in its configuration timm loads strictly.
        overlay: dict[str, Any] = {"state_dict": state, "classifier": None, **own}
        for name in _names(config.first_conv):
            stem = state.get(f"{name}.weight")
            if stem is not None and stem.ndim == 4 and stem.shape[1] == self._channels:
                overlay["first_conv"] = None  # it fits as it is
        return overlay

    def _wrong_size(self, own: tuple[int, ...], error: BaseException) -> ConfigError:
        key = "image_size" if self._channels == 3 else "arch"
        return ConfigError(
            f"{self.setting}.{key}: {self.arch} does not take {self.size[0]}x{self.size[1]} "
            f"(its own size is {own[1]}x{own[2]}): {first_finding(error)}"
        )


def _names(entry: str | Sequence[str] | None) -> Sequence[str]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _parameters(arch: str) -> list[str]:
    """Return the names of a timm model's parameters, those of its classifier too."""
    import timm

    with torch.device("meta"):
        return list(timm.create_model(arch).state_dict())


def _from_hub(config: Any, arch: str, setting: str) -> dict[str, Any]:
    """Let timm load its own pretrained weights, from the cache or the hub."""
    if not config.hf_hub_id:
        raise ConfigError(
            f"{setting}: timm has no pretrained weights for {arch}; set {setting} to a path"
        )
    repo = str(config.hf_hub_id)
    if repo.endswith("/"):
        repo = f"{repo}{config.architecture}.{config.tag}"
    own = config.hf_hub_filename
    files = (own,) if own else ("model.safetensors", "pytorch_model.bin")
    return {"file": str(hub_file(repo, files, setting=setting))}


def make_backbone(
    name: Literal["video", "image"], settings: VisualSettings, device: str
) -> PictureEncoder:
    """Return the encoder that the settings of a visual extractor name; nothing is loaded yet."""
    encoder = part_of(visual_encoder(settings).model)
    size = (settings.image_size, settings.image_size)
    backbone: PictureEncoder = encoder(f"features.{name}", settings, device, size=size)
    return backbone


class VisualExtractor(RowExtractor):
    """uint8 RGB ``(n, size, size, 3)`` -> float16 ``(n, dim)``, one row per picture.

    With ``features.image.padded`` a picture has two rows in, its views, and one out, their mean.
    The backbone may be shared with another extractor of the same architecture and weights.
    """

    def __init__(
        self,
        name: Literal["video", "image"],
        settings: VisualSettings,
        device: str = "cpu",
        *,
        backbone: PictureEncoder | None = None,
    ) -> None:
        self._backbone = backbone or make_backbone(name, settings, device)
        shape = (*self._backbone.size, 3)
        rows = settings.batch_size if device != "cpu" else min(settings.batch_size, PICTURES_ON_CPU)
        super().__init__(name, self._backbone, shape, "uint8", rows)
        self._settings = settings
        self._views = settings.views if isinstance(settings, ImageSettings) else 1

    def forward(self, items: Sequence[Rows]) -> list[Any]:
        rows = super().forward(items)
        if self._views == 1:
            return rows
        views = [each.reshape(-1, self._views, self.dim) for each in rows]  # (n, views, dim)
        return [each.mean(axis=1, dtype=np.float32).astype(np.float16) for each in views]

    def _preprocessing(self) -> Mapping[str, Any]:
        return {
            "size": self._settings.image_size,
            "mean": self._backbone.mean,
            "std": self._backbone.std,
            "preprocessing": _PREPROCESSING[self.name],
            "sampling": _sampling(self._settings),
        }


def _sampling(settings: VisualSettings) -> dict[str, object]:
    if not isinstance(settings, VideoSettings):
        shown: dict[str, object] = settings.model_dump(include={"max_frames", "padded"})
        if not shown.get("padded"):  # older fingerprints know one view only, and do not say so
            shown.pop("padded", None)
        return shown
    sampling: dict[str, object] = {**FrameChoice.of(settings).sampling}
    if settings.short_clips != "once":  # older fingerprints know only "once", and do not say so
        sampling["short_clips"] = settings.short_clips
    return sampling


class VideoExtractor(VisualExtractor):
    """Frames uint8 RGB ``(n, size, size, 3)`` -> rows of features, and with an LSTM one vector.

    An item's result is an array float16 ``(n, dim)``; with ``features.video.lstm.weights`` the
    streams ``video`` of the rows and ``video_lstm`` ``(1, width)``. With ``short_clips: repeat``
    n becomes ``features.video.frames`` wherever there is a frame at all.
    """

    def __init__(
        self,
        settings: VideoSettings,
        device: str = "cpu",
        *,
        backbone: PictureEncoder | None = None,
    ) -> None:
        super().__init__("video", settings, device, backbone=backbone)
        self._video = settings
        self._lstm = VideoLstm(settings.lstm, device) if settings.lstm.weights is not None else None

    def load(self) -> None:
        super().load()
        if self._lstm is not None:
            self._lstm.load_for(self.dim, self.fingerprint)

    def close(self) -> None:
        if self._lstm is not None:
            self._lstm.close()
        super().close()

    def forward(self, items: Sequence[Rows]) -> list[Any]:
        rows = super().forward(items)
        if self._video.short_clips == "repeat":
            rows = [each[segments(len(each), self._video.frames)] for each in rows]
        if self._lstm is None:
            return rows
        vectors = self._lstm.vectors(rows)
        return [{"video": r, "video_lstm": v} for r, v in zip(rows, vectors, strict=True)]

    def streams(self) -> Mapping[Stream, tuple[int, str]]:
        own = super().streams()
        if self._lstm is None:
            return own
        return {**own, "video_lstm": (self._lstm.dim, self._lstm.fingerprint)}


def segments(count: int, parts: int) -> npt.NDArray[np.intp]:
    """Return the frame at the centre of each of ``parts`` equal segments of ``count`` frames.

    Frames of a short clip are repeated; ``parts`` frames or more, or none, are taken once each.

    Source: TSN (arXiv 1608.00859), in test.
    """
    if not count or count >= parts:
        return np.arange(count)
    return ((2 * np.arange(parts) + 1) * count) // (2 * parts)


class AttentionLstm(nn.Module):
    """FC, tanh -> LSTM both ways -> dropout -> softmax attention, summed -> FC, ReLU -> FC, tanh.

    `fusion.backbones` trains it; in evaluation mode the dropout does nothing.

    Source: PaddleVideo, VideoTag's attention LSTM.
    """

    def __init__(self, dim: int, sizes: LstmSizes) -> None:
        super().__init__()
        self.project = nn.Linear(dim, sizes.projection)
        self.lstm = nn.LSTM(sizes.projection, sizes.hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(sizes.dropout)
        self.attend = nn.Linear(2 * sizes.hidden, 1)
        self.join = nn.Linear(2 * sizes.hidden, sizes.join)
        self.narrow = nn.Linear(sizes.join, sizes.width)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Return ``(videos, width)`` for frames ``(videos, n, dim)`` float32, n at least 1."""
        states, _ = self.lstm(torch.tanh(self.project(frames)))  # (videos, n, 2 * hidden)
        states = self.dropout(states)
        weights = self.attend(states).float().softmax(dim=1)  # (videos, n, 1)
        summed = (weights * states).sum(dim=1)  # (videos, 2 * hidden)
        vector: torch.Tensor = torch.tanh(self.narrow(torch.relu(self.join(summed))))
        return vector


class VideoLstm(Encoder):
    """The attention LSTM in service: part of the video extractor, behind the frames' encoder.

    Attributes:
        fingerprint: Of the vectors, that of the frames in it; known after `load_for`.
    """

    kind = "attention lstm"

    def __init__(self, settings: VideoLstmSettings, device: str) -> None:
        super().__init__("features.video.lstm", settings, device)
        self.dim = settings.width
        self.fingerprint = ""
        self._settings = settings
        self._frames_dim = 0

    def load_for(self, frames_dim: int, frames_fingerprint: str) -> None:
        """Load the weights for features of frames, of this length and fingerprint."""
        self._frames_dim = frames_dim
        self.load()
        sizes = self._settings
        self.fingerprint = digest(
            {
                "kind": self.kind,
                "frames": frames_fingerprint,
                "weights": self.digest,
                "sizes": [sizes.projection, sizes.hidden, sizes.join, sizes.width],
            }
        )

    def vectors(self, videos: Sequence[FeatureArray]) -> list[FeatureArray]:
        """Return float16 ``(1, dim)`` for each video ``(n, frames_dim)``; ``(0, dim)`` for n 0."""
        vectors: list[FeatureArray] = [np.empty((0, self.dim), np.float16)] * len(videos)
        # Only videos of one length share a batch: padding would let them change one another.
        for length in {len(video) for video in videos} - {0}:
            same = [i for i, video in enumerate(videos) if len(video) == length]
            for start in range(0, len(same), self._settings.batch_size):
                batch = same[start : start + self._settings.batch_size]
                rows = self.run(np.stack([videos[i] for i in batch]))
                check_finite("video.lstm", rows)
                for i, vector in zip(batch, rows, strict=True):
                    vectors[i] = vector[None]  # (dim) -> (1, dim)
        return vectors

    def _build(self, weights: Weights) -> AttentionLstm:
        settings, setting = self._settings, f"{self.setting}.weights"
        if weights.pretrained:
            raise ConfigError(
                f"{setting}: nobody publishes these weights: train them (train_net.py, "
                "config/train_video_tsn_lstm.yaml) and name the file"
            )
        with seeded(weights.seed):
            model = AttentionLstm(self._frames_dim, settings)
        if weights.path is not None:
            state = read_state_dict(
                weights.path, setting=setting, allow_pickle=settings.allow_pickle
            )
            what = (
                f"{setting}: {weights.path} does not fit frames of length {self._frames_dim} "
                f"and the sizes in {self.setting}"
            )
            load_strictly(model, state, what)
        return model

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        [frames] = inputs  # (videos, n, frames_dim) float16
        vectors: torch.Tensor = self._network(self._as_network(frames))  # (videos, dim)
        return vectors
