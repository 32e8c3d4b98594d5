"""Settings of the extractors: everything that determines a feature."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.precision import Precision
from config.base import PositiveInt, Section


class VisualSettings(Section):
    """A timm model over pictures or frames."""

    arch: str = "vit_large_patch16_224"
    weights: str = "pretrained"
    allow_pickle: bool = False
    """``weights`` may be a whole pickled model (.pth), which runs code that is in the file."""
    image_size: PositiveInt = 224
    """Side of the square input in pixels; whole pictures are scaled to it."""
    batch_size: PositiveInt = 32
    precision: Precision = "auto"


class LstmSizes(Section):
    """Sizes of the attention LSTM; the defaults are the published ones (VideoTag)."""

    projection: PositiveInt = 1024
    hidden: PositiveInt = 512
    """Of one direction."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    join: PositiveInt = 8192
    width: PositiveInt = 4096
    """Length of the video's vector."""


class VideoLstmSettings(LstmSizes):
    """An attention LSTM over the frames' features: one vector for each video."""

    weights: str | None = None
    """A path, or ``random:SEED``; null leaves the stream ``video_lstm`` out (scheme 1)."""
    allow_pickle: bool = False
    """``weights`` may be a whole pickled model (.pth), which runs code that is in the file."""
    batch_size: PositiveInt = 16
    precision: Precision = "auto"


class VideoSettings(VisualSettings):
    """A timm model over the frames of videos."""

    frames: PositiveInt = 16
    """Segments of one video; the centre frame of each is taken (TSN). 300 frames of 224 pixels
    make each of ``workers.pool.slots`` 45 MB large."""
    decode: Literal["accurate", "keyframes"] = "accurate"
    short_clips: Literal["once", "repeat"] = "once"
    """Of a clip with fewer frames than ``frames``: each frame once, or repeated until there are
    ``frames`` (scheme 2)."""
    lstm: VideoLstmSettings = VideoLstmSettings()


class ImageSettings(VisualSettings):
    """A timm model over images."""

    max_frames: PositiveInt = 1
    """Frames taken from an animated picture."""


class AudioSettings(Section):
    """VGGish, or any timm model with one input channel, over 0.96 s log-mel patches."""

    arch: str = "vggish"
    weights: str = "pretrained"
    allow_pickle: bool = False
    """``weights`` may be a whole pickled model (.pth), which runs code that is in the file."""
    stray_relu: bool = False
    """Apply the last ReLU, as torchvggish's released graph does (its issue 24)."""
    postprocess: bool = False
    """Subtract the mean, PCA, clip and quantise, as the AudioSet release does."""
    batch_size: PositiveInt = 64
    precision: Precision = "auto"


class TextSettings(Section):
    """A transformers encoder over tokens."""

    arch: str = "bert-base-chinese"
    weights: str = "pretrained"
    max_tokens: PositiveInt = 256
    batch_size: PositiveInt = 16
    precision: Precision = "auto"


class OcrSettings(Section):
    """Text inside pictures."""

    enabled: bool = True
    max_side: PositiveInt = 960
    """Pictures are shrunk so that their longer side is at most this many pixels."""
    detect_side: PositiveInt = 480
    """Smaller pictures are enlarged for finding text until their shorter side has this length."""
    frames: Annotated[int, Field(ge=0)] = 2
    """Frames of each video that are read."""
    min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.5
    max_chars: PositiveInt = 1000


class FeatureSettings(Section):
    """Everything that determines a feature; its digest is the extractor fingerprint."""

    ocr_mode: Literal["append", "separate"] = "separate"
    """OCR text joins the post's text, or stands as its own modality."""
    video: VideoSettings = VideoSettings()
    image: ImageSettings = ImageSettings()
    audio: AudioSettings = AudioSettings()
    text: TextSettings = TextSettings()
    ocr: OcrSettings = OcrSettings()
