"""Typed settings of the extractors: ``features.*``, one section for each kind of media."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.precision import Precision
from config.presets import Preset, with_preset
from config.section import PositiveInt, Seconds, Section

Engine = Literal["auto", "torch", "compile"]
Pooling = Literal["tokens", "cls", "mean", "last"]
ExtractorName = Literal["video", "image", "audio", "text", "ocr", "asr"]


class VisualSettings(Section):
    """A timm model over pictures or frames."""

    arch: str = "vit_large_patch16_224"
    weights: str = "pretrained"
    allow_pickle: bool = False
    """``weights`` may be a whole pickled model (.pth), which runs code that is in the file."""
    image_size: PositiveInt = 224
    """Side of the square input in pixels; whole pictures are scaled to it."""
    batch_size: PositiveInt = 128
    """Pictures that the model takes at once; on a CPU 3 at most, on a GPU what its memory takes."""
    precision: Precision = "auto"
    engine: Engine = "auto"
    """``auto``: on the CPU OpenVINO, which is faster, where its vectors are those of torch.
    ``compile``: torch.compile, on any device; a start takes a minute longer, or several."""
    trust_remote_code: bool = False
    """Run the Python code that a transformers model brings along; the log says so."""


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
    """Segments of a video, and so its most frames (TSN); 300 of 224 pixels make slots of 45 MB."""
    min_frames: PositiveInt = 8
    """With ``decode: auto``, segments of one video that give a frame whatever it costs."""
    decode: Literal["auto", "accurate", "keyframes"] = "auto"
    """``auto``: all key frames, as many as ``frames`` at most, of each of ``min_frames`` segments
    without one the cheapest frame, and of the others frames that are decoded anyway. ``accurate``:
    the centre frame of each of ``frames`` segments. ``keyframes``: the key frames nearest to
    those."""
    short_clips: Literal["once", "repeat"] = "once"
    """Of a clip with fewer frames than ``frames``: each frame once, or repeated until there are
    ``frames`` (scheme 2)."""
    lstm: VideoLstmSettings = VideoLstmSettings()


class ImageSettings(VisualSettings):
    """A timm model over images."""

    max_frames: PositiveInt = 1
    """Frames taken from an animated picture."""
    padded: bool = False
    """Each picture is seen twice, scaled to the square and, in its own proportions, padded to it
    with white; its vector is the mean of both. Encoding pictures takes twice the time."""

    @property
    def views(self) -> int:
        """Return how often the encoder sees each picture."""
        return 2 if self.padded else 1


class AudioSettings(Section):
    """VGGish, another of `extractors.parts.AUDIO_ENCODERS`, or any timm model of one channel."""

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
    engine: Engine = "auto"
    """``auto``: on the CPU OpenVINO, which is faster, where its vectors are those of torch.
    ``compile``: torch.compile, on any device; a start takes a minute longer, or several."""
    trust_remote_code: bool = False
    """Run the Python code that a transformers model brings along; the log says so."""


class TextSettings(Section):
    """A transformers encoder over tokens, or ``arch: tfidf``: n-grams of characters."""

    arch: str = "bert-base-chinese"
    weights: str = "pretrained"
    """Of ``tfidf``: the file that ``train_net.py`` makes (``task: text_backbone``)."""
    tfidf: str | None = None
    """Such a file: its vector joins that of a sentence encoder, so ``pooling`` is not tokens."""
    pooling: Pooling = "tokens"
    """All tokens of a text, or its vector as a sentence encoder was trained to give it: ``cls`` the
    first token (BGE), ``mean`` (MiniLM, E5) or ``last`` (Qwen3-Embedding)."""
    prefix: str = ""
    """Put before each text; E5 needs ``query: ``."""
    max_tokens: PositiveInt = 256
    batch_size: PositiveInt = 16
    """Texts that the model takes at once; those of several posts on a CPU 8 at most."""
    precision: Precision = "auto"
    engine: Engine = "auto"
    """``auto``: on the CPU OpenVINO, which is faster, where its vectors are those of torch.
    ``compile``: torch.compile, on any device; a start takes a minute longer, or several."""
    trust_remote_code: bool = False
    """Run the Python code that a transformers model brings along; the log says so."""

    @model_validator(mode="after")
    def _joined(self) -> TextSettings:
        if self.tfidf is not None and (self.pooling == "tokens" or self.arch == "tfidf"):
            raise ValueError(
                "tfidf joins the vector of a sentence encoder: set pooling to cls, mean or last, "
                "as the model was trained; TF-IDF alone is arch: tfidf with weights"
            )
        return self


# Pictures that a worker reads at once on a GPU, whose networks run on them together. At half, fewer
# wait while a pass runs, and the next is smaller; double holds more memory for passes of one size.
_OCR_ON_GPU = 8


class OcrSettings(Section):
    """Text inside pictures."""

    enabled: bool = True
    engine: Literal["auto", "onnxruntime", "openvino", "torch"] = "auto"
    """Runs the networks of PP-OCRv6. On a GPU: torch, or onnxruntime-gpu; openvino is for CPUs.
    ``auto``: on a GPU onnxruntime where it can use it, else torch; on a CPU openvino."""
    max_side: PositiveInt = 960
    """Pictures are shrunk so that their longer side is at most this many pixels."""
    detect_side: PositiveInt = 480
    """Smaller pictures are enlarged for finding text until their shorter side has this length."""
    frames: Annotated[int, Field(ge=0)] = 2
    """Frames of each video that are read."""
    min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Of a line; a character that stands alone needs 0.95, since shapes look like one."""
    max_chars: PositiveInt = 1000

    @property
    def on_gpu(self) -> bool:
        """Tell whether it runs on the GPU of its worker, if that has one."""
        return self.engine in {"auto", "torch"}

    def pictures_at_once(self, device: str, threads: int) -> int:
        """Return the pictures that a worker with so many threads reads at the same time."""
        return max(threads, _OCR_ON_GPU) if self.on_gpu and device != "cpu" else threads


class AsrSettings(Section):
    """Speech in videos and sounds: Whisper transcribes it, the text encoder embeds it."""

    enabled: bool = False
    arch: str = "openai/whisper-small"
    weights: str = "pretrained"
    language: str | None = None
    """Code such as ``en``; null: Whisper detects it, for every 30 seconds."""
    max_s: Seconds = 120.0
    """Seconds of each file that are transcribed; ``decode.max_audio_s`` is a limit, too."""
    silence_db: Annotated[float, Field(le=0)] = -60.0
    """30 seconds that are never louder than this are silence; full scale is 0."""
    no_speech: Annotated[float, Field(ge=0, le=1)] = 0.6
    """30 seconds with at least this probability of no speech have no text."""
    batch_size: PositiveInt = 4
    precision: Precision = "auto"
    trust_remote_code: bool = False
    """Run the Python code that a transformers model brings along; the log says so."""


class FeatureSettings(Section):
    """Everything that determines a feature; its digest is the extractor fingerprint."""

    preset: Preset | None = None
    """One name for the encoders of all modalities (`config.presets`); other keys override it."""
    ocr_mode: Literal["append", "separate"] = "separate"
    """OCR text joins the post's text, or is a modality of its own."""
    video: VideoSettings = VideoSettings()
    image: ImageSettings = ImageSettings()
    audio: AudioSettings = AudioSettings()
    text: TextSettings = TextSettings()
    ocr: OcrSettings = OcrSettings()
    asr: AsrSettings = AsrSettings()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return with_preset(values)

    def runs(self, name: ExtractorName) -> bool:
        """Return False for an extractor that is switched off."""
        return bool(getattr(getattr(self, name), "enabled", True))
