"""Clips of frames -> V-JEPA 2 or VideoMAE, which see motion: one vector per clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from common.errors import ConfigError
from config.features import VideoSettings, VisualSettings
from extractors.models.base import PictureEncoder, Rows, noisy_and_plain
from extractors.models.from_transformers import TransformersEncoder, processor_values
from extractors.models.visual import VisualExtractor, segments


class ClipEncoder(TransformersEncoder, PictureEncoder):
    """The mean of the states of a clip uint8 ``(n, frames, size, size, 3)``.

    Source: arXiv 2506.09985 (V-JEPA 2), 2203.12602 (VideoMAE).

    Attributes:
        frames: Of one clip, known after `load`.
    """

    model_types = ("vjepa2", "videomae")
    channels_last = False

    def __init__(
        self, setting: str, settings: VisualSettings, device: str, *, size: tuple[int, int]
    ) -> None:
        super().__init__(setting, settings, device)
        if not isinstance(settings, VideoSettings):
            raise ConfigError(
                f"{setting}.arch: {self._name} sees clips of frames; it is for features.video"
            )
        self.size, self.frames, self._most_frames = size, 0, settings.frames

    def _check(self, config: Any) -> None:
        super()._check(config)
        own = config.crop_size if config.model_type == "vjepa2" else config.image_size
        if self.size[0] != own:
            raise ConfigError(
                f"{self.setting}.image_size: {self._name} takes {own}, not {self.size[0]}"
            )

    def _take(self, model: Any, source: str, *, local: bool) -> None:
        super()._take(model, source, local=local)
        config = model.config
        values = processor_values(source, local=local)
        self._normalise_by(values["image_mean"], values["image_std"])
        self.dim = int(config.hidden_size)
        if config.model_type == "videomae":
            self.frames = int(config.num_frames)  # it has a position for each
        else:  # any number of whole tubes
            tubes = -(-self._most_frames // config.tubelet_size)
            self.frames = min(tubes * config.tubelet_size, int(config.frames_per_clip))

    def _examples(self) -> Sequence[Sequence[Rows]]:
        return [[noisy_and_plain(n, (self.frames, *self.size, 3))] for n in (2, 3)]

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        [clips] = inputs
        pictures = self._normalised(clips.flatten(0, 1))  # (n * frames, 3, size, size)
        videos = pictures.reshape(*clips.shape[:2], *pictures.shape[1:])  # (n, frames, 3, ...)
        if hasattr(self._network, "get_vision_features"):
            output = self._network.get_vision_features(pixel_values_videos=videos)
        else:
            output = self._network(pixel_values=videos)
        states = getattr(output, "last_hidden_state", output)  # (n, tokens, dim)
        mean: torch.Tensor = states.float().mean(1)
        return mean


class ClipExtractor(VisualExtractor):
    """Frames uint8 RGB ``(n, size, size, 3)`` -> float16 ``(clips, dim)``.

    The frames of a video are cut into clips; a clip that has too few repeats them.
    """

    def __init__(self, settings: VideoSettings, device: str = "cpu") -> None:
        size = (settings.image_size, settings.image_size)
        self._clips = ClipEncoder("features.video", settings, device, size=size)
        self._frames_at_once = settings.batch_size
        super().__init__("video", settings, device, backbone=self._clips)
        if settings.lstm.weights is not None or settings.short_clips != "once":
            raise ConfigError(
                f"features.video.arch: {settings.arch} sees whole clips: leave "
                "features.video.lstm.weights null and features.video.short_clips at once"
            )

    def load(self) -> None:
        super().load()
        self.batch_size = max(1, self._frames_at_once // self._clips.frames)

    def forward(self, items: Sequence[Rows]) -> list[Any]:
        return super().forward([self._cut(item) for item in items])

    def _cut(self, item: Rows) -> Rows:
        length = self._clips.frames
        runs = [item[start : start + length] for start in range(0, len(item), length)]
        clips = [run[segments(len(run), length)] for run in runs]
        return np.stack(clips) if clips else np.empty((0, length, *item.shape[1:]), item.dtype)

    def _preprocessing(self) -> Mapping[str, Any]:
        return {**super()._preprocessing(), "clip": self._clips.frames}
