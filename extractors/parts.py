"""The one table of decoded media: part -> modality -> shape, dtype and most rows.

    part     decoded from   one row                        read by the extractor
    frames   video          uint8 RGB (S, S, 3)            video
    image    image          uint8 RGB (S, S, 3)            image
    sound    video, audio   as its encoder's line says     audio
    picture  image, video   uint8 RGB (height, width, 3)   ocr
    speech   video, audio   float32, 30 s at 16 kHz        asr

Decoders write these arrays into a slot, extractors read them there; the plan of a post, the sizes
of slots and the checks of replies all follow this table.

A new encoder of sound is one file in ``extractors/models`` and one line in `AUDIO_ENCODERS`.
Neither torch nor cv2 is imported here: the King sizes its slots by this table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from common.errors import ConfigError
from common.post import MEDIA_KINDS, MediaKind, Modality
from config.features import AudioSettings, FeatureSettings, VideoSettings, VisualSettings
from config.settings import DecodeSettings, Settings

PLACED = Path("workshop/pretrained")
"""Folders of weights that were put in place, for machines without network, by their hub's name."""

PartKind: TypeAlias = Literal["frames", "image", "sound", "picture", "speech"]

PICTURES_ON_CPU, TEXTS_ON_CPU = 3, 8
"""Rows of a batch on a CPU at most, whatever ``batch_size``. Three pictures of EfficientNet-Lite0
take 9.8 ms each, 12 together 11.0, since what its layers hand on leaves the caches; and OpenVINO
compiles for each new size, 12 in the time of 18: two and three are compiled when it is loaded. At
double each takes a tenth longer. Sixteen texts take 3.7 ms each, eight 3.8, and answer earlier."""

# Arrays in a slot begin at multiples of this many bytes: a cache line, and the widest vector load
# of the CPU. Half would split loads; double would only waste space.
ALIGNMENT = 64
_PAGE = 4096  # bytes that a slot's size is rounded up to: the unit of memory that can be mapped

LONG_PICTURE = 4
"""Area of the largest picture for OCR, in squares of `features.ocr.max_side`: a tall one is read in
tiles. At 2 the small print of a chat of 12 screens is lost; at 8 reading it takes seconds more."""

_TALLEST_RATIO = 40
"""Height over width beyond which a picture is no screen but a line: it is shrunk like any other.
Half would lose long chats; double would read a dozen more tiles of lines too narrow for words."""

_LEGIBLE_RATIO = 2.5
"""Longer side over shorter up to which a picture is shrunk to `max_side` for OCR: the text of a
telephone's screen is still readable. At 2 these would cost twice the time; at 5 it is noise."""

ALIKE_GRID, ALIKE = 32, 3
"""Frames of a clip are read by OCR once where no cell of a grid over them differs by more, of 255:
a short word in small print of a faint grey changes one by 4, compression by up to 2. At half of
it slides of talks are read twice; at double faint subtitles are lost."""


@dataclass(frozen=True, slots=True)
class LogMelPatches:
    """The input of VGGish: log-mel patches of 0.96 s without overlap, float32 ``(n, 96, 64)``.

    Attributes:
        row_s: Seconds of sound in one row.
        preprocessing: Part of the features' fingerprint.
    """

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
        return self.samples / self.rate_hz

    @property
    def preprocessing(self) -> str:
        return f"{self.rate_hz} Hz mono waveform, windows of {self.samples} samples"


SoundInput: TypeAlias = LogMelPatches | WaveformWindows

SPEECH = WaveformWindows(16_000, 480_000)
"""The input of Whisper."""


@dataclass(frozen=True, slots=True)
class VisualEncoder:
    """One family of encoders of pictures, frames or clips.

    Attributes:
        model: ``module:callable``, by name so that the King does not import torch. It is called
            with (setting, `VisualSettings`, device, ``size=(height, width)``) and gives an
            `extractors.models.base.PictureEncoder`.
        clips: It sees runs of frames at once, and is for `features.video` alone.
    """

    model: str
    clips: bool = False


@dataclass(frozen=True, slots=True)
class AudioEncoder:
    """One family of encoders of sound.

    Attributes:
        model: As in `VisualEncoder`. It is called with (`AudioSettings`, device) and gives an
            `extractors.models.base.Encoder`.
        sound: The rows that the model takes.
    """

    model: str
    sound: SoundInput


VISUAL_ENCODERS: dict[str, VisualEncoder] = {
    "timm": VisualEncoder("extractors.models.visual:TimmBackbone"),
    "hog": VisualEncoder("extractors.models.hog:Hog"),
    "transformers": VisualEncoder("extractors.models.transformers_vision:TransformersVision"),
    "vjepa2": VisualEncoder("extractors.models.transformers_video:ClipEncoder", clips=True),
    "videomae": VisualEncoder("extractors.models.transformers_video:ClipEncoder", clips=True),
    "embedding_gemma2": VisualEncoder("extractors.models.omni:OmniPictures"),
}
"""Family, or one encoder by its name in ``arch``, -> encoder, for images and videos."""

AUDIO_ENCODERS: dict[str, AudioEncoder] = {
    "vggish": AudioEncoder("extractors.models.audio:Vggish", LogMelPatches()),
    "timm": AudioEncoder("extractors.models.audio:timm_model", LogMelPatches()),
    "audio-spectrogram-transformer": AudioEncoder(
        "extractors.models.transformers_audio:Ast", WaveformWindows(16_000, 163_840)
    ),
    "clap": AudioEncoder(
        "extractors.models.transformers_audio:Clap", WaveformWindows(48_000, 480_000)
    ),
    "whisper": AudioEncoder("extractors.models.transformers_audio:WhisperSound", SPEECH),
    "embedding_gemma2": AudioEncoder(
        "extractors.models.omni:OmniSound", WaveformWindows(16_000, 160_000)
    ),
}
"""Family, or one encoder by its name in `features.audio.arch`, -> encoder."""

_WORDS = {"ast": "audio-spectrogram-transformer", "embeddinggemma": "embedding_gemma2"}
"""Words in the names of hub repositories -> their family, where they are not its name."""


def visual_encoder(settings: VisualSettings) -> VisualEncoder:
    """Return the line of the settings' family; most of transformers share one."""
    arch = settings.arch
    family = arch if arch in VISUAL_ENCODERS else _family(arch, settings.weights, VISUAL_ENCODERS)
    return VISUAL_ENCODERS.get(family) or VISUAL_ENCODERS["transformers"]


def audio_encoder(settings: AudioSettings) -> AudioEncoder:
    """Return the line of the settings' encoder or family.

    Raises:
        ConfigError: It is a transformers model of no family here.
    """
    arch = settings.arch
    family = arch if arch in AUDIO_ENCODERS else _family(arch, settings.weights, AUDIO_ENCODERS)
    if family not in AUDIO_ENCODERS:
        known = ", ".join(name for name in AUDIO_ENCODERS if name not in ("timm", "vggish"))
        raise ConfigError(
            f"features.audio.arch: {arch} is of no known family of sound encoders ({known}) by its "
            f"{'config.json' if family else 'name'}; if it is, put it in place: "
            f"insighttag weights get {arch}"
        )
    return AUDIO_ENCODERS[family]


def part_of(name: str) -> Any:
    """Import what a line of a table names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def _family(arch: str, weights: str, families: Collection[str]) -> str:
    """Return ``timm``, or the model type of a transformers folder or hub repository.

    The King asks as well, and may reach no hub: without a folder the name must tell it.
    """
    for folder in (weights, arch, PLACED / arch.replace("/", "--")):
        config = Path(folder).expanduser() / "config.json"
        if config.is_file():
            return _model_type(config)
    if "/" not in arch:
        return "timm"
    words = re.split(r"[/_.-]+", arch.lower())
    named = (_WORDS.get(word, word) for word in words)
    return next((family for family in named if family in families), "")


@lru_cache(maxsize=64)
def _model_type(config: Path) -> str:
    try:
        return str(json.loads(config.read_text("utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{config}: is not a transformers config.json: {error!r}") from error


@dataclass(frozen=True, slots=True)
class FrameChoice:
    """How the frames of a video are chosen; part of the features' fingerprint.

    Attributes:
        count: Frames at most.
        least: Frames at least, of a clip that has them; for `auto` alone.
    """

    count: int
    mode: Literal["auto", "accurate", "keyframes"] = "accurate"
    least: int = 0

    @classmethod
    def of(cls, settings: VideoSettings) -> FrameChoice:
        """Return that of some settings; clips and an LSTM need frames at equal distances."""
        match settings.decode:
            case "auto" if not (visual_encoder(settings).clips or settings.lstm.weights):
                return cls(settings.frames, "auto", min(settings.min_frames, settings.frames))
            case "auto":
                return cls(settings.frames)
            case mode:
                return cls(settings.frames, mode)

    @property
    def sampling(self) -> dict[str, str | int]:
        """Return it under the names of the settings."""
        sampling: dict[str, str | int] = {
            "frames": self.count,
            "decode": self.mode,
            "colours": "of every pixel",
        }
        if self.mode == "auto":
            sampling |= {"min_frames": self.least, "key_frames": "all"}
        if self.mode != "accurate":
            sampling["loop_filter"] = "not of large key frames"
        return sampling


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a part; a picture is an array of its own, and this the largest there can be."""

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
        most_rows: The most rows that one media file of a kind gives; of pictures, how many of the
            size of `row` one file's are as large as.
    """

    modality: Modality
    media: tuple[MediaKind, ...]
    row: Callable[[FeatureSettings], Row]
    most_rows: Callable[[MediaKind, FeatureSettings, DecodeSettings], int]


def _square(side: int) -> Row:
    return Row((side, side, 3), "uint8")


def _pictures(kind: MediaKind, features: FeatureSettings) -> int:
    if not features.ocr.enabled:
        return 0
    return features.ocr.frames if kind == "video" else LONG_PICTURE


PARTS: Mapping[PartKind, PartSpec] = {
    "frames": PartSpec(
        modality="video",
        media=("video",),
        row=lambda features: _square(features.video.image_size),
        most_rows=lambda _kind, features, _limits: features.video.frames,
    ),
    "image": PartSpec(
        modality="image",
        media=("image",),
        row=lambda features: _square(features.image.image_size),
        most_rows=lambda _kind, features, _limits: features.image.max_frames * features.image.views,
    ),
    "sound": PartSpec(
        modality="audio",
        media=("video", "audio"),
        row=lambda features: Row(audio_encoder(features.audio).sound.shape, "float32"),
        most_rows=lambda _kind, features, limits: math.ceil(
            limits.max_audio_s / audio_encoder(features.audio).sound.row_s
        ),
    ),
    "picture": PartSpec(
        modality="ocr",
        media=("image", "video"),
        row=lambda features: _square(features.ocr.max_side),
        most_rows=lambda kind, features, _limits: _pictures(kind, features),
    ),
    "speech": PartSpec(
        modality="asr",
        media=("video", "audio"),
        row=lambda _features: Row(SPEECH.shape, "float32"),
        most_rows=lambda _kind, features, limits: math.ceil(
            speech_s(features, limits) / SPEECH.row_s
        ),
    ),
}


def speech_s(features: FeatureSettings, limits: DecodeSettings) -> float:
    """Return the most seconds of a file that are heard for words."""
    return min(features.asr.max_s, limits.max_audio_s) if features.asr.enabled else 0


def parts_of(kind: MediaKind) -> tuple[PartKind, ...]:
    """Return the parts that a media file of a kind can give, in the table's order."""
    return tuple(part for part, spec in PARTS.items() if kind in spec.media)


def slot_bytes(settings: Settings) -> int:
    """Return the size of one slot: the most bytes that one media file decodes to."""
    features = settings.features

    def decoded_bytes(kind: MediaKind) -> int:
        return sum(
            spec.row(features).nbytes * spec.most_rows(kind, features, settings.decode)
            for spec in PARTS.values()
            if kind in spec.media
        )

    # Each part is one array, each picture too; a few more are allowed for arrays that are copied.
    alignment = ALIGNMENT * (8 + features.ocr.frames)
    return -(-(max(map(decoded_bytes, MEDIA_KINDS)) + alignment) // _PAGE) * _PAGE


def fitted_size(width: int, height: int, max_side: int) -> tuple[int, int]:
    """Shrink width and height in proportion, so that the longer side is at most `max_side`."""
    longer = max(width, height)
    if longer <= max_side:
        return width, height
    return max(1, round(width * max_side / longer)), max(1, round(height * max_side / longer))


def reading_size(width: int, height: int, max_side: int) -> tuple[int, int]:
    """Return width and height at which OCR reads: `fitted_size`, larger for tall pictures.

    Tall pictures are read in tiles: their width is at most `max_side`, and their area at most
    `LONG_PICTURE` squares of it.
    """
    if height <= max_side or not _LEGIBLE_RATIO * width < height <= _TALLEST_RATIO * width:
        return fitted_size(width, height, max_side)
    scale = min(1.0, max_side / width, max_side * (LONG_PICTURE / (width * height)) ** 0.5)
    return max(1, int(width * scale)), max(1, int(height * scale))


def centres(total: int, parts: int) -> list[int]:
    """Return the index of the centre item of each of `parts` equal parts of `total` items."""
    return [(2 * i + 1) * total // (2 * parts) for i in range(parts)]
