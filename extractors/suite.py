"""Several extractors on one device, loaded and run together; importing this loads no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import structlog

from common.errors import ConfigError, FeatureError
from common.post import Stream
from config.features import ExtractorName, FeatureSettings
from extractors.feature_file import stream_fingerprints
from extractors.models.base import Extractor
from extractors.parts import visual_encoder

if TYPE_CHECKING:
    from extractors.models.base import PictureEncoder

ALL_EXTRACTORS: tuple[ExtractorName, ...] = ("video", "image", "audio", "text", "ocr", "asr")

_OF_BACKBONE = {"arch", "weights", "image_size", "precision", "engine"}

_log = structlog.get_logger()


class ExtractorSuite:
    """The extractors that one process hosts.

    Args:
        features: Settings of all of them.
        device: ``cpu`` or ``cuda:N``; OCR runs there if its engine can.
        names: Those to load; OCR and ASR are left out where the settings disable them.
        threads: CPU threads for torch and OCR; None leaves torch's setting and gives OCR one.
    """

    def __init__(
        self,
        features: FeatureSettings,
        device: str = "cpu",
        names: Sequence[ExtractorName] = ALL_EXTRACTORS,
        *,
        threads: int | None = None,
    ) -> None:
        self.features = features
        self.device = device
        self.names = tuple(name for name in names if features.runs(name))
        self._threads = threads
        self._extractors: dict[ExtractorName, Extractor] = {}
        self._backbones: dict[tuple[object, ...], PictureEncoder] = {}
        self._texts: Extractor | None = None

    def load(self, names: Collection[ExtractorName] | None = None) -> None:
        """Load these extractors, or all, once; ConfigError leaves none half loaded."""
        missing = [
            name
            for name in self.names
            if name not in self._extractors and (names is None or name in names)
        ]
        if not missing:
            return
        if self._threads is not None and set(self.names) - {"ocr"}:
            import torch

            torch.set_num_threads(self._threads)
        try:
            for name in missing:
                extractor = self._build(name)
                self._extractors[name] = extractor
                extractor.load()
                _log.info(
                    "extractors.loaded",
                    extractor=name,
                    device=self.device,
                    dim=extractor.dim,
                    fingerprint=extractor.fingerprint,
                )
        except ConfigError:
            self.close()
            raise

    def run(self, name: ExtractorName, items: Sequence[Any]) -> list[Any]:
        """Return the results of a batch, in order.

        float16 ``(n, dim)`` arrays, texts for ``ocr``; for ``video`` with an LSTM the arrays of
        both its streams. A FeatureError fails the whole batch: run its members one at a time to
        learn which.
        """
        extractor = self._extractors.get(name)
        if extractor is None:
            raise FeatureError(f"{name}: this process does not host that extractor")
        return extractor.forward([extractor.preprocess(item) for item in items])

    def set_batch_size(self, name: ExtractorName, rows: int) -> None:
        """Set the rows of a pass of a loaded encoder, for measuring."""
        extractor: Any = self._extractors[name]
        extractor.batch_size = rows

    def embed_texts(self, name: ExtractorName, texts: Sequence[str]) -> Any:
        """Return unit vectors float32 ``(n, dim)`` of texts in the space of a modality's features.

        Raises:
            ConfigError: Its encoder has no text side.
        """
        return self._extractors[name].embed_texts(texts)

    @property
    def by_extractor(self) -> Mapping[Stream, str]:
        """Return the fingerprint of each loaded extractor, and of the video's LSTM."""
        return {stream: fingerprint for stream, (_, fingerprint) in self._loaded().items()}

    @property
    def fingerprints(self) -> dict[Stream, str]:
        """Return the fingerprint of each stream that the loaded extractors serve."""
        return stream_fingerprints(self.features, self.by_extractor)

    @property
    def dims(self) -> dict[Stream, int]:
        """Return the columns of each stream's arrays."""
        loaded = self._loaded()
        return {s: loaded["text" if s == "ocr" else s][0] for s in self.fingerprints}

    def close(self) -> None:
        for extractor in self._extractors.values():
            extractor.close()
        self._extractors, self._backbones, self._texts = {}, {}, None

    def _loaded(self) -> dict[Stream, tuple[int, str]]:
        """Return columns and fingerprint of each stream that an extractor makes by itself."""
        loaded = self._extractors.values()
        return {stream: of for each in loaded for stream, of in each.streams().items()}

    def _build(self, name: ExtractorName) -> Extractor:
        """Return one extractor, not loaded; video and image share a model where they can."""
        features, device = self.features, self.device
        match name:
            case "video" | "image":
                from extractors.models.visual import VideoExtractor, VisualExtractor, make_backbone

                settings = features.video if name == "video" else features.image
                if name == "video" and visual_encoder(settings).clips:
                    from extractors.models.transformers_video import ClipExtractor

                    return ClipExtractor(features.video, device)
                values = settings.model_dump(include=_OF_BACKBONE)
                key = tuple(values.values())
                backbone = self._backbones.setdefault(key, make_backbone(name, settings, device))
                if name == "video":
                    return VideoExtractor(features.video, device, backbone=backbone)
                return VisualExtractor("image", features.image, device, backbone=backbone)
            case "audio":
                from extractors.models.audio import AudioExtractor

                return AudioExtractor(features.audio, device)
            case "text":
                return self._text()
            case "asr":
                from extractors.models.asr import AsrExtractor

                return AsrExtractor(features.asr, self._text(), device)
            case "ocr":
                from extractors.models.ocr import OcrExtractor

                return OcrExtractor(features.ocr, device=device, threads=self._threads or 1)

    def _text(self) -> Extractor:
        """Return the encoder of texts, not loaded; words that are heard share it."""
        if self._texts is None:
            self._texts = self._new_text()
        return self._texts

    def _new_text(self) -> Extractor:
        from extractors.models.tfidf import TfidfExtractor, WithTfidf

        text = self.features.text
        if text.arch == "tfidf":
            return TfidfExtractor(text.weights, "features.text.weights")
        from extractors.models.text import TextExtractor

        encoder = TextExtractor(text, self.device)
        if text.tfidf is None:
            return encoder
        return WithTfidf(encoder, TfidfExtractor(text.tfidf, "features.text.tfidf"))
