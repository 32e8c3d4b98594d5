"""Windows of sound -> AST, CLAP, or the encoder of Whisper; each has its own spectrogram.

A window's silence at its end is cut off before: what fills the window is then the family's own
filling, as in its training, and a short sound has one vector whatever the window's length.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from common.errors import ConfigError
from config.features import AudioSettings
from extractors.models.base import Rows
from extractors.models.from_transformers import (
    TextQueryable,
    TransformersEncoder,
    pooled,
    processor_digest,
)
from extractors.models.spectrograms import (
    AstSpectrograms,
    ClapSpectrograms,
    WhisperSpectrograms,
    lengths_of,
)
from extractors.parts import audio_encoder

Sound: TypeAlias = npt.NDArray[np.float32]

_SETTING = "features.audio"
# A sound has at least one frame of its spectrogram: 25 ms at 16 kHz, and 1,024 samples for CLAP.
_SHORTEST = 1024
_WHISPER_HOP = 320  # samples of one state: 10 ms between frames of the spectrogram, two to a state


class SoundEncoder(TransformersEncoder):
    """One vector per window of plain sound.

    Attributes:
        processor: Class of transformers that makes the spectrogram of a sound.
        spectrograms: Ours, which makes those of a batch on the device.
    """

    processor: ClassVar[str]
    spectrograms: ClassVar[type[AstSpectrograms | ClapSpectrograms | WhisperSpectrograms]]

    def __init__(self, settings: AudioSettings, device: str) -> None:
        super().__init__(_SETTING, settings, device)
        sound = audio_encoder(settings).sound
        self._rate_hz, self._samples = sound.rate_hz, sound.shape[0]
        self._spectrograms: Any = None

    def _take(self, model: Any, source: str, *, local: bool) -> None:
        import transformers

        super()._take(model, source, local=local)
        made = getattr(transformers, self.processor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of AST's own 128 bands one is empty, as in training
            processor = made.from_pretrained(source, local_files_only=local)
        if processor.sampling_rate != self._rate_hz:
            raise ConfigError(
                f"{_SETTING}.arch: {self._named} takes {processor.sampling_rate} Hz, and "
                f"its family here {self._rate_hz} Hz"
            )
        self._spectrograms = type(self).spectrograms(processor, self.device)
        self.processing = processor_digest(source, local=local)
        self.dim = self._dim_of(model.config)

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        [windows] = inputs  # (n, samples)
        # Spectrograms are made in float32: bf16 would cut their bands to three digits.
        with torch.autocast(windows.device.type, enabled=False):
            lengths = lengths_of(windows, _SHORTEST)
            spectrograms = self._spectrograms(windows, lengths)
        return self._vectors(self._as_network(spectrograms), lengths)

    def _examples(self) -> Sequence[Sequence[Rows]]:
        chance, samples = np.random.default_rng(0), self._samples
        batches = [chance.normal(0, 0.1, (n, samples)).astype(np.float32) for n in (2, 3)]
        for windows in batches:
            windows[1, samples // 3 :] = 0
        return [[windows] for windows in batches]

    @abstractmethod
    def _vectors(self, spectrograms: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return ``(n, dim)`` for spectrograms of sounds of some lengths in samples."""

    @abstractmethod
    def _dim_of(self, config: Any) -> int:
        """Return the length of a vector."""


def without_end(window: Sound) -> Sound:
    """Return a window without the silence at its end."""
    sounding = np.flatnonzero(window)
    length = int(sounding[-1]) + 1 if len(sounding) else 0
    return window[: max(length, _SHORTEST)]


class Ast(SoundEncoder):
    """Audio Spectrogram Transformer: 1,024 frames at once, 10.24 s; poor on sounds of one second.

    Source: arXiv 2104.01778.
    """

    model_types = ("audio-spectrogram-transformer",)
    processor = "ASTFeatureExtractor"
    spectrograms = AstSpectrograms

    def _dim_of(self, config: Any) -> int:
        return int(config.hidden_size)

    def _vectors(self, spectrograms: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return pooled(self._network(input_values=spectrograms))


class Clap(SoundEncoder, TextQueryable):
    """CLAP, whose windows of 10 s leave nothing to crop: it crops longer sounds at random.

    Source: arXiv 2211.06687; LAION-AI/CLAP issue 166.
    """

    model_types = ("clap",)
    processor = "ClapFeatureExtractor"
    spectrograms = ClapSpectrograms

    def _dim_of(self, config: Any) -> int:
        return int(config.projection_dim)

    def _vectors(self, spectrograms: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        # Its processor calls one sound of a batch longer, by chance, where none is.
        longer = torch.zeros(len(spectrograms), 1, dtype=torch.bool, device=spectrograms.device)
        return pooled(self._network.get_audio_features(spectrograms, is_longer=longer))


class WhisperSound(SoundEncoder):
    """The encoder of Whisper: the mean of its states while there is sound.

    Source: arXiv 2212.04356; the mean as in arXiv 2309.10457.
    """

    model_types = ("whisper",)
    processor = "WhisperFeatureExtractor"
    spectrograms = WhisperSpectrograms
    part = "encoder"

    def _dim_of(self, config: Any) -> int:
        return int(config.d_model)

    def _vectors(self, spectrograms: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        states = self._network(spectrograms).last_hidden_state.float()
        ends = (lengths + _WHISPER_HOP - 1) // _WHISPER_HOP
        places = torch.arange(states.shape[1], device=states.device)
        counted = (places < ends[:, None]).to(states)  # (n, states)
        vectors: torch.Tensor = (states * counted[:, :, None]).sum(1) / counted.sum(1)[:, None]
        return vectors
