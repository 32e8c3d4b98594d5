"""Windows of sound -> spectrograms of AST, CLAP and Whisper, a batch at once on its device.

transformers makes the same of one sound after another, on the CPU.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_KALDI_FRAME, _KALDI_HOP, _KALDI_FFT = 400, 160, 512  # 25 ms every 10 ms at 16 kHz
_PREEMPHASIS = 0.97
_KALDI_FLOOR = 1.192092955078125e-07
_FLOOR = 1e-10
_WHISPER_RANGE = 8.0  # powers of ten below the loudest band of a window


class MelBands:
    """Power in bands of frames, float32 ``(n, frames, bands)``, of sounds ``(n, samples)``.

    Args:
        window: Of a frame ``(samples,)``.
        filters: ``(bins, bands)``.
        hop: Samples from one frame to the next.
        device: Of the sounds.
        kaldi: Frames begin at the first sample, lose their mean and are pre-emphasised. Otherwise
            their centres are multiples of the hop, and the sound is mirrored at its ends.
    """

    def __init__(
        self,
        window: npt.NDArray[Any],
        filters: npt.NDArray[Any],
        hop: int,
        device: str,
        *,
        kaldi: bool = False,
    ) -> None:
        self._window = torch.as_tensor(np.asarray(window, np.float32)).to(device)
        self._filters = torch.as_tensor(np.asarray(filters, np.float32)).to(device)
        self._hop, self._kaldi = hop, kaldi

    def __call__(self, sounds: torch.Tensor) -> torch.Tensor:
        length = len(self._window)
        if not self._kaldi:
            half = length // 2
            sounds = torch.nn.functional.pad(sounds[:, None], (half, half), mode="reflect")[:, 0]
        frames = sounds.unfold(1, length, self._hop)  # (n, frames, length), a view
        if self._kaldi:
            frames = frames - frames.mean(-1, keepdim=True)
            before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
            frames = frames - _PREEMPHASIS * before
        bins = len(self._filters)
        spectrum = torch.fft.rfft(frames * self._window, n=2 * (bins - 1))  # (n, frames, bins)
        power: torch.Tensor = spectrum.real.square() + spectrum.imag.square()
        return power @ self._filters


def lengths_of(windows: torch.Tensor, shortest: int) -> torch.Tensor:
    """Return the samples int32 ``(n,)`` of windows before the silence at their end."""
    places = torch.arange(1, windows.shape[1] + 1, dtype=torch.int32, device=windows.device)
    return ((windows != 0) * places).amax(1).clamp(min=shortest)


class AstSpectrograms:
    """Spectrograms as ``ASTFeatureExtractor`` makes them: ``(n, 1024, 128)``, 0 behind a sound."""

    def __init__(self, processor: Any, device: str) -> None:
        from transformers.audio_utils import mel_filter_bank, window_function

        make: Any = mel_filter_bank
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own 128 bands one is empty, as in training
            filters = make(
                num_frequency_bins=_KALDI_FFT // 2 + 1,
                num_mel_filters=processor.num_mel_bins,
                min_frequency=20,
                max_frequency=processor.sampling_rate // 2,
                sampling_rate=processor.sampling_rate,
                norm=None,
                mel_scale="kaldi",
                triangularize_in_mel_space=True,
            )
        window: Any = window_function
        hann = window(_KALDI_FRAME, "hann", periodic=False)
        self._mel = MelBands(hann, filters, _KALDI_HOP, device, kaldi=True)
        self._frames = int(processor.max_length)
        self._mean, self._std = 0.0, 0.5
        if processor.do_normalize:
            self._mean, self._std = float(processor.mean), float(processor.std)

    def __call__(self, windows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        bands = self._mel(windows).clamp(min=_KALDI_FLOOR).log()
        counts = 1 + (lengths - _KALDI_FRAME) // _KALDI_HOP
        sounding = torch.arange(bands.shape[1], device=bands.device) < counts[:, None]
        bands = bands * sounding[:, :, None]
        bands = torch.nn.functional.pad(bands, (0, 0, 0, self._frames - bands.shape[1]))
        return (bands - self._mean) / (2 * self._std)


class ClapSpectrograms:
    """Spectrograms as ``ClapFeatureExtractor`` makes them of sounds within its window.

    ``(n, 1, frames, 64)``, or four times the same where the checkpoint fuses long sounds.
    """

    def __init__(self, processor: Any, device: str) -> None:
        from transformers.audio_utils import window_function

        self._copies = 4 if processor.truncation == "fusion" else 1
        fused = self._copies > 1
        filters = processor.mel_filters if fused else processor.mel_filters_slaney
        window: Any = window_function
        hann = window(processor.fft_window_size, "hann")
        self._mel = MelBands(hann, filters, processor.hop_length, device)
        self._samples, self._padding = int(processor.nb_max_samples), processor.padding

    def __call__(self, windows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        ends = lengths.clamp(max=self._samples).long()[:, None]
        places = torch.arange(self._samples, device=windows.device)[None]
        sounds = windows.gather(1, places % ends)  # each over and over
        match self._padding:
            case "repeatpad":
                sounds = sounds * (places < self._samples // ends * ends)
            case "pad":
                sounds = sounds * (places < ends)
        bands = self._mel(sounds).clamp(min=_FLOOR).log10() * 10
        return bands[:, None].expand(-1, self._copies, -1, -1)


class WhisperSpectrograms:
    """Spectrograms as ``WhisperFeatureExtractor`` makes them: ``(n, bands, frames)``."""

    def __init__(self, processor: Any, device: str) -> None:
        from transformers.audio_utils import window_function

        window: Any = window_function
        hann = window(processor.n_fft, "hann")
        self._mel = MelBands(hann, processor.mel_filters, processor.hop_length, device)
        self._samples = int(processor.n_samples)

    def __call__(self, windows: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Return them; what is behind a sound is silence, as in the window, so no length counts."""
        padding = (0, self._samples - windows.shape[1])
        bands = self._mel(torch.nn.functional.pad(windows, padding))[:, :-1]
        bands = bands.clamp(min=_FLOOR).log10().transpose(1, 2)  # (n, bands, frames)
        loudest = bands.amax((1, 2), keepdim=True)
        return (torch.maximum(bands, loudest - _WHISPER_RANGE) + 4) / 4
