"""The one table of decoded media: part -> modality -> shape, dtype and most rows.

    part     decoded from   one row                        read by the extractor
    frames   video          uint8 RGB (S, S, 3)            video
    image    image          uint8 RGB (S, S, 3)            image
    sound    video, audio   as its encoder's line says     audio
    picture  image, video   uint8 RGB (height, width, 3)   ocr

Decoders write these arrays into a slot, extractors read them there; the plan of a post, the sizes
of slots and the checks of replies all follow this table.

A new encoder of sound is one file in ``extractors/models`` and one line in `AUDIO_ENCODERS`.
Neither torch nor cv2 is imported here: the King sizes its slots by this table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np

from common.post import MediaKind, Modality
from config.settings import AudioSettings, DecodeSettings, FeatureSettings, Settings, VisualSettings

PartKind: TypeAlias = Literal["frames", "image", "sound", "picture"]

ALIGNMENT = 64
"""Arrays in a slot begin at multiples of this many bytes: a cache line, and the widest vector load
of the CPU. Half would split loads; double would only waste space."""

_PAGE = 4096
"""Bytes that a slot's size is rounded up to: a page of memory, the unit that can be mapped."""


@dataclass(frozen=True, slots=True)
class LogMelPatches:
    """The input of VGGish: log-mel patches of 0.96 s without overlap, float32 ``(n, 96, 64)``."""

    rate_hz: ClassVar[int] = 16_000
    shape: ClassVar[tuple[int, int]] = (96, 64)
    row_s: ClassVar[float] = 0.96
    preprocessing: ClassVar[str] = (
        "16 kHz mono, 25 ms periodic Hann, 10 ms hop, 64 mel bands 125-7500 Hz, log +0.01"
    )


@dataclass(frozen=True, slots=True)
class WaveformWindows:
    """Plain sound, cut into windows of one length, float32 ``(n, samples)`` in [-1, 1].

    For encoders that compute their own spectrogram, or none.

    Attributes:
        rate_hz: Samples per second that the encoder was trained on.
        samples: Length of one window.
    """

    rate_hz: int
    samples: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.samples,)

    @property
    def row_s(self) -> float:
        """Return the seconds of sound in one window."""
        return self.samples / self.rate_hz

    @property
    def preprocessing(self) -> str:
        """Description that is part of the features' fingerprint."""
        return f"{self.rate_hz} Hz mono waveform, windows of {self.samples} samples"


SoundInput: TypeAlias = LogMelPatches | WaveformWindows


@dataclass(frozen=True, slots=True)
class AudioEncoder:
    """One encoder of sound.

    Attributes:
        model: ``module:callable``, by name so that the King does not import torch. It is called
            with (`AudioSettings`, device) and gives an `extractors.models.base.Encoder`.
        sound: The rows that the model takes.
    """

    model: str
    sound: SoundInput


AUDIO_ENCODERS: dict[str, AudioEncoder] = {
    "vggish": AudioEncoder("extractors.models.audio:Vggish", LogMelPatches()),
}
"""``features.audio.arch`` -> encoder; any other name is that of a timm model."""

_TIMM = AudioEncoder("extractors.models.audio:timm_model", LogMelPatches())


def audio_encoder(settings: AudioSettings) -> AudioEncoder:
    """Return the encoder that the settings name."""
    return AUDIO_ENCODERS.get(settings.arch, _TIMM)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a part; of a picture, which is an array of its own, the largest there can be."""

    shape: tuple[int, ...]
    dtype: Literal["uint8", "float32"]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class PartSpec:
    """One line of the table.

    Attributes:
        modality: Of the features; the extractor that reads the part has the same name.
        media: Kinds of media files that give the part.
        row: Shape and dtype of one row under some settings.
        most_rows: The most rows that one media file of a kind gives.
    """

    modality: Modality
    media: tuple[MediaKind, ...]
    row: Callable[[FeatureSettings], Row]
    most_rows: Callable[[MediaKind, FeatureSettings, DecodeSettings], int]


def _square(settings: VisualSettings) -> Row:
    return Row((settings.image_size, settings.image_size, 3), "uint8")


def _sound_rows(limits: DecodeSettings, sound: SoundInput) -> int:
    return math.ceil(limits.max_audio_s / sound.row_s)


def _pictures(kind: MediaKind, features: FeatureSettings) -> int:
    if not features.ocr.enabled:
        return 0
    return features.ocr.frames if kind == "video" else 1


PARTS: Mapping[PartKind, PartSpec] = {
    "frames": PartSpec(
        modality="video",
        media=("video",),
        row=lambda features: _square(features.video),
        most_rows=lambda _kind, features, _limits: features.video.frames,
    ),
    "image": PartSpec(
        modality="image",
        media=("image",),
        row=lambda features: _square(features.image),
        most_rows=lambda _kind, features, _limits: features.image.max_frames,
    ),
    "sound": PartSpec(
        modality="audio",
        media=("video", "audio"),
        row=lambda features: Row(audio_encoder(features.audio).sound.shape, "float32"),
        most_rows=lambda _kind, features, limits: _sound_rows(
            limits, audio_encoder(features.audio).sound
        ),
    ),
    "picture": PartSpec(
        modality="ocr",
        media=("image", "video"),
        row=lambda features: Row((features.ocr.max_side, features.ocr.max_side, 3), "uint8"),
        most_rows=lambda kind, features, _limits: _pictures(kind, features),
    ),
}


def parts_of(kind: MediaKind) -> tuple[PartKind, ...]:
    """Return the parts that a media file of a kind can give, in the table's order."""
    return tuple(part for part, spec in PARTS.items() if kind in spec.media)


def slot_bytes(settings: Settings) -> int:
    """Return the size of one slot: the most bytes that one media file decodes to."""
    features = settings.features

    def decoded_bytes(kind: MediaKind) -> int:
        specs = [PARTS[part] for part in parts_of(kind)]
        return sum(
            spec.row(features).nbytes * spec.most_rows(kind, features, settings.decode)
            for spec in specs
        )

    # Each part is one array, each picture too; a few more are allowed for arrays that are copied.
    alignment = ALIGNMENT * (8 + features.ocr.frames)
    most = max(decoded_bytes("image"), decoded_bytes("video"), decoded_bytes("audio"))
    return -(-(most + alignment) // _PAGE) * _PAGE
