"""A tiny encoder of plain sound on random weights: an example of a line in `AUDIO_ENCODERS`."""

from __future__ import annotations

import numpy as np

from common.post import FeatureArray
from config.settings import AudioSettings
from extractors.models.base import Rows
from extractors.parts import AudioEncoder, WaveformWindows

DIM = 8
LINE = AudioEncoder(f"{__name__}:TinyWaveform", WaveformWindows(rate_hz=48_000, samples=24_000))


class TinyWaveform:
    """Energy of random filters over each window."""

    kind = "tiny waveform"

    def __init__(self, settings: AudioSettings, device: str) -> None:
        self.dim = DIM
        self.digest = f"{settings.weights} on {device}"

    def load(self) -> None:
        self.filters = np.random.default_rng(1).normal(size=(480, DIM))

    def run(self, rows: Rows, name: str) -> FeatureArray:
        frames = rows.reshape(len(rows), -1, 480)  # (n, samples) -> (n, samples / 480, 480)
        return np.asarray(np.abs(frames @ self.filters).mean(1), np.float16)

    def close(self) -> None:
        del self.filters
