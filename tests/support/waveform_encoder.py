"""A tiny encoder of plain sound on random weights: an example of a line in `AUDIO_ENCODERS`."""

import torch

from config.features import AudioSettings
from extractors.models.base import Encoder
from extractors.models.weights import Weights, seeded
from extractors.parts import AudioEncoder, WaveformWindows

DIM = 8
LINE = AudioEncoder(f"{__name__}:TinyWaveform", WaveformWindows(rate_hz=48_000, samples=24_000))


class TinyWaveform(Encoder):
    """Energy of random filters over each window."""

    kind = "tiny waveform"
    dim = DIM

    def __init__(self, settings: AudioSettings, device: str) -> None:
        super().__init__("features.audio", settings, device)

    def _build(self, weights: Weights) -> torch.nn.Module:
        with seeded(weights.seed):
            return torch.nn.Linear(480, DIM, bias=False)

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        [windows] = inputs
        frames = windows.reshape(len(windows), -1, 480)  # (n, samples) -> (n, samples / 480, 480)
        energy: torch.Tensor = self._network(frames).abs().mean(1)  # (n, dim)
        return energy
