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
from config.features import LstmSizes, VideoLstmSettings
from extractors.fingerprint import digest
from extractors.models.base import Encoder
from extractors.models.weights import Weights, first_finding, read_state_dict, seeded

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


class VideoLstm(Encoder):
    """The attention LSTM in service: part of the video extractor, behind the frames' encoder.

    Attributes:
        fingerprint: Of the vectors, that of the frames in it; known after `load_for`.
    """

    kind = "attention lstm"

    def __init__(self, settings: VideoLstmSettings, device: str) -> None:
        super().__init__(
            _SETTING, weights=settings.weights or "", precision=settings.precision, device=device
        )
        self.dim = settings.width
        self.fingerprint = ""
        self._settings = settings
        self._frames_dim = 0

    def load_for(self, frames_dim: int, frames_fingerprint: str) -> None:
        """Load the weights for features of frames.

        Args:
            frames_dim: Length of a frame's features.
            frames_fingerprint: Of these features.

        Raises:
            ConfigError: The weights or the device cannot be had, or do not fit.
        """
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
        """Return the vectors of videos.

        Args:
            videos: float16 ``(n, frames_dim)`` of each; n may be 0.

        Returns:
            float16 ``(1, dim)`` of each, ``(0, dim)`` of one without frames.

        Raises:
            FeatureError: The model gave values that are not finite.
        """
        vectors: list[FeatureArray] = [np.empty((0, self.dim), np.float16)] * len(videos)
        by_length: dict[int, list[int]] = {}
        for index, video in enumerate(videos):
            by_length.setdefault(len(video), []).append(index)
        # Only videos of one length share a batch: padding would let them change one another.
        for indices in (same for length, same in by_length.items() if length):
            for start in range(0, len(indices), self._settings.batch_size):
                batch = indices[start : start + self._settings.batch_size]
                rows = self.run(np.stack([videos[i] for i in batch]), "video.lstm")
                for i, vector in zip(batch, rows, strict=True):
                    vectors[i] = vector[None]  # (dim) -> (1, dim)
        return vectors

    def _build(self, weights: Weights) -> AttentionLstm:
        settings, setting = self._settings, f"{_SETTING}.weights"
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
            try:
                model.load_state_dict(state, strict=True)
            except RuntimeError as error:
                raise ConfigError(
                    f"{setting}: {weights.path} does not fit frames of length "
                    f"{self._frames_dim} and the sizes in {_SETTING}: {first_finding(error)}"
                ) from error
        return model

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        [frames] = inputs  # (videos, n, frames_dim) float16
        vectors: torch.Tensor = self._network(frames.float())  # (videos, dim)
        return vectors

    def _find_dim(self) -> int:
        return self._settings.width
