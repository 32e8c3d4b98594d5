"""Sound -> the rows that an encoder takes: log-mel patches, or windows of the waveform.

The resampling is FFmpeg's, by PyAV.

Source of the patches: VGGish (Hershey et al., ICASSP 2017), tensorflow/models
``research/audioset/vggish``: mono 16 kHz, 25 ms periodic Hann, 10 ms hop, FFT 512, magnitude,
64 HTK mel bands from 125 to 7500 Hz, log(x + 0.01), patches of 96 frames without overlap.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

import av
import cv2
import numpy as np
import numpy.typing as npt

from common.errors import MediaError
from extractors.media.containers import Packet, Stream, reason
from extractors.parts import LogMelPatches, SoundInput, WaveformWindows

Waveform: TypeAlias = npt.NDArray[np.float32]
Rows: TypeAlias = npt.NDArray[np.float32]

PATCH_FRAMES, BANDS = LogMelPatches.shape
# As VGGish was trained, 25 and 10 ms at 16 kHz: its weights know no other features.
_WINDOW, _HOP, _FFT = 400, 160, 512  # samples
_LOWEST_HZ, _HIGHEST_HZ = 125.0, 7500.0
_LOG_OFFSET = 0.01
_RATES_HZ = (1000, 1_000_000)
"""Sample rates of real files are 8 to 384 kHz. At 1 Hz a packet would be resampled to hours."""
_LOUDEST = 8.0
"""Samples are cut to it. Full scale is 1; floating-point files may hold anything, infinity too, and
real ones pass full scale a little: half would cut loud masters, double lets noise through."""
_SPARE_S = 0.1
"""Seconds that are decoded beyond the limit: resampling keeps less than a hundredth back. Half
would do; double is only more work."""
_BLOCK_SAMPLES = 200_000
"""Samples that are mixed and resampled at once: 4 to 5 s of most files. With a tenth, the calls
from Python cost as much as their work; ten times as many need 70 MB for 5.1 sound."""
_MANY_CHANNELS = 8
"""From here on PyAV does not read planar sound well."""
_PATCH_SAMPLES = _WINDOW + (PATCH_FRAMES - 1) * _HOP
_BLOCK_PATCHES = 2
"""Transformed at once: their spectra, 1 MB, stay in the CPU's cache. With one the calls cost a
tenth more; from ten on, the memory that each block asks the system for costs as much as its work.
"""


def sound_rows(waveform: Waveform, sound: SoundInput) -> Rows:
    """Turn sound at ``sound.rate_hz`` into the rows of an encoder.

    float32 ``(samples,)`` in [-1, 1], mono -> float32 ``(n, *sound.shape)``, n at least 1.
    """
    match sound:
        case LogMelPatches():
            return log_mel_patches(waveform)
        case WaveformWindows(samples=samples):
            return waveform_windows(waveform, samples)


def waveform_windows(waveform: Waveform, samples: int) -> Rows:
    """Cut sound float32 ``(total,)`` into windows without overlap, float32 ``(windows, samples)``.

    The rest beyond whole windows is padded with silence if it fills half a window, else dropped;
    sound shorter than one window is always padded.
    """
    count = max(1, (len(waveform) + samples // 2) // samples)
    windows = np.zeros(count * samples, np.float32)
    whole = waveform[: len(windows)]
    windows[: len(whole)] = whole
    return windows.reshape(count, samples)  # (count * samples,) -> (count, samples)


def log_mel_patches(waveform: Waveform) -> Rows:
    """Turn sound float32 ``(samples,)``, mono, 16 kHz into VGGish's input ``(patches, 96, 64)``.

    Sound under one patch is padded with silence; what is left beyond whole patches is dropped.
    """
    if len(waveform) < _PATCH_SAMPLES:
        waveform = np.pad(waveform, (0, _PATCH_SAMPLES - len(waveform)))
    count = (1 + (len(waveform) - _WINDOW) // _HOP) // PATCH_FRAMES
    # (frames, window): a view, one frame every 10 ms
    frames = np.lib.stride_tricks.sliding_window_view(waveform, _WINDOW)[::_HOP]
    patches = np.empty((count, PATCH_FRAMES, BANDS), np.float32)
    block = np.zeros((_BLOCK_PATCHES * PATCH_FRAMES, _FFT))  # frames, filled up with silence
    for first in range(0, count, _BLOCK_PATCHES):
        last = min(count, first + _BLOCK_PATCHES)
        part = frames[first * PATCH_FRAMES : last * PATCH_FRAMES]
        np.multiply(part, _window(), out=block[: len(part), :_WINDOW])
        # Packed: the real bin 0, then real and imaginary parts of bins 1 to 255, the real bin 256.
        spectra = cv2.dft(block[: len(part)], flags=cv2.DFT_ROWS)  # (frames, 512)
        packed = np.asarray(spectra[:, 1:-1], np.float32)  # (frames, 510)
        magnitudes = np.abs(packed.view(np.complex64))  # (frames, 255)
        mel = magnitudes @ _mel_weights()  # (frames, bands)
        # (frames, bands) -> (patches, 96 frames, bands)
        patches[first:last] = np.log(mel + np.float32(_LOG_OFFSET)).reshape(-1, PATCH_FRAMES, BANDS)
    return patches


@lru_cache(maxsize=1)
def _window() -> npt.NDArray[np.float64]:
    """Return the periodic Hann window ``(400,)``: one period, not numpy's symmetric window."""
    phase = 2 * np.pi * np.arange(_WINDOW) / _WINDOW
    return np.asarray(0.5 - 0.5 * np.cos(phase))


@lru_cache(maxsize=1)
def _mel_weights() -> npt.NDArray[np.float32]:
    """Return HTK mel triangles ``(255, 64)``: FFT bins 1 to 255 -> bands; others have no weight."""
    bins = _mel(np.linspace(0.0, LogMelPatches.rate_hz / 2, _FFT // 2 + 1))[1:-1, None]  # (255, 1)
    edges = np.linspace(_mel(np.float64(_LOWEST_HZ)), _mel(np.float64(_HIGHEST_HZ)), BANDS + 2)
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]  # (64,) each
    rising, falling = (bins - lower) / (centre - lower), (upper - bins) / (upper - centre)
    return np.asarray(np.maximum(0.0, np.minimum(rising, falling)), np.float32)


def _mel(frequency_hz: Any) -> Any:
    return 1127.0 * np.log1p(frequency_hz / 700.0)


class SoundTrack:
    """One sound stream as mono at one rate, collected packet by packet up to a limit.

    A stream of None stands for no sound, which is no mistake: it gives an empty waveform. Of the
    packets that were `fed`, the `broken` ones could not be decoded; `error` says why.
    """

    def __init__(self, stream: Stream | None, max_audio_s: float, rate_hz: int) -> None:
        self._rate_hz = rate_hz
        self._codec: Any = stream.codec_context if stream is not None else None
        self._chunks: list[Waveform] = []
        self._most = int(max_audio_s * rate_hz) if stream is not None else 0
        self._left_s = max_audio_s + _SPARE_S if stream is not None else 0.0
        self._setup: tuple[object, ...] | None = None
        self._block: Any = None
        self._to_float: Any = None
        self._resampler: Any = None
        self.fed = self.broken = 0
        self.error: str | None = None

    @property
    def full(self) -> bool:
        """Return True when the limit is reached: further packets are ignored."""
        return self._left_s <= 0

    def feed(self, packet: Packet | None) -> None:
        """Decode a packet; None flushes the decoder."""
        if self.full:
            return
        self.fed += packet is not None
        try:
            frames = self._codec.decode(packet)
        except (av.error.FFmpegError, ValueError) as error:
            self._note_broken(reason(error))
            return
        for frame in frames:
            self._collect(frame)

    def _note_broken(self, why: str) -> None:
        self.broken += 1
        self.error = self.error or why

    def waveform(self) -> Waveform:
        """Flush and return float32 ``(samples,)``; MediaError when nothing could be decoded."""
        self.feed(None)
        self._drain()
        if self.error and not self._chunks:
            raise MediaError(f"the sound cannot be decoded: {self.error}")
        waveform = np.concatenate([np.empty(0, np.float32), *self._chunks])[: self._most]
        return np.clip(waveform, -_LOUDEST, _LOUDEST, out=waveform)

    def _collect(self, frame: Any) -> None:
        if not _RATES_HZ[0] <= frame.sample_rate <= _RATES_HZ[1]:
            self._note_broken(f"{frame.sample_rate} Hz is no rate of sound")
            return
        setup = (frame.format.name, frame.layout.name, frame.sample_rate)
        if setup != self._setup:  # also in mid-stream: joined files change their rate or layout
            self._drain()
            self._setup = setup
            self._block = av.AudioFifo()
            # Interleaved: PyAV reads past the end of a planar frame's list of 8 channels and more.
            self._to_float = av.AudioResampler("flt", frame.layout, frame.sample_rate)
            self._resampler = av.AudioResampler("fltp", "mono", self._rate_hz)
        frame.pts = None  # gaps and jumps of time stamps are no silence
        self._left_s -= frame.samples / frame.sample_rate
        try:
            self._block.write(frame)
        except (av.error.FFmpegError, ValueError) as error:
            self._note_broken(reason(error))
        if self._block.samples >= _BLOCK_SAMPLES:
            self._convert(self._block.read())

    def _drain(self) -> None:
        if self._setup is not None:
            self._convert(self._block.read())
            self._convert(None)
            self._setup = None

    def _convert(self, block: Any) -> None:
        """Mix a block to mono at our rate; None flushes the resampler."""
        try:
            mono = self._mixed(block) if block is not None else None
            resampled = self._resampler.resample(mono)
        except (av.error.FFmpegError, ValueError) as error:
            self._note_broken(reason(error))
            return
        self._chunks += [frame.to_ndarray()[0] for frame in resampled]  # (1, samples) each

    def _mixed(self, block: Any) -> Any:
        """Return the mean of the channels, as VGGish mixes; FFmpeg's own mono is 3 dB louder."""
        count = block.layout.nb_channels
        if block.format.name == "fltp" and count < _MANY_CHANNELS:
            channels = block.to_ndarray()  # (channels, samples)
        else:
            [block] = self._to_float.resample(block)
            # (1, samples * channels) -> (channels, samples)
            channels = block.to_ndarray().reshape(-1, count).T
        loud = not max(channels.max(), -channels.min()) <= _LOUDEST  # NaN is
        if block.format.name == "fltp" and block.layout.name == "mono" and not loud:
            return block
        if loud:
            channels = np.clip(np.nan_to_num(channels), -_LOUDEST, _LOUDEST)
        mono = channels.mean(0, dtype=np.float32) if count > 1 else channels[0]
        mixed = av.AudioFrame.from_ndarray(mono[None], format="fltp", layout="mono")
        mixed.sample_rate = block.sample_rate
        return mixed
