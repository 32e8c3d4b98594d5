"""The attention LSTM: features of a video's frames -> one vector for the whole video.

Source: PaddleVideo, VideoTag's attention LSTM.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from common.errors import ConfigError
from common.post import FeatureArray
from common.precision import (
    Arithmetic,
    autocast,
    cast_weights,
    resolve_precision,
    to_float16,
)
from config.features import LstmSizes, VideoLstmSettings
from extractors.fingerprint import digest
from extractors.models.base import check_finite
from extractors.models.weights import parse_weights, read_state_dict, seeded, weights_digest

_SETTING = "features.video.lstm"


class AttentionLstm(nn.Module):
    """FC, tanh -> LSTM both ways -> dropout -> softmax attention, summed -> FC, ReLU -> FC, tanh.

    `fusion.backbones` trains it; in evaluation mode the dropout does nothing.
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


class VideoLstm:
    """The loaded model; part of the video extractor, behind the frames' model.

    Attributes:
        dim: Length of a video's vector.
        fingerprint: Of the vectors, that of the frames in it; known after `load`.
    """

    def __init__(self, settings: VideoLstmSettings, device: str) -> None:
        self.dim = settings.width
        self.fingerprint = ""
        self._settings, self._device = settings, device
        self._arithmetic: Arithmetic = "fp32"
        self._model: AttentionLstm | None = None

    def load(self, frames_dim: int, frames_fingerprint: str) -> None:
        """Load the weights.

        Args:
            frames_dim: Length of a frame's features.
            frames_fingerprint: What these are made with.

        Raises:
            ConfigError: The weights or the device are not to be had, or do not fit.
        """
        settings = self._settings
        weights = parse_weights(settings.weights or "", setting=f"{_SETTING}.weights")
        if weights.pretrained:
            raise ConfigError(
                f"{_SETTING}.weights: nobody publishes these weights: train them (train_net.py, "
                "config/train_video_tsn_lstm.yaml) and name the file"
            )
        self._arithmetic = resolve_precision(
            settings.precision, self._device, setting=f"{_SETTING}.precision"
        )
        with seeded(weights.seed):
            model = AttentionLstm(frames_dim, settings)
        if weights.path is not None:
            state = read_state_dict(
                weights.path, setting=f"{_SETTING}.weights", allow_pickle=settings.allow_pickle
            )
            try:
                model.load_state_dict(state, strict=True)
            except RuntimeError as error:
                raise ConfigError(
                    f"{_SETTING}.weights: {weights.path} does not fit frames of length "
                    f"{frames_dim} and the sizes in {_SETTING}: {_first_finding(error)}"
                ) from error
        used = weights_digest(weights, [weights.path] if weights.path else [], model.state_dict())
        self.fingerprint = digest(
            {
                "kind": "attention lstm",
                "frames": frames_fingerprint,
                "weights": used,
                "sizes": [settings.projection, settings.hidden, settings.join, settings.width],
            }
        )
        model.eval().requires_grad_(False)
        cast_weights(model, self._arithmetic)
        self._model = model.to(self._device)

    @property
    def model(self) -> AttentionLstm:
        """The loaded model, for export."""
        if self._model is None:
            raise RuntimeError("load() comes first")
        return self._model

    def close(self) -> None:
        """Free the model."""
        self._model = None

    def run(self, videos: Sequence[FeatureArray]) -> list[FeatureArray]:
        """Vectors of videos.

        Args:
            videos: float16 ``(n, frames_dim)`` of each; n may be 0.

        Returns:
            float16 ``(1, dim)`` of each, ``(0, dim)`` of one without frames.

        Raises:
            FeatureError: The model gave values that are not finite.
        """
        found: list[FeatureArray] = [np.empty((0, self.dim), np.float16)] * len(videos)
        by_length: dict[int, list[int]] = {}
        for place, video in enumerate(videos):
            by_length.setdefault(len(video), []).append(place)
        # Of one length in one batch: padding would let videos change one another.
        for places in (p for length, p in by_length.items() if length):
            for start in range(0, len(places), self._settings.batch_size):
                chosen = places[start : start + self._settings.batch_size]
                vectors = self._run(np.stack([videos[place] for place in chosen]))
                for place, vector in zip(chosen, vectors, strict=True):
                    found[place] = vector[None]  # (dim) -> (1, dim)
        return found

    def _run(self, frames: FeatureArray) -> FeatureArray:
        if self._model is None:
            raise RuntimeError("load() comes first")
        rows = torch.from_numpy(frames).to(self._device).float()  # (videos, n, frames_dim)
        with torch.inference_mode(), autocast(self._device, self._arithmetic):
            vectors: FeatureArray = to_float16(self._model(rows)).numpy()
        return check_finite("video.lstm", vectors)


def _first_finding(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 else "".join(lines))[:200]
